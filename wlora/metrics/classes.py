"""Scores of single classes: precision, recall and F1 of each, their means, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import metrics as sklearn_metrics

MOST_CONFUSED = 50
"""Maximum number of classes for which a confusion matrix is kept; a larger one would make up most of a record."""
_SHOWN_CONFUSED = 12
_SHOWN = 30
_DIGITS = 6
_WIDEST = 24
MULTI_LABEL_METRICS = ("micro_f1", "macro_f1", "weighted_f1", "subset_accuracy")


def score_classes(references: np.ndarray, predictions: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return the scores of every class as JSON for the record.

    Args:
        references: class indices, shape [rows]; or for several classes per row 0 and 1, shape [rows, classes].
        predictions: of the same shape.
        names: the classes in order.

    Returns:
        `names`, and in their order `precision`, `recall` and `f1` (0–1; 0 without any) and `support` (rows of the class in
            the references); `macro_f1` (mean of the classes that occur in references or predictions) and `weighted_f1`.
            For one class per row and at most 50 classes also `confusion`: rows by true class (outer list) and predicted
            class.
    """
    labels = list(range(len(names)))
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(
        references, predictions, labels=labels, zero_division=0.0
    )
    single = references.ndim == 1
    there = np.union1d(references, predictions) if single else np.flatnonzero((references + predictions).any(axis=0))
    found = {
        "names": list(names),
        "precision": _rounded(precision),
        "recall": _rounded(recall),
        "f1": _rounded(f1),
        "support": [int(number) for number in support],
        "macro_f1": round(float(np.mean(f1[there.astype(int)])) if len(there) else 0.0, _DIGITS),
        "weighted_f1": round(float(np.average(f1, weights=support)) if support.sum() else 0.0, _DIGITS),
    }
    if single and len(names) <= MOST_CONFUSED:
        found["confusion"] = sklearn_metrics.confusion_matrix(references, predictions, labels=labels).tolist()
    return found


def score_label_sets(names: Sequence[str], references: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Return the named metrics of `MULTI_LABEL_METRICS` for several classes per row, each within 0–1.

    `micro_f1` counts all decisions of all classes together, `macro_f1` and `weighted_f1` are means over the classes (the
    latter by how often each occurs), and `subset_accuracy` is the share of rows with exactly the right classes.

    Args:
        names: the metrics.
        references: 0 and 1, shape [rows, classes].
        predictions: of the same shape.
    """
    found = {}
    for name in names:
        if name == "subset_accuracy":
            found[name] = float((references == predictions).all(axis=1).mean())
        else:
            mean = name.removesuffix("_f1")
            found[name] = float(sklearn_metrics.f1_score(references, predictions, average=mean, zero_division=0.0))
    return found


def format_classes(found: dict[str, Any]) -> list[str]:
    """Return the scores of all classes and the confusion matrix as lines of text; no lines for an empty block.

    Args:
        found: the result of `score_classes`. Of many classes only the most frequent are shown.
    """
    if not found:
        return []
    lined = [" ".join(name.split()) for name in found["names"]]
    names = [name if len(name) <= _WIDEST else name[: _WIDEST - 1] + "…" for name in lined]
    order = sorted(range(len(names)), key=lambda number: -found["support"][number])[:_SHOWN]
    width = max([len(names[number]) for number in order] + [len("weighted")])
    lines = [f"{'':{width}}  precision  recall      f1   rows"]
    for number in sorted(order):
        precision, recall, f1 = (found[key][number] for key in ("precision", "recall", "f1"))
        lines.append(f"{names[number]:{width}}  {precision:9.4f}  {recall:6.4f}  {f1:6.4f}  {found['support'][number]:5}")
    if len(names) > _SHOWN:
        lines.append(f"… {len(names) - _SHOWN} classes more, in the record")
    for mean in ("macro", "weighted"):
        lines.append(f"{mean:{width}}  {'':9}  {'':6}  {found[f'{mean}_f1']:6.4f}")
    if "confusion" in found and len(names) <= _SHOWN_CONFUSED:
        lines += _format_confusion(names, found["confusion"])
    return lines


def _format_confusion(names: Sequence[str], confusion: Sequence[Sequence[int]]) -> list[str]:
    width = max(len("true"), *map(len, names))
    cells = [max(len(name), 5) for name in names]
    lines = [
        f"{'true':{width}}  {'  '.join(f'{name:>{cell}}' for name, cell in zip(names, cells, strict=True))}  <- predicted"
    ]
    for name, row in zip(names, confusion, strict=True):
        lines.append(f"{name:{width}}  {'  '.join(f'{number:{cell}}' for number, cell in zip(row, cells, strict=True))}")
    return lines


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), _DIGITS) for value in values]
