"""Fills table cells from runs: selects the runs of each row and column at the chosen learning rate and summarises them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Literal

from wlora.analysis.statistics import Summary, generator, summarize
from wlora.analysis.study import ENDED, TRIED, Point, Run, main_model, require_distinct_seeds, require_one_setting
from wlora.analysis.tables.layouts import LAYOUTS, Column, Layout, Row, row_of
from wlora.analysis.tuning import TUNE_SEED, Choice, choose_point

Score = Literal["last", "best"]
"""The evaluation of a run that is scored: after the last step, or the best one of its learning curve."""

Best = Mapping[str, Mapping[str, float]]
"""The metrics of runs, by run_id, at the best evaluation (`wlora.analysis.tables.best`)."""

# Runs of method=single measure one adapter for Figure 2. They are not a fine-tuning method to compare.
NOT_COMPARED = ("single",)


@dataclass(frozen=True)
class Cell:
    """One method on one task.

    Attributes:
        summaries: the displayed summaries: `last` or `best`; empty without a successful run.
        last: one summary per metric of the column after the last step, in the layout's scale.
        best: the same at the best evaluation of each run; empty if that of any run is unknown.
        scores: by seed, the mean over the column's metrics.
        tried: by point and seed, the same for all successful runs.
        runs: the successful runs at the chosen point.
        choice: how learning rates and warm-up were chosen; None without a successful run. A cell with a choice and without
            runs has been tuned, but not run on other seeds.
        diverged: number of runs that diverged at the chosen point, or at any point if none succeeded.
        missing: number of expected runs that have not ended.
        mark: `best`, `second` or "", within the compared rows.
    """

    summaries: tuple[Summary, ...] = ()
    last: tuple[Summary, ...] = ()
    best: tuple[Summary, ...] = ()
    scores: Mapping[int, float] = field(default_factory=dict)
    tried: Mapping[Point, Mapping[int, float]] = field(default_factory=dict)
    runs: tuple[Run, ...] = ()
    choice: Choice | None = None
    diverged: int = 0
    missing: int = 0
    mark: str = ""

    @property
    def value(self) -> float | None:
        """The mean over the cell's metrics; None for an empty cell."""
        return sum(s.mean for s in self.summaries) / len(self.summaries) if self.summaries else None


@dataclass(frozen=True)
class Parameters:
    """Trained parameters of a row: means over its runs. The head is counted only for full fine-tuning."""

    initial: float
    final: float
    total: float
    varies: bool = False


@dataclass(frozen=True)
class Table:
    """A filled layout.

    Attributes:
        cells: by row and task.
        averages: the column ALL by row, over the tasks in `averaged`; only for rows with runs on all of them.
        score: the evaluation that the cells show.
    """

    layout: Layout
    model: str
    rows: tuple[Row, ...]
    cells: Mapping[tuple[Row, str], Cell]
    parameters: Mapping[Row, Parameters] = field(default_factory=dict)
    averages: Mapping[Row, Cell] = field(default_factory=dict)
    averaged: tuple[str, ...] = ()
    seeds: int = 0
    score: Score = "last"

    @cached_property
    def titles(self) -> dict[str, str]:
        """The titles of the columns by task."""
        return {column.task: column.title for column in self.layout.columns}

    def row_cells(self, row: Row) -> list[Cell]:
        """Return a row's cells from left to right."""
        return [self.cells[row, column.task] for column in self.layout.columns]

    @property
    def complete(self) -> bool:
        """Whether ALL includes all tasks, so that it is comparable with the paper's."""
        return len(self.averaged) == len(LAYOUTS[self.layout.name].columns)

    def runs(self) -> list[Run]:
        """Return the successful runs in the table."""
        return [run for cell in self.cells.values() for run in cell.runs]

    def repeats(self, others: Iterable[Table]) -> bool:
        """Tell whether another table contains all runs of this one, e.g. if two layouts differ only in the paper's model."""
        mine = {run.record.run_id for run in self.runs()}
        return any(mine <= {run.record.run_id for run in other.runs()} for other in others)


