"""The visible part of a table: headings and cells, before they become Markdown or LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wlora.analysis.statistics import Summary
from wlora.analysis.tables.cells import Cell, Parameters, Table, decimals
from wlora.analysis.tables.comparisons import Answer
from wlora.analysis.tables.layouts import LABELS, Layout, Row
from wlora.analysis.tables.paper import PrintedRow, column_name

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Entry:
    """A displayed cell: mean and deviation as text (`0.9/0.8` for a pair), number of runs, mark, and diverged runs."""

    mean: str
    std: str = ""
    n: int | None = None
    mark: str = ""
    diverged: int = 0


@dataclass(frozen=True)
class Grid:
    """The headings (upper, lower) and body of a table. `rules` are the indices of body lines with a rule above."""

    headings: tuple[tuple[str, str], ...]
    body: tuple[tuple[str | Entry, ...], ...]
    rules: frozenset[int] = frozenset()
    texts: int = 1
    """Number of leading text columns."""


@dataclass(frozen=True)
class Content:
    """The displayed cells, by row and task. The columns of parameters and ALL are by row."""

    cell: Callable[[Row, str], str | Entry]
    parameters: Callable[[Row], str]
    average: Callable[[Row], str | Entry]


def draw(table: Table, printed: dict[Row, PrintedRow] | None = None) -> Grid:
    """Draw a table in the paper's layout. For the paper's own table, the parameters are taken from `printed`."""
    content = Content(
        cell=lambda row, task: _entry(table.cells[row, task], table.layout),
        parameters=lambda row: printed[row].parameters if printed else parameters_text(table.parameters.get(row)),
        average=lambda row: _entry(table.averages[row], table.layout) if row in table.averages else Entry(""),
    )
    return _arrange(table.layout, table.rows, content)


def draw_companion(table: Table, layout: Layout, printed: dict[Row, PrintedRow]) -> Grid:
    """Draw the paper's numbers, each followed by the difference (ours minus the paper's) in brackets.

    Args:
        table: ours; another model's may have fewer rows and columns.
        layout: the paper's table.
        printed: its numbers, read with this layout.
    """
    digits = decimals(layout)
    columns = {column.task: column for column in layout.columns}

    def cell(row: Row, task: str) -> str:
        column = columns[task]
        figures = [printed[row].values[column_name(column, metric)] for metric in column.metrics]
        ours = table.cells.get((row, task))
        return _with_difference(figures, [s.mean for s in ours.summaries] if ours else [], digits)

    def average(row: Row) -> str:
        mean, ours = printed[row].average, table.averages.get(row)
        return _with_difference([mean or 0.0], [s.mean for s in ours.summaries] if ours and table.complete else [], digits)

    return _arrange(layout, tuple(printed), Content(cell, lambda row: printed[row].parameters, average))


def draw_comparisons(answers: Sequence[Answer], layout: Layout) -> Grid:
    """Draw comparisons: difference and probability of improvement, each with its 95 % interval."""
    headings = ["Rank", "Comparison", "Difference", "P(improvement)", "Tasks", "Pairs", "Paired"]
    body = []
    for answer in answers:
        found = answer.comparison
        body.append(
            (
                "" if answer.a.rank is None else str(answer.a.rank),
                f"{answer.a.label} vs {answer.b.label}",
                with_ends(found.difference, decimals(layout), signed=True),
                with_ends(found.probability, 2, signed=False),
                str(found.tasks),
                str(found.pairs),
                "yes" if found.paired else "no",
            )
        )
    return Grid(tuple(("", heading) for heading in headings), tuple(body), texts=2)


def parameters_text(parameters: Parameters | None) -> str:
    """Write trained parameters as the paper does: `442K (0.24%)`."""
    if parameters is None:
        return ""
    share = 100 * parameters.final / parameters.total
    digits = f"{share:.0f}" if share in (0, 100) else f"{share:.2f}" if share >= 0.01 else f"{share:.1g}"
    return f"{'≈' if parameters.varies else ''}{count_text(parameters.final)} ({digits}%)"


def count_text(count: float) -> str:
    """Write a count with three digits: 442,368 is 442K, 12,288 is 12.3K."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            scaled = count / unit
            return f"{scaled:.{max(0, 3 - len(str(int(scaled))))}f}{letter}"
    return f"{count:.0f}"


