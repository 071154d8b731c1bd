"""Entry point: `python -m wlora.tables 1 results_dir=results model=deberta_v3_base`. Never imports torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from wlora.config import config_folder
from wlora.console import protect_output
from wlora.errors import ConfigError, unknown_name, wrong_value
from wlora.staging import staged
from wlora.study import Run, read_runs, read_words, select
from wlora.tables.caption import caption, machines, notes
from wlora.tables.cells import Table, fill
from wlora.tables.comparisons import compare_rows
from wlora.tables.grid import draw, draw_companion, draw_comparisons
from wlora.tables.layouts import LAYOUTS, Layout
from wlora.tables.paper import paper_table, read_printed, unexplained_averages
from wlora.tables.summary import draw_summary, summarize_study
from wlora.tables.writing import companion_csv, comparisons_csv, runs_csv, to_csv, to_latex, to_markdown, write_csv

USAGE = """\
usage: python -m wlora.tables 1|2|3|4|5|6|all|demo|summary [key=value ...]

Reads the records of one study and writes, to <results_dir>/tables, tableN.csv, .md and .tex; tableN_paper.* (the paper's
figures and the differences), tableN_comparisons.* (WLoRA against RLoRA and LoRA), and runs.csv (one line per run).
summary.* has a line per task and setting, of runs that fit no table of the paper, too: score, parameters, seconds, memory.

  results_dir=results     the study; results/paper sets the paper's own figures
  model=NAME              whose runs; default: the paper's model of each table
  seeds=N                 runs expected per cell; default: the paper's 5, on another model as many as the fullest cell has
  bootstrap_seed=0        seed of the intervals
  task=..  method=..      the columns and rows to keep, as in task=sst2,mrpc
  key=value,value         any other key of a run's configuration keeps the runs that have one of the values:
                          compat=paper  train.max_steps=512"""


def main(words: Sequence[str] | None = None) -> None:
    """Write the tables asked for; exits with 0, or 2 after a mistake in the request."""
    protect_output()
    words = sys.argv[1:] if words is None else words
    if not words or {"-h", "--help"} & set(words):
        print(USAGE)
        sys.exit(0 if words else 2)
    try:
        _write(words)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _write(words: Sequence[str]) -> None:
    defaults = {"results_dir": "results", "model": None, "seeds": None, "bootstrap_seed": "0"}
    names, options, filters = read_words(words, defaults)
    layouts = [] if names == ["summary"] else _layouts(names)
    seeds, bootstrap_seed = _integer("seeds", options["seeds"], 1), _integer("bootstrap_seed", options["bootstrap_seed"], 0)
    results = Path(options["results_dir"] or "results")
    if (results / "table1.csv").is_file() and not (results / "records").is_dir():
        for layout in layouts:
            _write_paper(layout, results)
        return
    everything = read_runs(results)
    _check_model(options["model"], everything)
    runs = select(everything, filters)
    if not layouts:
        # `single` is one adapter per run, for Figure 2.
        ours = [run for run in runs if options["model"] in (None, run.model) and run.method != "single"]
        _write_summary(ours, results / "tables", bootstrap_seed or 0)
        return
    for layout in _restrict(layouts, filters):
        model = options["model"] or layout.model
        table = fill(layout, runs, model=model, seeds=seeds, bootstrap_seed=bootstrap_seed or 0)
        _write_table(table, results / "tables", bootstrap_seed or 0, shown=len(layouts) == 1)
    _save(results / "tables" / "runs.csv", runs_csv(everything))


def _layouts(names: Sequence[str]) -> list[Layout]:
    if len(names) != 1:
        raise ConfigError(f"tables={' '.join(names) or 'none'}: allowed is one of {', '.join(LAYOUTS)}, all, summary")
    if names[0] == "all":
        return [layout for name, layout in LAYOUTS.items() if name != "demo"]
    if names[0] not in LAYOUTS:
        raise unknown_name(f"table {names[0]}", names[0], [*LAYOUTS, "all", "summary"])
    return [LAYOUTS[names[0]]]


def _restrict(layouts: Sequence[Layout], filters: dict[str, str]) -> list[Layout]:
    """Leave the columns of `task=...` and the rows of `method=...`, and the tables that have any of them."""
    tasks, methods = (filters[key].split(",") if key in filters else None for key in ("task", "method"))
    found = []
    for layout in layouts:
        columns = tuple(column for column in layout.columns if tasks is None or column.task in tasks)
        rows = tuple(row for row in layout.rows if methods is None or row.method in methods)
        if columns:
            found.append(replace(layout, columns=columns, rows=rows))
    if not found:
        raise wrong_value("task", filters["task"], f"a task of table {layouts[0].name}: {_tasks(layouts)}")
    return found


def _tasks(layouts: Sequence[Layout]) -> str:
    return ", ".join(dict.fromkeys(column.task for layout in layouts for column in layout.columns))


def _integer(key: str, text: str | None, least: int) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < least:
        raise wrong_value(key, text, f"int >= {least}")
    return int(text)


def _check_model(model: str | None, runs: Sequence[Run]) -> None:
    """Refuse the name of a model that neither a record nor a configuration has."""
    known = {run.model for run in runs} | {file.stem for file in (config_folder() / "model").glob("*.yaml")}
    if model is not None and model not in known:
        raise unknown_name(f"model={model}", model, known)


def _write_table(table: Table, folder: Path, bootstrap_seed: int, *, shown: bool) -> None:
    """Write one table with its companions; print it, or (of several) a line about it."""
    layout = table.layout
    name, title = f"table{layout.name}", f"Table {layout.name}"
    grid, said, below = draw(table), caption(table), notes(table)
    text = to_markdown(grid)
    page = [f"# {title}", said, text, *below]
    _save(folder / f"{name}.csv", to_csv(table))
    _save(folder / f"{name}.tex", to_latex(grid, caption=said, label=f"tab:{name}", notes=below))
    printed = read_printed(layout)
    if printed:
        beside = draw_companion(table, printed)
        about = f"The paper's {title}, and in brackets ours minus the paper's. {_model_note(table)}{layout.remark}".strip()
        page += [f"## {title} in the paper", about, to_markdown(beside), *_row_notes(layout)]
        _save(folder / f"{name}_paper.csv", companion_csv(table, printed))
        _save(folder / f"{name}_paper.tex", to_latex(beside, caption=about, label=f"tab:{name}-paper"))
    answers = compare_rows(table, bootstrap_seed=bootstrap_seed)
    about = (
        f"Comparisons within {title}: mean difference and probability of improvement over tasks and seeds, with 95 % "
        f"bootstrap intervals (seeds drawn within each task; bootstrap_seed={bootstrap_seed}). With few seeds they "
        "are too narrow; one without width only says that all pairs of every task agree."
    )
    if answers:
        compared = draw_comparisons(answers, layout)
        page += ["## Comparisons", about, to_markdown(compared)]
        _save(folder / f"{name}_comparisons.csv", comparisons_csv(answers))
        _save(folder / f"{name}_comparisons.tex", to_latex(compared, caption=about, label=f"tab:{name}-comparisons"))
    _save(folder / f"{name}.md", "\n\n".join(part.strip() for part in page) + "\n")
    if shown:
        print("\n\n".join([said, text.strip(), *below]) + "\n")
    missing, full = sum(cell.missing for cell in table.cells.values()), sum(bool(c.runs) for c in table.cells.values())
    print(f"{folder / name}.md: {full} of {len(table.cells)} cells, {missing} runs missing", flush=True)


def _write_summary(runs: Sequence[Run], folder: Path, bootstrap_seed: int) -> None:
    """Write and print a line per task and setting."""
    lines = summarize_study(runs, bootstrap_seed=bootstrap_seed)
    grid, models = draw_summary(lines), ", ".join(sorted({run.model for run in runs}))
    said = f"{models}: dev sets, after the last step. Mean ± standard deviation of the primary metric over seeds (runs)."
    below = machines(runs)
    page = "\n\n".join([said, to_markdown(grid).strip(), *below])
    _save(folder / "summary.csv", write_csv(lines))
    _save(folder / "summary.tex", to_latex(grid, caption=said, label="tab:summary", notes=below))
    _save(folder / "summary.md", f"# Summary\n\n{page}\n")
    print(page)


def _model_note(table: Table) -> str:
    if table.model == table.layout.model:
        return ""
    return f"The paper's model is {table.layout.model}, these runs' is {table.model}: differences are mostly the models'. "


def _row_notes(layout: Layout) -> list[str]:
    """List the notes on the paper's rows, and the averages that do not follow from their cells."""
    found: dict[str, list[str]] = {}
    for row, line in read_printed(layout).items():
        if line.note:
            found.setdefault(line.note, []).append(row.label if row.rank is None else f"{row.label} (r={row.rank})")
    listed = [f"- {', '.join(dict.fromkeys(rows))}: {note}." for note, rows in found.items()]
    listed += [f"- {line}." for line in unexplained_averages(layout)]
    return ["\n".join(listed)] if listed else []


