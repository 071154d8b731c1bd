"""The metrics of GLUE as `evaluate.Metric` objects that need no network and no disk, unlike `evaluate.load`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics

from wlora.errors import RunFault, unknown_name

Score = Callable[[np.ndarray, np.ndarray], float]
"""Arguments: (references, predictions), both of shape [rows]."""

Shard = tuple[Sequence[int], Sequence[Any] | np.ndarray]
"""(indices, predictions) of the features that one process has predicted."""


class ScoreMetric(evaluate.Metric):  # type: ignore[misc]  # the library has no types
    """One score of predictions against references, computed in memory.

    Args:
        name: the score's key in the result.
        score: the function.
        dtype: type of predictions and references: `int64` (class indices) or `float64` (values).
        definition: description of the score, with its source.
    """

    def __init__(self, name: str, score: Score, dtype: str, definition: str) -> None:
        self._metric_name, self._score, self._dtype, self._definition = name, score, dtype, definition
        super().__init__(config_name=name, keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value(self._dtype)
        return evaluate.MetricInfo(
            description=self._definition,
            citation="Wang et al., GLUE, 2018",
            inputs_description="predictions and references: one number per row",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _build_data_dir(self) -> str:
        # The library would create this folder in the user's home, although a metric in memory never writes to it.
        return ""

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        return {self._metric_name: float(self._score(np.asarray(references), np.asarray(predictions)))}


def _correlate(measure: Callable[..., tuple[float, float]], references: np.ndarray, predictions: np.ndarray) -> float:
    """Return a correlation; 0 if references or predictions are constant. NaN stays NaN."""
    if len(references) < 2 or np.ptp(references) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(measure(references, predictions)[0])


_SCORES: dict[str, tuple[Score, str, str]] = {
    "accuracy": (sklearn_metrics.accuracy_score, "int64", "share of rows with the right class, 0–1"),
    "f1": (
        partial(sklearn_metrics.f1_score, pos_label=1, zero_division=0.0),
        "int64",
        "harmonic mean of precision and recall of class 1, 0–1; 0 without any",
    ),
    "macro_f1": (
        partial(sklearn_metrics.f1_score, average="macro", zero_division=0.0),
        "int64",
        "mean F1 of the classes that occur in references or predictions, 0–1",
    ),
    "weighted_f1": (
        partial(sklearn_metrics.f1_score, average="weighted", zero_division=0.0),
        "int64",
        "mean F1 of the classes, weighted by how often each occurs in the references, 0–1",
    ),
    "matthews": (sklearn_metrics.matthews_corrcoef, "int64", "Matthews (1975), −1–1; 0 for a constant"),
    "pearson": (partial(_correlate, stats.pearsonr), "float64", "linear correlation, −1–1; 0 for a constant"),
    "spearman": (partial(_correlate, stats.spearmanr), "float64", "rank correlation, −1–1; 0 for a constant"),
}
# The paper's tables report the mean of each of these pairs.
_MEANS = {"accuracy_f1": ("accuracy", "f1"), "corr": ("pearson", "spearman")}


def metrics_of(classes: int) -> list[str]:
    """Return the names of the metrics that are defined for a number of classes; 0 classes means regression."""
    dtype = "int64" if classes else "float64"
    single = [name for name, (_, of, _) in _SCORES.items() if of == dtype and (name != "f1" or classes == 2)]
    return [*single, *(name for name, parts in _MEANS.items() if set(parts) <= set(single))]


def compute(names: Sequence[str], predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Return the named metrics, in the order of the names.

    Args:
        names: names from `metrics_of`.
        predictions: class indices or values, shape [rows].
        references: class indices or values, shape [rows].

    Returns:
        Scores within 0–1, correlations within −1–1. NaN only if a prediction is NaN.

    Raises:
        ConfigError: a name is unknown.
    """
    for name in names:
        if name not in _SCORES and name not in _MEANS:
            raise unknown_name(f"task.metrics={name}", name, [*_SCORES, *_MEANS])
    parts = {part for name in names for part in _MEANS.get(name, (name,))}
    scores = {part: _compute_one(part, predictions, references) for part in parts}
    return {name: float(np.mean([scores[part] for part in _MEANS.get(name, (name,))])) for name in names}


def _compute_one(name: str, predictions: np.ndarray, references: np.ndarray) -> float:
    metric = ScoreMetric(name, *_SCORES[name])
    with warnings.catch_warnings():
        # The libraries warn about a single class or nearly constant values. The result for these cases is defined
        # above.
        warnings.simplefilter("ignore")
        found = metric.compute(predictions=predictions, references=references)
    assert found is not None
    return float(found[name])


def merge_shards(shards: Sequence[Shard], *, count: int) -> list[Any]:
    """Combine the predictions of all processes, so that metrics are computed once, on the complete split.

    The mean of per-process metrics would be wrong: shards differ in size, and F1 is not a mean over rows.

    Args:
        shards: one per process, of any size; if a feature occurs more than once (padding), the first prediction counts.
        count: number of features.

    Returns:
        One prediction per feature, in their order.

    Raises:
        RunFault: some features are in no shard.
    """
    found: dict[int, Any] = {}
    for numbers, predictions in shards:
        for number, prediction in zip(numbers, predictions, strict=True):
            found.setdefault(int(number), prediction)
    missing = sum(number not in found for number in range(count))
    if missing:
        raise RunFault(f"{missing} of {count} evaluation features are missing: no process predicted them")
    return [found[number] for number in range(count)]
