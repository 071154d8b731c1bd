"""Which examples of the dev set a run answers correctly, from its recorded predictions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from wlora.analysis.statistics import mcnemar
from wlora.analysis.study import Run
from wlora.analysis.study_reader import leave_out
from wlora.errors import ConfigError
from wlora.storage.records import RecordStore

# Columns that are 1 for a completely correct answer.
_EXACT = ("exact_match", "exact")


@dataclass(frozen=True)
class Disagreement:
    """How two runs of the same seed differ on the examples of the dev set.

    Attributes:
        seed: their seed.
        examples: number of examples.
        both: examples that both answer correctly.
        only_a: examples that only the first run answers correctly.
        only_b: examples that only the second run answers correctly.
    """

    seed: int
    examples: int
    both: int
    only_a: int
    only_b: int

    @property
    def p(self) -> float:
        """The p-value of McNemar's exact test."""
        return mcnemar(self.only_a, self.only_b)


@dataclass(frozen=True)
class Answers:
    """A run's predictions on the first validation split, on which scores are reported.

    Attributes:
        right: whether each example is answered correctly, boolean array of shape [examples].
        label: true classes, int array of shape [examples]; None for tasks without classes.
        prediction: predicted classes, in the same form as `label`.
    """

    right: np.ndarray
    label: np.ndarray | None = None
    prediction: np.ndarray | None = None


class Predictions:
    """The answers of a study's runs. Each run's file is read once.

    Args:
        store: the records of the study.
    """

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._read: dict[str, Answers | None] = {}

    def __call__(self, run: Run) -> Answers | None:
        """Return a run's answers; None if it has no predictions, or if answers are not right or wrong (regression).

        For damaged or missing predictions, print a notice and return None.
        """
        name = run.record.run_id
        if name not in self._read:
            try:
                self._read[name] = _read(self._store, run)
            except ConfigError as damage:
                leave_out(damage, "predictions")
                self._read[name] = None
        return self._read[name]

    def compare(self, a: Iterable[Run], b: Iterable[Run]) -> list[Disagreement]:
        """Compare the runs of two settings on one task, seed by seed. Seeds without predictions of both are skipped."""
        second, found = {run.seed: run for run in b}, []
        for run in a:
            if run.seed not in second:
                continue
            x, y = self(run), self(second[run.seed])
            if x is not None and y is not None and x.right.shape == y.right.shape:
                p, q = x.right, y.right
                counts = (len(p), (p & q).sum(), (p & ~q).sum(), (~p & q).sum())
                found.append(Disagreement(run.seed, *map(int, counts)))
        return found


def _read(store: RecordStore, run: Run) -> Answers | None:
    if run.status != "success" or (table := store.read_predictions(run.record)) is None:
        return None
    columns = {name: table.column(name).to_numpy() for name in table.column_names if name != "scores"}
    if "split" in columns:
        reported = columns["split"] == columns["split"][0] if len(table) else np.zeros(0, bool)
        columns = {name: values[reported] for name, values in columns.items()}
    label, prediction = columns.get("label"), columns.get("prediction")
    if label is not None and prediction is not None and {label.dtype.kind, prediction.dtype.kind} <= {"i", "u"}:
        return Answers(label == prediction, label, prediction)
    exact = next((columns[name] for name in _EXACT if name in columns), None)
    return None if exact is None else Answers(exact == 1)
