"""Captions and notes of tables: model, split, rows, seeds, learning rates and missing runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from wlora.analysis.study import Run, lookup, shipped_task, show
from wlora.analysis.tables.cells import Score, Table
from wlora.analysis.tables.layouts import LAYOUTS, Column
from wlora.analysis.tuning import Choice
from wlora.storage.environment import describe_computing

EVALUATION: dict[Score, str] = {
    "last": "after the last step",
    "best": "at each run's best evaluation, which the same dev set chooses, so that scores are optimistic",
}


def caption(table: Table) -> str:
    """Return the caption of a table, generated only from the records."""
    runs = table.runs()
    parts = [f"{_title(table)}. {_model(table, runs)}: dev sets, {EVALUATION[table.score]}."]
    if runs:
        parts += [_seeds(runs), *_stand_ins(table), _training(table), *_tuning(table), *_mode(runs)]
    if any(cell.mark for cell in (*table.cells.values(), *table.averages.values())):
        within = {"rank": " at each rank", "k": " at each K", None: ""}[table.layout.group]
        parts.append(f"The best{within} is bold, the second underlined; equal printed figures share a mark.")
    if table.averages and len(table.averaged) < len(table.layout.columns):
        parts.append(f"ALL is over {_join(_titles(table, table.averaged))}.")
    return " ".join(parts)


def notes(table: Table) -> list[str]:
    """Return the notes below a table: missing and diverged runs, mixed commits and machines."""
    found = []
    missing = sum(cell.missing for cell in table.cells.values())
    if missing:
        fewer = sum(bool(cell.missing) for cell in table.cells.values())
        which = f"Cells with fewer than {table.seeds} runs: {fewer} of {len(table.cells)}"
        found.append(f"{which} (runs missing: {missing}). A dash is a cell without any.")
    for (row, task), cell in table.cells.items():
        if cell.diverged:
            total = cell.diverged + len(cell.runs)
            where = f"{row.label}{'' if row.rank is None or table.layout.ranks else f', r={row.rank}'} on {task}"
            found.append(f"Diverged (†): {cell.diverged} of {total} runs of {where}; not in its mean.")
    tuned = [
        f"{row.label} on {table.titles[task]}" for (row, task), cell in table.cells.items() if cell.choice and not cell.runs
    ]
    if tuned:
        found.append(f"Runs on the tuning seed only, which is not reported: {_join(tuned)}.")
    unknown = sum(len(cell.runs) for cell in table.cells.values() if cell.runs and not cell.summaries)
    if unknown:
        found.append(f"Runs in cells whose best evaluations are not all known: {unknown}; those cells are empty.")
    found += _differences(table)
    environments = [run.record.environment for run in table.runs()]
    commits = sorted({str(environment["git_commit"])[:7] for environment in environments if environment.get("git_commit")})
    if len(commits) > 1:
        found.append(f"The runs come from {len(commits)} commits: {', '.join(commits)}.")
    found += machines(table.runs())
    dirty = sum(bool(environment.get("git_dirty")) for environment in environments)
    if dirty:
        found.append(f"Runs from a checkout with uncommitted changes: {dirty}.")
    return found


def machines(runs: Iterable[Run]) -> list[str]:
    """Return notes about the machines of runs, if there are several, and about their influence on the numbers."""
    environments = [(run.machine, run.record.environment) for run in runs]
    found = []
    names = sorted({name for name, _ in environments})
    if len(names) > 1:
        found.append(f"The runs were made on {_join(names)}: seconds of different machines are not comparable.")
    computing = Counter(describe_computing(environment) for _, environment in environments)
    computing.pop("", None)
    if len(computing) > 1:
        counts = _join(f"{count} with {how}" for how, count in sorted(computing.items()))
        found.append(
            f"Runs were computed {counts}: their sums are rounded in another order, so that equal settings may differ in "
            "score."
        )
    moved = sum("earlier" in environment for _, environment in environments)
    if moved:
        which = f"{moved} run{'' if moved == 1 else 's'}"
        found.append(f"Of {which} an earlier part was computed in another environment, which the record names.")
    return found


# Keys that tasks may set differently, as the paper's protocols do, and keys of the adapters that the claims compare.
_OF_TASKS = ("task.", "train.max_steps", "train.accumulation_steps")
_OF_ADAPTERS = ("method.alpha", "method.dropout")
_CLAIMED = ("lora", "wlora", "wlora_plus", "rlora")


def _differences(table: Table) -> list[str]:
    """Return a note for each setting in which the runs differ that ALL averages or the claims compare."""
    first = {(row, table.titles[task]): cell.runs[0] for (row, task), cell in table.cells.items() if cell.runs}
    found = _differing(
        [(title, run) for (_, title), run in first.items()], lambda key: not key.startswith((*_OF_TASKS, "method."))
    )
    for row in table.rows:
        mine = [(title, run) for (other, title), run in first.items() if other == row]
        found += [f"{row.label}: {line}" for line in _differing(mine, lambda key: key.startswith("method."))]
    claimed = [(row.label, run) for (row, _), run in first.items() if row.method in _CLAIMED]
    return found + _differing(claimed, lambda key: key in _OF_ADAPTERS)


def _differing(runs: Sequence[tuple[str, Run]], compared: Callable[[str], bool]) -> list[str]:
    """Return a note for each compared key with several values, which names the runs of each value."""
    found = []
    for key in sorted({key for _, run in runs for key in run.setting if compared(key)}):
        names: dict[str, list[str]] = {}
        for name, run in runs:
            names.setdefault(show(lookup(run, key)[1]), []).append(name)
        if len(names) > 1:
            found.append(
                f"{key}: " + "; ".join(f"{value} for {_join(dict.fromkeys(who))}" for value, who in names.items()) + "."
            )
    return found


def _model(table: Table, runs: Sequence[Run]) -> str:
    totals = sorted({run.record.parameters["total"] for run in runs})
    return f"{table.model} ({totals[0] / 1e6:,.1f}M parameters)" if totals else table.model


def _title(table: Table) -> str:
    """Return the title, with the ranks of the rows where these are not the paper's four."""
    ranks = sorted({row.rank for row in table.rows if row.rank is not None})
    shown = f"at rank{'s' if len(ranks) > 1 else ''} {_join(map(str, ranks))}"
    return table.layout.title.replace("at four ranks", shown) if len(ranks) not in (0, 4) else table.layout.title