def fill(
    layout: Layout,
    runs: Sequence[Run],
    *,
    model: str | None = None,
    seeds: int | None = None,
    bootstrap_seed: int = 0,
    best: Best | None = None,
    score: Score = "last",
) -> Table:
    """Fill a layout from the runs of one model.

    Args:
        layout: the layout of the table.
        runs: the runs of a study, after the user's filters.
        model: use the runs of this model; None: the paper's model if it has runs, else the one with most runs (see
            `_at_home`).
        seeds: expected runs per cell; None: with the paper's model the paper's number, else that of the fullest cell.
        bootstrap_seed: seed of all intervals.
        best: the metrics of runs at their best evaluation, if known.
        score: the evaluation that the cells show. Points are always chosen by the last evaluation.

    Raises:
        ConfigError: runs to be averaged or compared have different settings, or the same seed twice.
    """
    fitting = [run for run in runs if belongs(run, layout)]
    ours = fitting if model else _at_home(fitting, layout)
    model = model or main_model(ours, layout.model) or main_model(runs) or layout.model
    mine = [run for run in ours if run.model == model]
    layout = _narrowed(layout, mine, model)
    rows = _rows(layout, mine, model)
    groups: dict[tuple[Row, str], list[Run]] = {(row, column.task): [] for row in rows for column in layout.columns}
    for run in mine:
        key = (row_of(run), run.task)
        if key in groups:
            groups[key].append(run)
    cells = {}
    for (row, task), found in groups.items():
        column = next(column for column in layout.columns if column.task == task)
        where = f"table {layout.name}, {row.label} on {task}"
        cells[row, task] = _fill_cell(found, column, layout, where, bootstrap_seed, best or {}, score)
    for column in layout.columns:
        placed = [run for row in rows for run in cells[row, column.task].runs]
        require_one_setting(placed, f"table {layout.name}, column {column.task}", but="method.")
    require_one_setting([run for cell in cells.values() for run in cell.runs], f"table {layout.name}", part="method.targets")
    fullest = max((len(cell.runs) + cell.diverged for cell in cells.values()), default=0)
    expected = seeds or (layout.seeds if model == layout.model else fullest or layout.seeds)
    cells = {key: replace(cell, missing=max(0, expected - len(cell.runs) - cell.diverged)) for key, cell in cells.items()}
    table = Table(layout, model, rows, cells, seeds=expected, score=score)
    return mark(average(replace(table, parameters=_parameters(table)), bootstrap_seed))


def belongs(run: Run, layout: Layout) -> bool:
    """Tell whether a run fits a table by its task, targets, rank and method."""
    if run.task not in layout.tasks or run.method in NOT_COMPARED:
        return False
    targets = run.record.config["method"].get("targets")
    fits_rank = run.rank is None or layout.ranks is None or run.rank in layout.ranks
    has_group = layout.group is None or getattr(row_of(run), layout.group) is not None
    has_group &= layout.others or run.method in layout.methods
    return (targets is None or targets in layout.targets) and fits_rank and has_group


def _at_home(runs: Sequence[Run], layout: Layout) -> list[Run]:
    """Return the runs for a table whose model is not given. Tables 2 and 3 differ only in the family of their model.

    A run that fits both is shown in the table of its family, or in the table that has no runs of its own family.
    """
    others = [other for other in LAYOUTS.values() if other.family != layout.family and other.overlaps(layout)]
    elsewhere = [{other.family for other in others if belongs(run, other)} for run in runs]
    pairs = list(zip(runs, elsewhere, strict=True))
    home = [run for run, families in pairs if run.family == layout.family or not families]
    return home or [run for run, families in pairs if run.family not in families]


