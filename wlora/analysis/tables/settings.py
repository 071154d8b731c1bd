"""The runs of a study grouped by setting, each with a unique label."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from wlora.analysis.study import TRIED, Run
from wlora.analysis.tables.layouts import GLUE, LABELS, LAYOUTS, Row, row_of
from wlora.analysis.tuning import choose_point

TITLES = {column.task: column.title for layout in LAYOUTS.values() for column in (*GLUE, *layout.columns)}


def tasks_of(runs: Iterable[Run]) -> list[str]:
    """Return the tasks of runs, in the tables' order."""
    known = list(TITLES)
    return sorted({run.task for run in runs}, key=lambda task: (known.index(task) if task in known else 99, task))


def chosen_runs(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """Return, by label and task, the successful runs at the chosen point of each setting (`runs_by_setting`)."""
    found = {}
    for key, group in runs_by_setting(runs).items():
        choice = choose_point(group)
        kept = [run for run in choice.reported(group) if run.status == "success"] if choice else []
        if kept:
            found[key] = kept
    return found


def runs_by_setting(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """Return the tried runs of each setting by label and task: ended runs and runs that a race has stopped.

    A label contains the method and, if several settings of a method exist on any task, all fields in which they differ
    there, so that a setting has the same label on all tasks.
    """
    settings: dict[tuple[str, str, Row, str], list[Run]] = {}
    names: dict[int, str] = {}  # by id: runs of one setting share the object (`wlora.analysis.study_reader.read_study`)
    for run in runs:
        if run.status in TRIED:
            known = id(run.setting)
            if known not in names:
                names[known] = repr(sorted(run.setting.items(), key=str))
            settings.setdefault((run.task, run.model, row_of(run), names[known]), []).append(run)
    others: dict[tuple[str, str, str], list[Run]] = {}
    for (task, model, row, _), group in settings.items():
        others.setdefault((task, model, row.method), []).append(group[0])
    named: dict[tuple[str, str], set[str]] = {}
    for (_, model, method), alike in others.items():
        named.setdefault((model, method), set()).update(_differing(alike))
    ranks = {row.rank for _, _, row, _ in settings if row.rank is not None}
    models = {model for _, model, _, _ in settings}
    found: dict[tuple[str, str], list[Run]] = {}
    order = list(LABELS)

    def place(key: tuple[str, str, Row, str]) -> tuple[str, int, int, int, str]:
        _, model, row, setting = key
        known = order.index(row.method) if row.method in order else len(order)
        return model, known, row.rank or 0, row.k or 0, setting

    for task, model, row, setting in sorted(settings, key=place):
        group = settings[task, model, row, setting]
        label = row.label + (f" r={row.rank}" if len(ranks) > 1 and row.rank is not None else "")
        label += f" model={model}" if len(models) > 1 else ""
        label += _difference(group[0], named[model, row.method])
        # Two settings have one label only if one leaves out what the other sets to null: they are the same.
        found.setdefault((label, task), []).extend(group)
    return found


def _differing(runs: Sequence[Run]) -> set[str]:
    """Return the fields in which runs of one method on one task differ, without the rank and K of their rows."""
    found = set()
    for run in runs:
        shown = {"method.rank": run.rank, "method.k": run.k}
        for key, value in run.setting.items():
            if (key not in shown or shown[key] != value) and any(other.setting.get(key) != value for other in runs):
                found.add(key)
    return found


def _difference(run: Run, keys: Collection[str]) -> str:
    """Return those of the given fields that a run has, with their values."""
    return "".join(f" {key.rpartition('.')[2]}={value}" for key, value in run.setting.items() if key in keys)