def _stand_ins(table: Table) -> list[str]:
    """Say which columns stand in for the paper's tasks, and which weights their runs start from."""
    shown = [column for column in table.layout.columns if column in table.layout.stand_ins]
    if not shown:
        return []
    tasks = _join(column.title for column in LAYOUTS[table.layout.name].columns)
    folders = sorted({str(path) for run in table.runs() if (path := run.record.config["model"].get("path"))})
    weights = f" The pretrained weights are those of model.path={_join(folders)}." if folders else ""
    return [f"{_join(column.title for column in shown)} is a generated task in place of {tasks}.{weights}"]


def _seeds(runs: Sequence[Run]) -> str:
    seeds = sorted({run.seed for run in runs})
    gapless = len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1
    listed = f"{seeds[0]} to {seeds[-1]}" if gapless else _join(map(str, seeds))
    if len(seeds) == 1:
        return f"One run each (seed {listed})."
    return f"Mean ± standard deviation over seeds {listed}, number of runs in brackets."


def _training(table: Table) -> str:
    """Describe the training rows, steps and rows per step of each task. Tasks with equal values share a clause."""
    clauses: dict[str, list[str]] = {}
    for column in table.layout.columns:
        runs = _runs_of(table, column)
        if runs:
            record = runs[0].record
            batch = record.config["task"]["batch_size"] * (record.config["train"]["accumulation_steps"] or 1)
            clause = f"{record.steps.get('total', 0):,} steps of {batch} rows{dev_rows_text(runs[0])}"
            rows = rows_text(runs[0])
            clauses.setdefault(clause, []).append(f"{column.title} ({rows})" if rows else column.title)
    return "Training: " + "; ".join(f"{_join(titles)} {clause}" for clause, titles in clauses.items()) + "."


def rows_text(run: Run) -> str:
    """Describe the number of training rows of a run, and the total if they are a sample; empty if unknown."""
    rows, whole = run.record.task.get("train_rows"), shipped_task(run.task).get("train_rows")
    if not rows:
        return ""
    if whole and rows > whole:
        return f"{rows:,} rows, where the benchmark has {whole:,}"
    return f"a sample: {rows:,} of {whole:,} rows" if whole and rows < whole else f"{rows:,} rows"


def dev_rows_text(run: Run) -> str:
    """Return a clause saying that only the first dev rows are scored; empty if all rows are scored."""
    limit = run.record.config["task"]["max_eval_rows"]
    return f", the first {limit:,} dev rows" if limit else ""


def _tuning(table: Table) -> list[str]:
    """Describe how learning rate and warm-up were chosen on each task. Tasks with equal values share a clause."""
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
            clause = f"the best of {counts}{_raced(choices)} on seed {seeds} of the same dev set"
        else:
            clause = f"chosen on {_join(elsewhere)}" if elsewhere else "the one value that was run"
        clauses.setdefault(clause, []).append(column.title)
    found = "; ".join(f"{_join(titles)} {clause}" for clause, titles in clauses.items())
    rates = "Learning rates" if any(choice.point.head_lr for choice in _choices(table).values()) else "Learning rate"
    return [f"{rates} and warm-up per method: {found}.", *edges(_choices(table))]


def _raced(choices: Sequence[Choice]) -> str:
    """Return a clause saying that a race has stopped runs early; empty if there was no race."""
    raced = [choice.raced for choice in choices if choice.compared > 1]
    return "" if not any(raced) else f", {'' if all(raced) else 'some '}raced by successive halving,"


def _choices(table: Table) -> dict[tuple[str, str], Choice]:
    """Return the tuning choices of a table by row and column, as displayed."""
    several = table.layout.ranks is None
    return {
        (row.label + (f" r={row.rank}" if several and row.rank is not None else ""), table.titles[task]): cell.choice
        for (row, task), cell in table.cells.items()
        if cell.choice is not None
    }


def edges(choices: dict[tuple[str, str], Choice]) -> list[str]:
    """Return notes about chosen rates or warm-ups that are the smallest or largest ones tried.

    Args:
        choices: by setting and task.
    """
    names = {"lr": "learning rate", "warmup": "warm-up", "head_lr": "learning rate of the head"}
    found: dict[tuple[str, str, str], list[str]] = {}
    for (setting, task), choice in choices.items():
        for key, edge in choice.edges().items():
            found.setdefault((task, edge, key), []).append(setting)
    said = []
    for (task, edge, key), settings in found.items():
        tuned = [setting for (setting, where), choice in choices.items() if where == task and choice.compared > 1]
        rest = [setting for setting in tuned if setting not in settings]
        who = _join(settings)
        if len(settings) > 2 * len(rest) + 1:
            who = "every setting" + (f" but {_join(rest)}" if rest else "")
        said.append(f"On {task} the {edge} {names[key]} tried was chosen for {who}.")
    return [" ".join([*said, "A wider grid may find a better one."])] if said else []


def _tuned_elsewhere(run: Run) -> bool:
    return run.record.config.get("tune_on") not in (None, run.task)


def _mode(runs: Sequence[Run]) -> list[str]:
    """Return a text with target set, compat and precision."""
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