def _arrange(layout: Layout, rows: Sequence[Row], content: Content) -> Grid:
    return (_pivoted if layout.pivot else _straight)(layout, rows, content)


def _straight(layout: Layout, rows: Sequence[Row], content: Content) -> Grid:
    """Rows are methods, columns are tasks."""
    group = layout.group
    headings = [("", {"rank": "Rank", "k": "K"}[group])] if group else []
    headings += [("", "Method")] + ([("", "# Params")] if layout.parameters else [])
    texts = len(headings)
    headings += [(column.title, column.heading) for column in layout.columns]
    headings += [("ALL", "Avg")] if layout.average else []
    body: list[tuple[str | Entry, ...]] = []
    rules, before = set(), None
    for index, row in enumerate(rows):
        line: list[str | Entry] = []
        if group:
            value = getattr(row, group)
            line.append(str(value) if value != before else "")
            if index and value != before:
                rules.add(index)
            before = value
        line.append(LABELS.get(row.method, row.method) if group == "k" else row.label)
        line += [content.parameters(row)] if layout.parameters else []
        line += [content.cell(row, column.task) for column in layout.columns]
        line += [content.average(row)] if layout.average else []
        body.append(tuple(line))
    return Grid(tuple(headings), tuple(body), frozenset(rules), texts)


def _pivoted(layout: Layout, rows: Sequence[Row], content: Content) -> Grid:
    """Rows are methods, with one line of scores and one of parameters. Columns are ranks, grouped by task."""
    ranks = sorted({row.rank for row in rows if row.rank is not None})
    methods = dict.fromkeys((row.method, row.k) for row in rows)
    headings = [("", "Method"), ("", "")] + [(column.title, f"r={rank}") for column in layout.columns for rank in ranks]
    body: list[tuple[str | Entry, ...]] = []
    rules = set()
    for method, k in methods:
        places = [(Row(method, rank, k), column) for column in layout.columns for rank in ranks]
        if body:
            rules.add(len(body))
        figures = [content.cell(row, column.task) if row in rows else Entry("") for row, column in places]
        counts = [content.parameters(row) if row in rows else "" for row, _ in places]
        body.append((Row(method, None, k).label, layout.columns[0].heading, *figures))
        body.append(("", "# Params", *counts))
    return Grid(tuple(headings), tuple(body), frozenset(rules), 2)


def _entry(cell: Cell, layout: Layout) -> Entry:
    if not cell.summaries:
        return Entry("", diverged=cell.diverged)
    digits = decimals(layout)
    spreads = [summary.std for summary in cell.summaries]
    return Entry(
        mean="/".join(f"{summary.mean:.{digits}f}" for summary in cell.summaries),
        std="" if None in spreads else "/".join(f"{spread:.{digits}f}" for spread in spreads),
        n=cell.summaries[0].n,
        mark=cell.mark,
        diverged=cell.diverged,
    )


def _with_difference(paper: Sequence[float], ours: Sequence[float], digits: int) -> str:
    figures = "/".join(f"{value:.{digits}f}" for value in paper)
    if not ours:
        return f"{figures} (–)"
    gaps = "/".join(f"{own - value:+.{digits}f}" for own, value in zip(ours, paper, strict=True))
    return f"{figures} ({gaps.replace('-', MINUS)})"


def with_ends(summary: Summary, digits: int, *, signed: bool) -> str:
    """Write a mean and the ends of its interval, if it has one: `+1.2 [+0.4, +2.0]`."""
    sign = "+" if signed else ""
    ends = [summary.mean] if summary.low is None or summary.high is None else [summary.mean, summary.low, summary.high]
    mean, *rest = [f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", MINUS) for value in ends]
    return f"{mean} [{', '.join(rest)}]" if rest else mean
