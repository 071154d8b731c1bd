"""Tables as files: Markdown, LaTeX with booktabs, CSV in the paper's units, and a CSV file with one line per run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wlora.analysis.statistics import Summary
from wlora.analysis.study import Run
from wlora.analysis.tables.cells import Table, decimals
from wlora.analysis.tables.comparisons import Answer
from wlora.analysis.tables.grid import Entry, Grid
from wlora.analysis.tables.layouts import Row
from wlora.analysis.tables.paper import PrintedRow, column_name

DASH = "–"
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "≥": r"$\geq$",
    "[": r"{[}",  # at the start of a line, LaTeX would read it as an option of the command before
    "−": r"$-$",
    "–": "--",
    "×": r"$\times$",
    "†": r"$\dagger$",
    "ω": r"$\omega$",
}


def to_markdown(grid: Grid) -> str:
    """Convert a grid to a Markdown table. The best score is bold, the second-best underlined."""
    headings = [_markdown(" ".join(filter(None, pair))) for pair in grid.headings]
    lines = [headings, ["---"] * grid.texts + ["---:"] * (len(headings) - grid.texts)]
    lines += [[_markdown(cell) for cell in line] for line in grid.body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown(cell: str | Entry) -> str:
    if isinstance(cell, str):
        return cell.replace("|", "\\|")
    if not cell.mean:
        return f"diverged ({cell.diverged})" if cell.diverged else DASH
    text = f"{cell.mean} ± {cell.std}" if cell.std else cell.mean
    text = {"best": f"**{text}**", "second": f"<u>{text}</u>"}.get(cell.mark, text)
    return text + (f" ({cell.n})" if cell.n else "") + ("†" if cell.diverged else "")


def to_latex(grid: Grid, *, caption: str, label: str, notes: Sequence[str] = ()) -> str:
    """Convert a grid to a LaTeX `table*` environment, which needs booktabs and graphicx."""
    columns = "l" * grid.texts + "r" * (len(grid.headings) - grid.texts)
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        r"\begin{table*}[t]",
        r"\centering",
        r"\setlength{\belowcaptionskip}{6pt}",
        rf"\caption{{{escape(caption)}}}",
        rf"\label{{{label}}}",
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        *_latex_headings(grid),
        r"\midrule",
    ]
    for index, line in enumerate(grid.body):
        lines += [r"\midrule"] if index in grid.rules else []
        lines.append(" & ".join(_latex(cell) for cell in line) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if notes:
        lines += ["", rf"\smallskip\parbox{{\textwidth}}{{\footnotesize {' '.join(escape(note) for note in notes)}}}"]
    return "\n".join([*lines, r"\end{table*}", ""])


def _latex_headings(grid: Grid) -> list[str]:
    """Return two lines of headings. Neighbouring columns with the same upper heading share one cell."""
    upper = [pair[0] for pair in grid.headings]
    spans: list[tuple[str, int, int]] = []
    for index, text in enumerate(upper):
        if spans and text and spans[-1][0] == text:
            spans[-1] = (text, spans[-1][1], index)
        else:
            spans.append((text, index, index))
    lines = []
    if any(upper):
        words = [rf"\multicolumn{{{b - a + 1}}}{{c}}{{{escape(text)}}}" if text else "" for text, a, b in spans]
        lines.append(" & ".join(words) + r" \\")
        lines += [rf"\cmidrule(lr){{{a + 1}-{b + 1}}}" for text, a, b in spans if text and b > a]
    return [*lines, " & ".join(escape(lower) for _, lower in grid.headings) + r" \\"]


def _latex(cell: str | Entry) -> str:
    if isinstance(cell, str):
        return escape(cell)
    if not cell.mean:
        return f"diverged ({cell.diverged})" if cell.diverged else "--"
    commands = {"best": r"\textbf{%s}", "second": r"\underline{%s}"}
    small = (rf"$\pm${cell.std} " if cell.std else "") + (f"({cell.n})" if cell.n else "")
    small += r"$^\dagger$" if cell.diverged else ""
    return commands.get(cell.mark, "%s") % cell.mean + (rf" {{\scriptsize {small.strip()}}}" if small else "")


def escape(text: str) -> str:
    """Escape text for LaTeX."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def to_csv(table: Table) -> str:
    """Return a table as CSV, one line per row, with the units and column names of `results/paper`.

    Every score has the further columns `_std`, `_low` and `_high` (95 % bootstrap interval), `_best` and `_best_std` (score
    at the best evaluation of each run). ALL is the average of the displayed scores. Every task has the further columns
    `_runs`, `_diverged`, `_missing`, `_lr`, `_warmup`, `_compared` (number of compared points) and `_mark`.
    """
    lines: list[dict[str, Any]] = []
    for row in table.rows:
        line: dict[str, Any] = {"method": row.method, "rank": row.rank, "k": row.k, "label": row.label}
        counts = table.parameters.get(row)
        line |= {
            "parameters": round(counts.final) if counts else None,
            "parameters_initial": round(counts.initial) if counts else None,
            "model_parameters": round(counts.total) if counts else None,
        }
        for column in table.layout.columns:
            cell = table.cells[row, column.task]
            for index, metric in enumerate(column.metrics):
                summary = cell.last[index] if cell.last else None
                name, digits = column_name(column, metric), decimals(table.layout)
                line |= _summary_columns(name, summary, digits)
                best = _summary_columns(f"{name}_best", cell.best[index] if cell.best else None, digits)
                line |= {key: best[key] for key in (f"{name}_best", f"{name}_best_std")}
            point = cell.choice.point.columns() if cell.choice else {"lr": None, "warmup": None}
            line |= {
                f"{column.task}_runs": len(cell.runs),
                f"{column.task}_diverged": cell.diverged,
                f"{column.task}_missing": cell.missing,
                **{f"{column.task}_{key}": value for key, value in point.items()},
                f"{column.task}_compared": cell.choice.compared if cell.choice else None,
                f"{column.task}_mark": cell.mark,
            }
        if table.layout.average:
            mean = table.averages.get(row)
            name = "all" if table.score == "last" else "all_best"
            line |= _summary_columns(name, mean.summaries[0] if mean else None, decimals(table.layout))
            line |= {"all_runs": mean.summaries[0].n if mean else None, "all_mark": mean.mark if mean else ""}
        lines.append(line)
    return write_csv(lines)


