"""The runs of a study by setting, each with a label that tells it from the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wlora.study import ENDED, Run, choose_point
from wlora.tables.layouts import GLUE, LABELS, LAYOUTS, Row

TITLES = {column.task: column.title for layout in LAYOUTS.values() for column in (*GLUE, *layout.columns)}


def tasks_of(runs: Iterable[Run]) -> list[str]:
    """Return the tasks of runs, in the tables' order."""
    known = list(TITLES)
    return sorted({run.task for run in runs}, key=lambda task: (known.index(task) if task in known else 99, task))


def chosen_runs(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """Return, by label and task, the successful runs at the chosen learning rate and warm-up of each setting.

    Settings of a method are told apart in the label by rank, K, and any other field in which they differ on the task.
    """
    settings: dict[tuple[str, Row, str], list[Run]] = {}
    for run in runs:
        if run.status in ENDED:
            row = Row(run.method, run.rank, run.k)
            settings.setdefault((run.task, row, repr(sorted(run.setting.items(), key=str))), []).append(run)
    ranks = {row.rank for _, row, _ in settings if row.rank is not None}
    found: dict[tuple[str, str], list[Run]] = {}
    order = list(LABELS)

    def place(key: tuple[str, Row, str]) -> tuple[int, int, int, str]:
        known = order.index(key[1].method) if key[1].method in order else len(order)
        return known, key[1].rank or 0, key[1].k or 0, key[2]

    for task, row, setting in sorted(settings, key=place):
        group = settings[task, row, setting]
        choice = choose_point(group)
        if choice is None:
            continue
        alike = [
            run
            for (name, same, _), others in settings.items()
            if (name, same.method) == (task, row.method)
            for run in others
        ]
        label = (
            row.label + (f" r={row.rank}" if len(ranks) > 1 and row.rank is not None else "") + _difference(group[0], alike)
        )
        kept = [run for run in group if run.point == choice.point and run.status == "success"]
        found[label, task] = sorted(kept, key=lambda run: run.seed)
    return found


def _difference(run: Run, alike: Sequence[Run]) -> str:
    """Name the fields besides rank and K in which a run differs from others of its method."""
    others = [key for key in run.setting if key not in ("method.rank", "method.k")]
    differing = [key for key in others if any(other.setting.get(key) != run.setting[key] for other in alike)]
    return "".join(f" {key.rpartition('.')[2]}={run.setting[key]}" for key in differing)
