"""SQuAD's scores on cases computed by hand, and the threshold search against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from wlora.metrics.squad import ANSWERABLE_METRICS, UNANSWERABLE_METRICS, normalize, score_answers, score_answers_or_none


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  cat's, a (Hat)!", "cats hat"),
        ("an A-team for the banana", "ateam for banana"),
        ("U.S. $1,000.50", "us 100050"),
        ("THE", ""),
        ("\tnew\u00a0York\n", "new york"),
        ("“Theatre”", "“theatre”"),  # only ASCII punctuation goes, and only whole words are articles
        ("", ""),
    ],
)
def test_texts_are_normalised(text: str, expected: str) -> None:
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("red house", ["The red house."], 1.0, 1.0),
        ("the big red house", ["red house"], 0.0, 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("new new york", ["new york"], 0.0, 0.8),  # a word counts as often as both have it
        ("york", ["Paris", "New York", "York!"], 1.0, 1.0),
        ("old york", ["Paris", "New York"], 0.0, 0.5),
        ("", ["Paris"], 0.0, 0.0),
        ("a", ["The"], 1.0, 0.0),  # v1.1 finds no common word in two empty texts
    ],
)
def test_the_best_answer_counts(prediction: str, answers: list[str], exact: float, f1: float) -> None:
    found = score_answers([prediction], [answers])
    assert tuple(found) == ANSWERABLE_METRICS
    assert (found["exact_match"], found["f1"]) == pytest.approx((exact, f1))


def test_scores_are_means_over_questions() -> None:
    found = score_answers(["red house", "old york", "x"], [["red house"], ["new york"], ["y"]])
    assert found == pytest.approx({"exact_match": 1 / 3, "f1": 1.5 / 3})


def test_questions_without_answers() -> None:
    found = score_answers_or_none(
        ["Paris", "the big red house", "x", "y"],
        np.array([-2.0, 1.0, 3.0, -1.0]),
        [["Paris", "Lutetia"], ["red house"], [], []],
    )
    assert set(found) == set(UNANSWERABLE_METRICS)
    assert (found["exact"], found["f1"]) == (0.5, 0.5)  # the first is right, the last should be silent
    assert (found["HasAns_exact"], found["HasAns_f1"], found["NoAns_exact"], found["NoAns_f1"]) == (0.5, 0.5, 0.5, 0.5)
    # Silent on all: 2 right. Answering up to −2: 3; up to −1: 2; up to 1: 2 (F1 2.8); up to 3: 1 (F1 1.8).
    assert (found["best_exact"], found["best_exact_thresh"]) == (0.75, -2.0)
    assert (found["best_f1"], found["best_f1_thresh"]) == (0.75, -2.0)


def test_the_threshold_may_let_questions_answer_that_were_silent() -> None:
    found = score_answers_or_none(["red", "blue", "x"], np.array([1.0, 2.0, 3.0]), [["red"], ["red blue"], []])
    assert (found["exact"], found["f1"]) == (1 / 3, 1 / 3)
    assert (found["best_exact"], found["best_exact_thresh"]) == pytest.approx((2 / 3, 1.0))
    assert (found["best_f1"], found["best_f1_thresh"]) == pytest.approx((1 - 1 / 9, 2.0))


def test_silence_on_every_question_is_reported_with_threshold_zero() -> None:
    found = score_answers_or_none(["x", "y"], np.array([-5.0, 4.0]), [[], []])
    assert (found["exact"], found["best_exact"], found["best_exact_thresh"]) == (0.5, 1.0, 0.0)
    assert "HasAns_exact" not in found and found["NoAns_f1"] == 0.5


def test_no_score_of_no_answer_may_exceed_the_threshold_only_strictly() -> None:
    assert score_answers_or_none(["x"], np.array([0.0]), [["x"]])["exact"] == 1.0


def test_answers_of_articles_and_punctuation_count_as_none_but_leave_the_question_answerable() -> None:
    found = score_answers_or_none(["the", "dog"], np.array([-1.0, -1.0]), [["The", "..."], ["...", "dog"]])
    assert found["exact"] == found["HasAns_f1"] == 1.0 and "NoAns_exact" not in found


@pytest.mark.parametrize("seed", range(20))
def test_the_best_threshold_agrees_with_trying_all(seed: int) -> None:
    generator = np.random.RandomState(seed)
    words = ["red", "blue", "green", "old"]
    count = int(generator.randint(1, 12))
    texts = [" ".join(generator.choice(words, 2)) for _ in range(count)]
    answers = [[" ".join(generator.choice(words, 2))] if generator.rand() < 0.6 else [] for _ in range(count)]
    no_answer = generator.randn(count)
    found = score_answers_or_none(texts, no_answer, answers)
    for name in ("exact", "f1"):
        tried = [score_answers_or_none(texts, no_answer - threshold, answers)[name] for threshold in [-np.inf, *no_answer]]
        assert found[f"best_{name}"] == pytest.approx(max(tried))
        at_best = score_answers_or_none(texts, no_answer - found[f"best_{name}_thresh"], answers)[name]
        silent = sum(not texts for texts in answers) / count
        assert found[f"best_{name}"] in (pytest.approx(at_best), pytest.approx(silent))