def _summary_columns(name: str, summary: Summary | None, digits: int) -> dict[str, Any]:
    found = (summary.mean, summary.std, summary.low, summary.high) if summary else (None,) * 4
    names = (name, f"{name}_std", f"{name}_low", f"{name}_high")
    # Two more digits than printed, so that differences of values remain precise.
    return {key: None if value is None else f"{value:.{digits + 2}f}" for key, value in zip(names, found, strict=True)}


def comparisons_csv(answers: Sequence[Answer]) -> str:
    """Return comparisons as CSV, one per line, in the table's units."""
    lines = []
    for answer in answers:
        found = answer.comparison
        line: dict[str, Any] = {"a": answer.a.label, "b": answer.b.label, "rank": answer.a.rank, "k": answer.a.k}
        line |= _summary_columns("difference", found.difference, 4)
        line |= _summary_columns("probability", found.probability, 4)
        del line["difference_std"], line["probability_std"]
        lines.append({**line, "tasks": found.tasks, "pairs": found.pairs, "paired": found.paired})
    return write_csv(lines)


def companion_csv(table: Table, printed: Mapping[Row, PrintedRow]) -> str:
    """Return the paper's scores and ours as CSV, one per line, in the table's units; `difference` is ours - paper's."""
    lines = []
    for row, line in printed.items():
        ours: dict[str, float] = {}
        for column in table.layout.columns if row in table.rows else ():
            means = [summary.mean for summary in table.cells[row, column.task].summaries]
            ours |= dict(zip((column_name(column, metric) for metric in column.metrics), means, strict=False))
        paper = dict(line.values)
        if line.average is not None:
            paper["all"] = line.average
            if row in table.averages and table.complete:
                ours["all"] = table.averages[row].summaries[0].mean
        for name, figure in paper.items():
            own = ours.get(name)
            difference = None if own is None else f"{own - figure:.6f}"
            found = {"method": row.method, "rank": row.rank, "k": row.k, "figure": name, "paper": figure}
            lines.append({**found, "ours": None if own is None else f"{own:.6f}", "difference": difference})
    return write_csv(lines)


def runs_csv(runs: Sequence[Run]) -> str:
    """Return all runs of a study as CSV, one line per run of any status, for analysis with other tools."""
    settings: dict[int, dict[str, Any]] = {}  # runs of one setting share these columns, which are most of a line
    lines = []
    for run in runs:
        columns = {key: value for key, value in run.setting.items() if not isinstance(value, list)}
        lines.append((_own_columns(run), settings.setdefault(id(run.setting), columns)))
    names = dict.fromkeys(name for line in lines for part in line for name in part)
    return _csv(names, ([own[name] if name in own else shared.get(name) for name in names] for own, shared in lines))


def _own_columns(run: Run) -> dict[str, Any]:
    record = run.record
    line: dict[str, Any] = {"run_id": record.run_id, "status": record.status, "task": run.task, "model": run.model}
    line |= {"method": run.method, "rank": run.rank, "k": run.k, "seed": run.seed}
    line |= run.point.columns()
    line |= {"primary_metric": record.primary_metric} | record.metrics
    for part in ("parameters", "steps", "seconds", "throughput", "memory"):
        line |= {f"{part}_{key}": value for key, value in getattr(record, part).items()}
    line |= {"train_rows": record.task.get("train_rows"), "adapters_kept": len(record.adapters)}
    return line | {key: record.environment.get(key) for key in ("git_commit", "git_dirty", "device", "processor")}


def write_csv(lines: Sequence[dict[str, Any]]) -> str:
    """Return lines as CSV, with a column for every key that occurs in any line."""
    names = dict.fromkeys(name for line in lines for name in line)
    return _csv(names, ([line.get(name) for name in names] for line in lines))


def _csv(names: Iterable[str], lines: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(lines)
    return out.getvalue()
