"""The scores of SQuAD as computed by the official scripts of v1.1 and v2.0, but scaled to 0–1 instead of 0–100.

Sources: Rajpurkar et al. (2016), `evaluate-v1.1.py`; Rajpurkar et al. (2018), `evaluate-v2.0.py`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

ANSWERABLE_METRICS = ("exact_match", "f1")
"""Metrics of v1.1, where every question has an answer."""

UNANSWERABLE_METRICS = (
    *("exact", "f1", "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"),
    *("HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"),
)
"""Metrics of v2.0. `HasAns` and `NoAns` exist only if the data have such questions."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Convert to lower case, remove ASCII punctuation and articles, and collapse white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE_PUNCTUATION)).split())


def score_answers(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return `exact_match` and `f1` of v1.1: per question the maximum over its answers, then the mean over questions.

    Args:
        predictions: one text per question.
        answers: the reference answers of each question, at least one.
    """
    exact, f1 = score_each(predictions, answers, empty_f1=False)
    return {"exact_match": float(exact.mean()), "f1": float(f1.mean())}


def score_answers_or_none(
    predictions: Sequence[str], no_answer: np.ndarray, answers: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return the scores of v2.0: at threshold 0 of the no-answer score, and at the best thresholds.

    A question is predicted to have no answer if its no-answer score is above the threshold. The best thresholds come
    from the official search on the same validation set, so these scores are upper bounds and not comparable results.

    Args:
        predictions: the best text of each question, whether or not an answer is predicted.
        no_answer: no-answer score minus the score of the best text, shape [questions].
        answers: the reference answers of each question; empty if it has no answer.

    Returns:
        `UNANSWERABLE_METRICS`: `exact` and `f1` at 0, the same over questions with answers (`HasAns`) and without
            (`NoAns`), and `best_exact` and `best_f1` with their thresholds (`_thresh`, in units of the logits).
    """
    has_answer = np.array([bool(texts) for texts in answers])
    golds = count_as_answers(answers)
    raw = dict(zip(("exact", "f1"), score_each(predictions, golds, empty_f1=True), strict=True))
    silent = dict(zip(("exact", "f1"), score_each([""] * len(golds), golds, empty_f1=True), strict=True))
    found = {}
    for name in ("exact", "f1"):
        scores = np.where(no_answer > 0, silent[name], raw[name])
        found[name] = float(scores.mean())
        for group, members in (("HasAns", has_answer), ("NoAns", ~has_answer)):
            if members.any():
                found[f"{group}_{name}"] = float(scores[members].mean())
        # A non-empty predicted text counts as an answer, which is wrong for a question without one.
        best, threshold = find_best_threshold(raw[name], no_answer, has_answer, np.array([bool(p) for p in predictions]))
        found |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return found


def count_as_answers(answers: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the answers that v2.0 compares with; "" if there is none.

    An answer of only articles and punctuation is dropped.
    """
    return [[text for text in texts if normalize(text)] or [""] for texts in answers]


def find_best_threshold(
    scores: np.ndarray, no_answer: np.ndarray, has_answer: np.ndarray, answered: np.ndarray
) -> tuple[float, float]:
    """Return the best mean score over all thresholds of the no-answer score, and that threshold.

    As in the official search: it starts with no answer to all questions (reported with threshold 0), adds answers in
    the order of the no-answer score, and takes the first maximum.

    Args:
        scores: scores of the texts, shape [questions].
        no_answer: no-answer scores, shape [questions]; a higher score means "no answer" is more likely.
        has_answer: whether each question has an answer, shape [questions].
        answered: whether each text is not empty, shape [questions].
    """
    order = np.argsort(no_answer, kind="stable")
    gains = np.where(has_answer, scores, -answered.astype(float))[order]
    totals = (~has_answer).sum() + np.cumsum(gains)
    best = int(np.argmax(totals))
    silent = float((~has_answer).sum())
    if totals[best] <= silent:
        return silent / len(scores), 0.0
    return float(totals[best]) / len(scores), float(no_answer[order][best])


def score_each(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], *, empty_f1: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return exact match and F1 of each question, maximum over its answers, both of shape [questions].

    Args:
        predictions: one text per question.
        answers: the answers to compare with, at least one per question.
        empty_f1: whether two texts without tokens have F1 = 1 (v2.0) or 0 (v1.1).
    """
    exact, f1 = np.zeros(len(predictions)), np.zeros(len(predictions))
    for index, (prediction, texts) in enumerate(zip(predictions, answers, strict=True)):
        guess = normalize(prediction)
        golds = {normalize(text) for text in texts}
        exact[index] = guess in golds
        f1[index] = max(_token_f1(guess.split(), gold.split(), empty_f1) for gold in golds)
    return exact, f1


def _token_f1(guess: list[str], gold: list[str], empty_f1: bool) -> float:
    if not guess and not gold:
        return float(empty_f1)
    common = sum((Counter(guess) & Counter(gold)).values())
    # 2PR / (P + R), with P = common / guess and R = common / gold
    return 2 * common / (len(guess) + len(gold))
