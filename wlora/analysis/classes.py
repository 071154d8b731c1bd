"""Scores of single classes over the runs of a study: per task and setting, means over runs and one confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from wlora.analysis.study import Run
from wlora.analysis.tables.settings import TITLES, tasks_of

MOST_CONFUSED = 20
"""Maximum number of classes of a confusion matrix that is shown."""


@dataclass(frozen=True)
class ClassScores:
    """The class scores of one setting on one task.

    Attributes:
        title: task, setting and number of runs.
        head: the headings of `rows`.
        rows: a line per class, then the means over classes. A line has precision, recall and F1 as means over runs, and the
            number of rows of the class over all runs.
        names: the classes, as headings of `confusion`.
        confusion: number of rows by true and predicted class, summed over runs; empty if unknown or too large.
    """

    title: str
    head: list[str]
    rows: list[list[str]]
    names: list[str]
    confusion: list[list[int]]


def summarize_classes(groups: Mapping[tuple[str, str], Sequence[Run]]) -> list[ClassScores]:
    """Return the class scores of every setting with runs that recorded them.

    Runs with different classes are summarised separately.

    Args:
        groups: the runs to average, by label of the setting and task (`wlora.analysis.tables.settings.chosen_runs`).
    """
    found: dict[tuple[str, str, tuple[str, ...]], list[Run]] = {}
    for (label, task), group in groups.items():
        for run in group:
            if run.record.classes:
                found.setdefault((task, label, tuple(run.record.classes["names"])), []).append(run)
    order = tasks_of(run for group in groups.values() for run in group)
    ordered = sorted(found.items(), key=lambda item: order.index(item[0][0]))
    return [_summarize(key, runs, len(groups[key[1], key[0]])) for key, runs in ordered]


def _summarize(key: tuple[str, str, tuple[str, ...]], runs: Sequence[Run], total: int) -> ClassScores:
    task, label, names = key
    blocks = [run.record.classes for run in runs]
    rows = []
    for number, name in enumerate(names):
        means = [_mean([block[score][number] for block in blocks]) for score in ("precision", "recall", "f1")]
        rows.append([name, *means, str(sum(block["support"][number] for block in blocks))])
    rows += [
        [f"{mean} mean", "", "", _mean([block[f"{mean}_f1"] for block in blocks]), ""] for mean in ("macro", "weighted")
    ]
    confusion: list[list[int]] = []
    if all("confusion" in block for block in blocks) and len(names) <= MOST_CONFUSED:
        size = range(len(names))
        confusion = [[sum(block["confusion"][true][found] for block in blocks) for found in size] for true in size]
    many = f"{len(runs)} of {total} runs" if len(runs) < total else f"{total} run{'' if total == 1 else 's'}"
    title = f"{TITLES.get(task, task)}, {label}: {many}"
    return ClassScores(title, ["class", "precision", "recall", "F1", "rows"], rows, list(names), confusion)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4f}"