def _narrowed(layout: Layout, runs: Sequence[Run], model: str) -> Layout:
    """Return a layout with only the tasks and ranks that have runs, if these are of another model than the paper's.

    A small study has some of the paper's tasks and ranks. The dashes in its table are then runs that it lacks.
    """
    if model == layout.model or not runs:
        return layout
    tasks, ranks = {run.task for run in runs}, {run.rank for run in runs}
    columns = tuple(column for column in (*layout.columns, *layout.stand_ins) if column.task in tasks)
    rows = tuple(row for row in layout.rows if layout.group != "rank" or row.rank in ranks)
    return replace(layout, columns=columns, rows=rows)


def _rows(layout: Layout, runs: Sequence[Run], model: str) -> tuple[Row, ...]:
    """Return the paper's rows, and one row for every other method, rank and K in the records.

    With another model than the paper's, the values of K are taken from the records, if there are any.
    """
    found = {row_of(run) for run in runs}
    rows = list(layout.rows)
    if model != layout.model:
        with_k = {row.method for row in found if row.k is not None}
        rows = [row for row in rows if row.k is None or row.method not in with_k or row in found]
    order = {method: index for index, method in enumerate(dict.fromkeys(row.method for row in layout.rows))}
    rows += [row for row in found if row not in rows]

    def place(row: Row) -> tuple[int, int, str, int]:
        group = getattr(row, layout.group) if layout.group else 0
        return group, order.get(row.method, len(order)), row.method, row.k or 0

    return tuple(sorted(rows, key=place))


def _fill_cell(
    runs: Sequence[Run], column: Column, layout: Layout, where: str, bootstrap_seed: int, best: Best, score: Score
) -> Cell:
    tried = [run for run in runs if run.status in TRIED]
    require_one_setting(tried, where)
    require_distinct_seeds(tried, where)
    choice = choose_point(tried)
    ended = [run for run in tried if run.status in ENDED]
    if choice is None:
        return Cell(diverged=len({run.seed for run in ended}))
    chosen = choice.reported(ended)
    good = tuple(run for run in chosen if run.status == "success")
    if not good:
        return Cell(diverged=len(chosen))
    if choice.compared > 1 and all(run.config_seed == TUNE_SEED for run in chosen):
        return Cell(choice=choice)  # the best of several scores on this seed would be optimistic
    scale = 100.0 if layout.percent else 1.0
    stream = f"{layout.name} {good[0].method} {good[0].rank} {good[0].k} {column.task}"

    def summaries(found: Sequence[Mapping[str, float]]) -> tuple[Summary, ...]:
        return tuple(
            summarize([scale * metrics[name] for metrics in found], generator(bootstrap_seed, f"{stream} {name}"))
            for name in column.metrics
        )

    # Use all runs or none, because a mean over some seeds is not comparable with means over all seeds.
    peaks = [best[run.record.run_id] for run in good] if all(run.record.run_id in best for run in good) else []
    after_last, at_best = summaries([run.record.metrics for run in good]), summaries(peaks) if peaks else ()
    return Cell(
        summaries=at_best if score == "best" else after_last,
        last=after_last,
        best=at_best,
        scores=_by_seed(good, column, scale, best if score == "best" else None) if peaks or score == "last" else {},
        tried={
            point: _by_seed([run for run in ended if run.point == point], column, scale, best if score == "best" else None)
            for point in {run.point: None for run in ended}
        },
        runs=good,
        choice=choice,
        diverged=len(chosen) - len(good),
    )


def _by_seed(runs: Iterable[Run], column: Column, scale: float, best: Best | None) -> dict[int, float]:
    """Return, by seed, the mean over a column's metrics: at the best evaluation if `best` is given, else at the last."""
    found = {}
    for run in runs:
        metrics = run.record.metrics if best is None else best.get(run.record.run_id)
        if run.status == "success" and metrics is not None:
            found[run.seed] = sum(scale * metrics[name] for name in column.metrics) / len(column.metrics)
    return found


