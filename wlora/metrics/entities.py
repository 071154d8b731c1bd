"""Scores of tagged tokens: whole entities as the package seqeval counts them, and single tokens."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

ENTITY_METRICS = ("f1", "precision", "recall", "macro_f1", "accuracy")
"""Metrics of tags such as `B-PER`, `I-PER` and `O`: of whole entities, but `accuracy` of tokens."""

TAG_METRICS = ("accuracy", "tag_macro_f1")
"""Metrics of any tags, such as parts of speech: of tokens."""

_ENTITY_TAG = re.compile(r"O|[BIESLU]-.+")
Tags = Sequence[Sequence[str]]


def mark_entities(names: Sequence[str]) -> bool:
    """Tell whether tags mark entities, as in the schemes IOB1, IOB2, IOBES and BILOU."""
    return all(_ENTITY_TAG.fullmatch(name) for name in names) and any("-" in name for name in names)


def score_tags(names: Sequence[str], references: Tags, predictions: Tags) -> dict[str, float]:
    """Return the named metrics of `ENTITY_METRICS` or `TAG_METRICS`, each within 0–1.

    An entity is right if its type, its first and its last token are right. `f1`, `precision` and `recall` count the
    entities of all types together; `macro_f1` is the mean over types.

    Args:
        names: the metrics.
        references: the tags of each row, one per token.
        predictions: of the same lengths.
    """
    from seqeval import metrics as seqeval_metrics

    whole, found = _as_iobes(references, predictions)
    any_entity = any(tag != "O" for rows in (whole, found) for row in rows for tag in row)
    own: dict[str, Any] = {
        "f1": lambda: seqeval_metrics.f1_score(whole, found, zero_division=0),
        "precision": lambda: seqeval_metrics.precision_score(whole, found, zero_division=0),
        "recall": lambda: seqeval_metrics.recall_score(whole, found, zero_division=0),
        "macro_f1": lambda: seqeval_metrics.f1_score(whole, found, average="macro", zero_division=0) if any_entity else 0.0,
        "accuracy": lambda: np.mean(_flat(references) == _flat(predictions)),
        "tag_macro_f1": lambda: _macro_f1(_flat(references), _flat(predictions)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # seqeval warns about types that are never predicted
        return {name: float(own[name]()) for name in names}


def score_entity_types(references: Tags, predictions: Tags) -> dict[str, Any]:
    """Return the scores of every entity type, in the form of `wlora.metrics.classes.score_classes`."""
    from seqeval import metrics as seqeval_metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = seqeval_metrics.classification_report(
            *_as_iobes(references, predictions), output_dict=True, zero_division=0
        )
    means = {name: report.pop(f"{name} avg", {"f1-score": 0.0}) for name in ("micro", "macro", "weighted")}
    kinds = sorted(report)
    if not kinds:
        means = dict.fromkeys(means, {"f1-score": 0.0})  # seqeval returns NaN if there is no entity at all
    columns = {key: [round(float(report[kind][own]), 6) for kind in kinds] for key, own in _COLUMNS.items()}
    return {
        "names": kinds,
        **columns,
        "support": [int(report[kind]["support"]) for kind in kinds],
        **{f"{name}_f1": round(float(means[name]["f1-score"]), 6) for name in ("macro", "weighted")},
    }


_COLUMNS = {"precision": "precision", "recall": "recall", "f1": "f1-score"}


def _as_iobes(*sides: Tags) -> list[list[list[str]]]:
    """Return tags with the letters that seqeval reads: the last and unit tags of BILOU (L, U) are E and S in IOBES."""
    letters = {"L": "E", "U": "S"}
    return [[[letters.get(tag[0], tag[0]) + tag[1:] for tag in row] for row in side] for side in sides]


def _flat(tags: Tags) -> np.ndarray:
    return np.array([tag for row in tags for tag in row])


def _macro_f1(references: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average="macro", zero_division=0.0))
