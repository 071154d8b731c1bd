"""What a reader must know to judge a table: model, split, rows, seeds, learning rates, what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wlora.study import Run, show
from wlora.tables.cells import Table
from wlora.tables.layouts import Column


def caption(table: Table) -> str:
    """Return the caption, composed from the records alone."""
    runs = table.runs()
    parts = [f"{table.layout.title}. {_model(table, runs)}: dev sets, after the last step."]
    if runs:
        parts += [_seeds(runs), _training(table), *_tuning(table), *_mode(runs)]
    if any(cell.mark for cell in (*table.cells.values(), *table.averages.values())):
        within = {"rank": " at each rank", "k": " at each K", None: ""}[table.layout.group]
        parts.append(f"The best{within} is bold, the second underlined; equal printed figures share a mark.")
    if table.averages and len(table.averaged) < len(table.layout.columns):
        parts.append(f"ALL is over {_join(_titles(table, table.averaged))}.")
    return " ".join(parts)


def notes(table: Table) -> list[str]:
    """Return what stands below the table: missing and diverged runs, mixed commits and machines."""
    found = []
    missing = sum(cell.missing for cell in table.cells.values())
    if missing:
        expected = table.seeds * len(table.cells)
        found.append(f"Missing: {missing} of {expected} runs ({table.seeds} per cell); a dash is a cell without any.")
    for (row, task), cell in table.cells.items():
        if cell.diverged:
            total = cell.diverged + len(cell.runs)
            where = f"{row.label}{'' if row.rank is None or table.layout.ranks else f', r={row.rank}'} on {task}"
            found.append(f"Diverged (†): {cell.diverged} of {total} runs of {where}; not in its mean.")
    environments = [run.record.environment for run in table.runs()]
    commits = sorted({str(environment["git_commit"])[:7] for environment in environments if environment.get("git_commit")})
    if len(commits) > 1:
        found.append(f"The runs come from {len(commits)} commits: {', '.join(commits)}.")
    found += machines(table.runs())
    dirty = sum(bool(environment.get("git_dirty")) for environment in environments)
    if dirty:
        found.append(f"{dirty} runs come from a checkout with uncommitted changes.")
    return found


def machines(runs: Iterable[Run]) -> list[str]:
    """Say on which machines runs were made, if on several."""
    names = sorted({run.machine for run in runs})
    if len(names) < 2:
        return []
    return [f"The runs were made on {_join(names)}: seconds of different machines are not comparable."]


def _model(table: Table, runs: Sequence[Run]) -> str:
    totals = sorted({run.record.parameters["total"] for run in runs})
    return f"{table.model} ({totals[0] / 1e6:,.1f}M parameters)" if totals else table.model


def _seeds(runs: Sequence[Run]) -> str:
    seeds = sorted({run.seed for run in runs})
    gapless = len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1
    listed = f"{seeds[0]} to {seeds[-1]}" if gapless else _join(map(str, seeds))
    if len(seeds) == 1:
        return f"One run each (seed {listed})."
    return f"Mean ± standard deviation over seeds {listed}, number of runs in brackets."


def _training(table: Table) -> str:
    """Say per task how many rows, steps and rows per step; tasks that agree share a clause."""
    clauses: dict[str, list[str]] = {}
    for column in table.layout.columns:
        runs = _runs_of(table, column)
        if runs:
            record = runs[0].record
            rows = record.task.get("train_rows")
            batch = record.config["task"]["batch_size"] * (record.config["train"]["accumulation_steps"] or 1)
            limit = record.config["task"]["max_eval_rows"]
            scored = f", the first {limit:,} dev rows" if limit else ""
            clause = f"{record.steps.get('total', 0):,} steps of {batch} rows{scored}"
            clauses.setdefault(clause, []).append(f"{column.title} ({rows:,} rows)" if rows else column.title)
    return "Training: " + "; ".join(f"{_join(titles)} {clause}" for clause, titles in clauses.items()) + "."


def _tuning(table: Table) -> list[str]:
    """Say per task how learning rate and warm-up were chosen; tasks that agree share a clause."""
    clauses: dict[str, list[str]] = {}
    for column in table.layout.columns:
        cells = [table.cells[row, column.task] for row in table.rows]
        choices = [cell.choice for cell in cells if cell.choice is not None]
        if not choices:
            continue
        elsewhere = sorted({str(run.record.config["tune_on"]) for run in _runs_of(table, column) if _tuned_elsewhere(run)})
        compared = sorted({choice.compared for choice in choices})
        if compared[-1] > 1:
            counts = str(compared[-1]) if len(compared) == 1 else f"{compared[0]} to {compared[-1]}"
            seeds = _join(sorted({str(choice.seed) for choice in choices if choice.compared > 1}))
            clause = f"the best of {counts} on seed {seeds} of the same dev set"
        else:
            clause = f"chosen on {_join(elsewhere)}" if elsewhere else "the one value that was run"
        clauses.setdefault(clause, []).append(column.title)
    found = "; ".join(f"{_join(titles)} {clause}" for clause, titles in clauses.items())
    return [f"Learning rate and warm-up per method: {found}."]


def _tuned_elsewhere(run: Run) -> bool:
    return run.record.config.get("tune_on") not in (None, run.task)


def _mode(runs: Sequence[Run]) -> list[str]:
    """Name target set, compat and precision."""
    targets = sorted({str(run.setting["method.targets"]) for run in runs if "method.targets" in run.setting})
    words = [f"targets={_join(targets)}"] if targets else []
    words += [f"{key}={'/'.join(sorted({show(run.setting[key]) for run in runs}))}" for key in ("compat", "precision")]
    return [", ".join(words) + "."]


def _runs_of(table: Table, column: Column) -> list[Run]:
    return [run for row in table.rows for run in table.cells[row, column.task].runs]


def _titles(table: Table, tasks: Iterable[str]) -> list[str]:
    return [column.title for column in table.layout.columns if column.task in tasks]


def _join(words: Iterable[str]) -> str:
    *most, last = list(words)
    return f"{', '.join(most)} and {last}" if most else last