def _parameters(table: Table) -> dict[Row, Parameters]:
    found = {}
    for row in table.rows:
        runs = [run for cell in table.row_cells(row) for run in cell.runs]
        if runs:
            counts = [run.record.parameters for run in runs]
            final = fmean(run.trained for run in runs)
            removed = fmean(count["adapter_initial"] - count["adapter_final"] for count in counts)
            total = fmean(count["total"] for count in counts)
            found[row] = Parameters(final + removed, final, total, varies=len({run.trained for run in runs}) > 1)
    return found


def average(table: Table, bootstrap_seed: int = 0) -> Table:
    """Fill the column ALL: the mean over tasks. A pair of metrics counts as its mean.

    With the paper's model, ALL is over all tasks. With another model, it is over the tasks on which all rows have runs.
    """
    if not table.layout.average:
        return table
    tasks = [column.task for column in table.layout.columns]
    if table.model != table.layout.model:
        busy = [row for row in table.rows if any(cell.summaries for cell in table.row_cells(row))]
        tasks = [task for task in tasks if busy and all(table.cells[row, task].summaries for row in busy)]
    averages = {}
    for row in table.rows:
        cells = [table.cells[row, task] for task in tasks]
        if cells and all(cell.summaries for cell in cells):
            averages[row] = _average_cell(cells, generator_name=f"table {table.layout.name} {row}", seed=bootstrap_seed)
    return replace(table, averages=averages, averaged=tuple(tasks))


def _average_cell(cells: Sequence[Cell], *, generator_name: str, seed: int) -> Cell:
    values = [cell.value for cell in cells]
    mean = sum(value for value in values if value is not None) / len(values)
    diverged = sum(cell.diverged for cell in cells)
    # Deviation and interval are those of the averages of single seeds, because runs with one seed are alike on all tasks.
    complete = set.intersection(*(set(cell.scores) for cell in cells))
    per_seed = {seed: sum(cell.scores[seed] for cell in cells) / len(cells) for seed in sorted(complete)}
    if not per_seed:
        return Cell((Summary(mean, n=0 if all(cell.scores for cell in cells) else None),), diverged=diverged)
    spread = summarize(list(per_seed.values()), generator(seed, generator_name))
    if any(len(cell.scores) > len(per_seed) for cell in cells):
        spread = replace(spread, low=None, high=None)  # the mean has runs of seeds that some tasks lack
    return Cell((replace(spread, mean=mean),), scores=per_seed, diverged=diverged)


def mark(table: Table) -> Table:
    """Mark the best and second-best cell of every column within each group, by the printed number; ties share a mark."""
    digits = decimals(table.layout)
    groups: dict[object, list[Row]] = {}
    for row in table.rows:
        groups.setdefault(getattr(row, table.layout.group) if table.layout.group else None, []).append(row)
    cells, averages = dict(table.cells), dict(table.averages)
    for rows in groups.values():
        for column in table.layout.columns:
            values = {row: value for row in rows if (value := cells[row, column.task].value) is not None}
            for row, name in _rank(values, digits).items():
                cells[row, column.task] = replace(cells[row, column.task], mark=name)
        values = {row: value for row in rows if row in averages and (value := averages[row].value) is not None}
        for row, name in _rank(values, digits).items():
            averages[row] = replace(averages[row], mark=name)
    return replace(table, cells=cells, averages=averages)


def _rank(values: Mapping[Row, float], digits: int) -> dict[Row, str]:
    if len(values) < 2:
        return {}
    printed = {row: round(value, digits) for row, value in values.items()}
    levels = sorted(set(printed.values()), reverse=True)
    names = dict(zip(levels, ("best", "second"), strict=False))
    return {row: names[value] for row, value in printed.items() if value in names}


def decimals(layout: Layout) -> int:
    """Return the number of decimal places that the paper prints."""
    return 2 if layout.percent else 4
