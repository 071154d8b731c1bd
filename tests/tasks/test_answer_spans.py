"""Spans against brute force on small logits, and the choice of a question's text over its windows."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch

from wlora.metrics.squad import score_answers
from wlora.tasks.answer_spans import Windows, choose_answers, find_best_spans


def brute_force(start: list[float], end: list[float], context: range, longest: int) -> list[tuple[int, int, float]]:
    pairs = itertools.product(context, context)
    spans = [(i, j, start[i] + end[j]) for i, j in pairs if i <= j < i + longest]
    return sorted(spans, key=lambda span: -span[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n_best", "longest"), [(1, 1), (5, 3), (20, 30), (100, 4)])
def test_spans_are_those_of_brute_force(n_best: int, longest: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n_best)
    start, end = (torch.randn(4, 9, generator=generator).to(dtype) for _ in range(2))
    context = [(3, 8), (3, 4), (0, 9), (5, 5)]
    found = find_best_spans(start, end, torch.tensor(context), n_best=n_best, max_answer_length=longest)
    assert found.shape == (4, n_best + 1, 3) and found.dtype == torch.float32
    for window, (first, after) in enumerate(context):
        expected = brute_force(start[window].tolist(), end[window].tolist(), range(first, after), longest)[:n_best]
        spans = found[window, :-1]
        valid = spans[:, 2] > -torch.inf
        assert int(valid.sum()) == len(expected)
        assert [tuple(span) for span in spans[valid, :2].int().tolist()] == [span[:2] for span in expected]
        assert spans[valid, 2].tolist() == pytest.approx([span[2] for span in expected])
        silent = float(start[window, 0] + end[window, 0])
        assert found[window, -1].tolist() == pytest.approx([0.0, 0.0, silent])


def test_what_is_kept_of_a_window_does_not_grow_with_its_tokens() -> None:
    for tokens in (16, 384):
        logits = torch.zeros(2, tokens)
        found = find_best_spans(logits, logits, torch.tensor([[2, tokens]] * 2), n_best=20, max_answer_length=30)
        assert found.shape == (2, 21, 3)


CONTEXTS = ["red  green blue", "one two"]
# Two windows of the first context (they share "green"), one of the second; a token of white space in the first.
WINDOWS = Windows(
    row=np.array([0, 0, 1]),
    context=np.array([3, 3, 4]),
    lengths=np.array([3, 2, 2]),
    starts=np.array([0, 3, 5, 5, 11, 0, 4]),
    ends=np.array([3, 5, 10, 10, 15, 3, 7]),
)


def spans(*windows: tuple[float, list[tuple[int, int, float]]]) -> np.ndarray:
    """Build the array of `find_best_spans` with two spans a window from (no-answer score, spans)."""
    rows = [[*found, *[(0, 0, -np.inf)] * (2 - len(found)), (0, 0, silent)] for silent, found in windows]
    return np.array(rows, dtype=np.float32)


def test_the_best_span_of_all_windows_is_the_answer() -> None:
    found = spans((1.0, [(3, 3, 2.0), (3, 5, 1.0)]), (4.0, [(3, 4, 2.5), (4, 4, 0.0)]), (7.0, [(4, 5, 3.0), (4, 4, 1.0)]))
    texts, no_answer = choose_answers(found, WINDOWS, CONTEXTS)
    assert texts == ["green blue", "one two"]
    assert no_answer.tolist() == pytest.approx([1.0 - 2.5, 7.0 - 3.0])  # the lowest no-answer score of the windows


def test_of_equal_scores_the_first_window_wins() -> None:
    found = spans((0.0, [(5, 5, 2.0)]), (0.0, [(3, 4, 2.0)]), (0.0, [(4, 4, 0.0)]))
    assert choose_answers(found, WINDOWS, CONTEXTS)[0] == ["green", "one"]


def test_a_span_of_white_space_is_no_answer() -> None:
    found = spans((0.0, [(4, 4, 9.0), (3, 3, 1.0)]), (0.0, []), (0.0, []))
    texts, no_answer = choose_answers(found, WINDOWS, CONTEXTS)
    assert texts == ["red", ""]
    assert no_answer.tolist() == pytest.approx([-1.0, np.inf])


def test_logits_that_are_not_numbers_give_no_answer() -> None:
    found = spans(*[(np.nan, [(4, 4, np.nan)])] * 3)
    assert choose_answers(found, WINDOWS, CONTEXTS)[0] == ["", ""]


def test_a_dev_set_of_the_size_of_squads_is_decoded_and_scored_in_seconds() -> None:
    """10,570 questions in 10,784 windows of 170 tokens: a minute is allowed, about a second is needed."""
    questions, windows, tokens, first = 10_570, 10_784, 170, 16
    generator = torch.Generator().manual_seed(0)
    contexts = [" ".join(f"w{(row * 7 + i) % 991}" for i in range(tokens - first)) for row in range(questions)]
    row = np.sort(np.concatenate([np.arange(questions), np.arange(windows - questions)]))
    edges = [np.cumsum([0, *(len(word) + 1 for word in contexts[index].split())]) for index in row]
    places = Windows(
        row=row,
        context=np.full(windows, first),
        lengths=np.full(windows, tokens - first),
        starts=np.concatenate([edge[:-1] for edge in edges]),
        ends=np.concatenate([edge[1:] - 1 for edge in edges]),
    )
    logits = [torch.randn(64, tokens, generator=generator) for _ in range(2)]
    begin = time.process_time()  # which no other load of the machine prolongs
    found = []
    for start in range(0, windows, 64):
        size = min(64, windows - start)
        starts, ends = (part[:size] for part in logits)
        context = torch.tensor([[first, tokens]] * size)
        found.append(find_best_spans(starts, ends, context, n_best=20, max_answer_length=30).numpy())
    texts, _ = choose_answers(np.concatenate(found), places, contexts)
    score = score_answers(texts, [[text, "w1 w2", "w3"] for text in texts])
    assert time.process_time() - begin < 60
    assert score == {"exact_match": 1.0, "f1": 1.0} and all(texts)