def _write_paper(layout: Layout, folder: Path) -> None:
    """Set the paper's own figures, with ALL computed anew, and list the averages that do not follow."""
    printed = read_printed(layout, folder)
    if not printed:
        raise ConfigError(f"results_dir={folder}: no table{layout.name}.csv there")
    table, wrong = paper_table(layout, folder), unexplained_averages(layout, folder)
    grid, file = draw(table, printed), folder / "tables" / f"table{layout.name}"
    said = f"{layout.title}. {layout.model}, the paper's figures" + ("; ALL is computed." if layout.average else ".")
    page = [f"# Table {layout.name}", said, to_markdown(grid), "\n".join(f"- {line}" for line in wrong)]
    _save(file.with_suffix(".md"), "\n\n".join(part.strip() for part in page if part) + "\n")
    _save(file.with_suffix(".csv"), to_csv(table))
    _save(file.with_suffix(".tex"), to_latex(grid, caption=said, label=f"tab:table{layout.name}-paper"))
    held = len(table.averages) - len(wrong)
    about = f"ALL follows from the cells in {held} of {len(table.averages)} rows" if table.averages else "no column ALL"
    print("\n".join([f"table {layout.name}: {about}", *(f"  {line}" for line in wrong)]))


def _save(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    try:
        with staged(file) as staging:
            staging.write_text(text, encoding="utf-8")
            os.replace(staging, file)
    except OSError as error:
        raise ConfigError(f"results_dir: {file} cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    main()
