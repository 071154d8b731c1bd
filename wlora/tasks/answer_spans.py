"""From start and end logits to answers: the best spans of each window, then the best text of each question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def find_best_spans(
    start_logits: Tensor, end_logits: Tensor, context: Tensor, *, n_best: int, max_answer_length: int
) -> Tensor:
    """Return the spans with the highest scores within the context of each window, by exact search over all spans.

    The score of a span is the sum of its start logit and its end logit. The score of "no answer" is the same sum at
    position 0, the position of a special token. Windows without the answer were trained to point at it.

    Args:
        start_logits: shape [windows, tokens].
        end_logits: shape [windows, tokens].
        context: index of the context's first token and of the token after its last one, shape [windows, 2].
        n_best: number of spans.
        max_answer_length: maximum number of tokens in a span.

    Returns:
        First token, last token and score of each span, best first; the last entry is (0, 0, score) for no answer.
            float32, shape [windows, n_best + 1, 3]. If a window has fewer spans, the remaining scores are −∞.
    """
    start_logits, end_logits = start_logits.float(), end_logits.float()
    windows, tokens = start_logits.shape
    width = min(max_answer_length, tokens)
    position = torch.arange(tokens, device=start_logits.device)
    outside = (position < context[:, :1]) | (position >= context[:, 1:])
    starts = start_logits.masked_fill(outside, -torch.inf)
    ends = torch.nn.functional.pad(end_logits.masked_fill(outside, -torch.inf), (0, width - 1), value=-torch.inf)
    # [windows, tokens, width]: every span once, indexed by its first token and its length minus 1
    scores = starts.unsqueeze(2) + ends.unfold(1, width, 1)
    best, index = scores.flatten(1).topk(min(n_best, tokens * width), dim=1)
    first = torch.div(index, width, rounding_mode="floor")
    found = start_logits.new_full((windows, n_best + 1, 3), -torch.inf)
    # float32 represents the positions exactly, and a single tensor needs a single transfer from the device.
    found[:, : best.shape[1]] = torch.stack([first.float(), (first + index % width).float(), best], dim=2)
    found[:, n_best, :2] = 0.0
    found[:, n_best, 2] = start_logits[:, 0] + end_logits[:, 0]
    return found


@dataclass(frozen=True)
class Windows:
    """The positions of the windows' tokens in the texts.

    Attributes:
        row: the question of each window, shape [windows].
        context: index of each window's first context token, shape [windows].
        lengths: number of context tokens of each window, shape [windows].
        starts: index of the first character of every context token, windows concatenated, shape [Σ lengths].
        ends: index of the character after each of these tokens, shape [Σ lengths].
    """

    row: np.ndarray
    context: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def choose_answers(spans: np.ndarray, windows: Windows, contexts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the best text of each question over all its windows, and the margin of "no answer" over it.

    Args:
        spans: result of `find_best_spans`, shape [windows, n_best + 1, 3].
        windows: the windows of these spans.
        contexts: the context of each question.

    Returns:
        The texts, stripped of white space; "" if no span has text. And the no-answer score minus the score of the text,
            shape [questions]. A question's no-answer score is the lowest one of its windows, because it has an answer
            if any window has.
    """
    candidates, silent = spans[:, :-1], spans[:, -1, 2]
    no_answer = np.full(len(contexts), np.inf)
    np.minimum.at(no_answer, windows.row, silent)
    window, rank = np.nonzero(candidates[:, :, 2] > -np.inf)
    first, last, score = candidates[window, rank].T
    # For equal scores, the order of the windows decides.
    order = np.lexsort((-score, windows.row[window]))
    window, score = window[order], score[order]
    base = (np.cumsum(windows.lengths) - windows.lengths - windows.context)[window]
    starts = windows.starts[base + first[order].astype(np.int64)]
    ends = windows.ends[base + last[order].astype(np.int64)]
    texts = [""] * len(contexts)
    best = np.full(len(contexts), -np.inf)
    for row, start, end, value in zip(
        windows.row[window].tolist(), starts.tolist(), ends.tolist(), score.tolist(), strict=True
    ):
        # The text of some tokens is only white space.
        if not texts[row] and (text := contexts[row][start:end].strip()):
            texts[row], best[row] = text, value
    return texts, no_answer - best
