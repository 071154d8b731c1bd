"""The scores of SQuAD, as the official scripts of v1.1 and v2.0 compute them, but within 0–1 and not 0–100.

Sources: Rajpurkar et al. (2016), `evaluate-v1.1.py`; Rajpurkar et al. (2018), `evaluate-v2.0.py`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

ANSWERABLE_METRICS = ("exact_match", "f1")
"""Of v1.1, where every question has an answer."""

UNANSWERABLE_METRICS = (
    *("exact", "f1", "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"),
    *("HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"),
)
"""Of v2.0; those of `HasAns` and `NoAns` are there only if such questions are."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower the case, delete ASCII punctuation and articles, and leave single spaces only."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DELETE_PUNCTUATION)).split())


def score_answers(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return `exact_match` and `f1` as v1.1 does: of each question the best over its answers, then the mean.

    Args:
        predictions: one text per question.
        answers: the right answers of each question, at least one.
    """
    exact, f1 = score_each(predictions, answers, empty_f1=False)
    return {"exact_match": float(exact.mean()), "f1": float(f1.mean())}


def score_answers_or_none(
    predictions: Sequence[str], no_answer: np.ndarray, answers: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return the scores of v2.0, at the threshold 0 of the no-answer score and at the best ones.

    A question counts as predicted to have no answer where its no-answer score is above the threshold. The best
    thresholds are those of the official search over the same dev set: an upper bound, not a result to compare with.

    Args:
        predictions: the best text of each question, whether or not an answer is predicted.
        no_answer: no-answer score minus that of the best text, shape [questions].
        answers: the right answers of each question; none where it has no answer.

    Returns:
        `UNANSWERABLE_METRICS`: `exact` and `f1` at 0, the same over questions with (`HasAns`) and without answers
        (`NoAns`), `best_exact` and `best_f1` with their thresholds (`_thresh`, in units of the logits).
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
        # Every text of ours is one that would be given as an answer: to a question without one it is wrong.
        best, threshold = find_best_threshold(raw[name], no_answer, has_answer, np.array([bool(p) for p in predictions]))
        found |= {f"best_{name}": best, f"best_{name}_thresh": threshold}
    return found


def count_as_answers(answers: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the texts that v2.0 compares with, "" where there is none; nothing but articles and punctuation is none."""
    return [[text for text in texts if normalize(text)] or [""] for texts in answers]


def find_best_threshold(
    scores: np.ndarray, no_answer: np.ndarray, has_answer: np.ndarray, answered: np.ndarray
) -> tuple[float, float]:
    """Return the best mean score over all thresholds of the no-answer score, and the threshold.

    As the official search: it starts from "no question has an answer" (reported with threshold 0), lets the questions
    answer in the order of their no-answer score, and takes the first best.

    Args:
        scores: of the texts, shape [questions], as are the others.
        no_answer: the higher, the surer that there is no answer.
        has_answer: whether a question has one.
        answered: whether the text is not empty.
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
    """Return exact match and F1 of each question, the best over its answers, both of shape [questions].

    Args:
        empty_f1: whether two texts of no tokens have F1 1 (v2.0) or 0 (v1.1).
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
