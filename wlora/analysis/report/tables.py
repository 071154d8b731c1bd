"""The tables of the report as HTML, after the last step and at the best evaluation of each run."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wlora.analysis.classes import summarize_classes
from wlora.analysis.examples import Predictions
from wlora.analysis.study import Run
from wlora.analysis.tables.caption import caption, machines, notes
from wlora.analysis.tables.cells import NOT_COMPARED, Best, Score, Table, fill
from wlora.analysis.tables.claims import LEVEL, TESTED, Finding, check_claims
from wlora.analysis.tables.claims_text import Part, claim_parts
from wlora.analysis.tables.comparisons import compare_rows
from wlora.analysis.tables.grid import Entry, Grid, draw, draw_companion, draw_comparisons
from wlora.analysis.tables.layouts import LAYOUTS
from wlora.analysis.tables.paper import read_printed
from wlora.analysis.tables.summary import caption_summary, draw_summary
from wlora.analysis.tables.writing import DASH
from wlora.errors import ConfigError


@dataclass(frozen=True)
class Filled:
    """The tables of a study for one kind of score.

    Attributes:
        score: which evaluation is scored.
        tables: the tables that have runs, by name.
        refused: the reasons why tables could not be filled, by name.
        findings: the tested claims.
        parts: the claims as tables.
    """

    score: Score
    tables: Mapping[str, Table]
    refused: Mapping[str, str]
    findings: Sequence[Finding]
    parts: Sequence[Part]


def fill_tables(runs: Sequence[Run], *, model: str | None, best: Best, score: Score, predictions: Predictions) -> Filled:
    """Fill every layout that has runs, and test the claims. A table that would mix settings is skipped with a reason."""
    tables: dict[str, Table] = {}
    refused: dict[str, str] = {}
    for name, layout in LAYOUTS.items():
        try:
            table = fill(layout, runs, model=model, best=best, score=score)
        except ConfigError as error:
            refused[name] = str(error)
            continue
        if table.runs() and not (name in TESTED and table.repeats(tables.values())):
            tables[name] = table
    tested = {name: table for name, table in tables.items() if name in TESTED}
    findings = check_claims(tested.values())
    return Filled(score, tables, refused, findings, claim_parts(findings, tested, predictions))


def page_of_tables(runs: Sequence[Run], filled: Filled, summary: Sequence[dict[str, Any]]) -> str:
    """Return all filled tables and the summary (`summarize_study`) as HTML."""
    parts = [_section(f"Table {name}: {table.layout.title}", _table(table)) for name, table in filled.tables.items()]
    parts += [
        _section(f"Table {name}: {LAYOUTS[name].title}", _note(f"Not made: {'; '.join(reason.splitlines())}."))
        for name, reason in filled.refused.items()
    ]
    shown = [run for run in runs if run.method not in NOT_COMPARED]
    if summary:
        body = [_caption(caption_summary(runs, filled.score)), to_html(draw_summary(summary, filled.score))]
        body += [_note(line) for line in machines(shown)]
        # If a study has the runs of a paper's table, that table is shown and the summary is folded.
        parts.append(_section("Summary: every task and setting", "\n".join(body), opened=not filled.tables))
    return "\n".join(parts)


def page_of_claims(filled: Filled) -> str:
    """Return the tested claims as folded HTML tables, or the reason why none was tested."""
    if not filled.parts:
        mixed = [f"Table {name} would mix settings" for name in filled.refused if name in TESTED]
        return _note(f"Not tested: {', '.join(mixed) or 'no two methods of a claim have runs on a common task'}.")
    return "\n".join(_section(part.title, _caption(part.about) + to_html(part.grid), opened=False) for part in filled.parts)


def page_of_classes(chosen: Mapping[tuple[str, str], Sequence[Run]]) -> str:
    """Return the scores of single classes and the confusion matrices (`summarize_classes`) as HTML, each folded."""
    found = summarize_classes(chosen)
    if not found:
        return _note("No run has recorded scores of single classes.")
    parts = []
    for scores in found:
        body = _plain(scores.head, scores.rows)
        if scores.confusion:
            lines = [[name, *map(str, counts)] for name, counts in zip(scores.names, scores.confusion, strict=True)]
            body += _caption("Rows of the dev set, summed over runs: true class by line, predicted class by column.")
            body += _plain(["true", *scores.names], lines)
        parts.append(_section(scores.title, body, opened=False))
    return "\n".join(parts)


def _plain(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return an HTML table whose first column is text."""
    headings = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in head)
    rows = ("".join(f"<td>{html.escape(value)}</td>" for value in line) for line in lines)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide" tabindex="0"><table><thead><tr>{headings}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def claims_data(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return the findings for the chart of intervals."""
    found = []
    for finding in findings:
        low, high = finding.found.interval(LEVEL) or (None, None)
        rank = "" if finding.a.rank is None else f", r={finding.a.rank}"
        found.append(
            {
                "claim": finding.claim.text,
                "kind": finding.claim.kind,
                "table": finding.table,
                "pair": f"{finding.a.label} vs {finding.b.label}{rank}",
                "task": finding.task,
                "tasks": len(finding.tasks),
                "mean": round(finding.found.mean, 4),
                "low": None if low is None else round(low, 4),
                "high": None if high is None else round(high, 4),
                "p": finding.p,
                "pairs": sum(finding.found.pairs),
                "probability": round(finding.probability.mean, 3),
                "share": finding.share,
                "verdict": finding.verdict,
                "turned": [f"{point.lr:g}" for point in finding.turned],
            }
        )
    return found


def _table(whole: Table) -> str:
    # Show only rows and columns with runs. Otherwise the table of a small study would consist mostly of dashes.
    columns = tuple(one for one in whole.layout.columns if any(whole.cells[row, one.task].runs for row in whole.rows))
    rows = tuple(row for row in whole.rows if any(cell.runs or cell.diverged for cell in whole.row_cells(row)))
    table = replace(whole, rows=rows, layout=replace(whole.layout, columns=columns))
    parts = [_caption(caption(table)), to_html(draw(table)), *(_note(line) for line in notes(table))]
    answers = compare_rows(table)
    if answers:
        compared = to_html(draw_comparisons(answers, table.layout))
        about = _caption("Mean difference and probability of improvement, with 95 % bootstrap intervals over seeds.")
        parts.append(_section("Comparisons", about + compared, opened=False, level="h4"))
    layout = LAYOUTS[table.layout.name]
    printed = read_printed(layout)
    if printed:
        said = f"The paper's figures with {layout.model}, and in brackets ours minus the paper's. {layout.remark}"
        beside = _caption(said) + to_html(draw_companion(table, layout, printed))
        parts.append(_section("In the paper", beside, opened=False, level="h4"))
    return "\n".join(parts)


def to_html(grid: Grid) -> str:
    """Convert a grid to an HTML table. The best score is bold, the second-best underlined."""
    classes = ["" if at < grid.texts else " class=n" for at in range(len(grid.headings))]
    headings = list(zip(classes, grid.headings, strict=True))
    upper = "".join(f"<th{kind}>{html.escape(first)}</th>" for kind, (first, _) in headings)
    lower = "".join(f'<th scope="col"{kind}>{html.escape(second)}</th>' for kind, (_, second) in headings)
    head = (f"<tr>{upper}</tr>" if any(first for first, _ in grid.headings) else "") + f"<tr>{lower}</tr>"
    lines = []
    for index, line in enumerate(grid.body):
        cells = "".join(f"<td{kind}>{_cell(cell)}</td>" for kind, cell in zip(classes, line, strict=True))
        lines.append(f"<tr{' class=rule' if index in grid.rules else ''}>{cells}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide" tabindex="0"><table><thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'


def _cell(cell: str | Entry) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    if not cell.mean:
        return f"diverged ({cell.diverged})" if cell.diverged else DASH
    small = (f" ± {cell.std}" if cell.std else "") + (f" ({cell.n})" if cell.n else "") + ("†" if cell.diverged else "")
    mean = {"best": "<strong>{}</strong>", "second": "<u>{}</u>"}.get(cell.mark, "{}").format(cell.mean)
    return f"{mean}<small>{small}</small>" if small else mean


def _section(title: str, body: str, *, opened: bool = True, level: str = "h3") -> str:
    state = " open" if opened else ""
    return f"<details{state}><summary><{level}>{html.escape(title)}</{level}></summary>\n{body}\n</details>"


def _caption(text: str) -> str:
    return f'<p class="caption">{html.escape(text)}</p>\n'


def _note(text: str) -> str:
    return f'<p class="caption">{html.escape(text)}</p>'
