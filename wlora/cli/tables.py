"""Entry point: `python -m wlora.tables 1 results_dir=results model=deberta_v3_base`. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wlora.analysis.examples import Predictions
from wlora.analysis.study import Run, read_words, select
from wlora.analysis.study_reader import read_runs
from wlora.analysis.tables.best import read_best
from wlora.analysis.tables.caption import EVALUATION, caption, machines, notes
from wlora.analysis.tables.cells import NOT_COMPARED, Best, Score, Table, belongs, fill
from wlora.analysis.tables.claims import TESTED, check_claims
from wlora.analysis.tables.claims_text import claim_parts
from wlora.analysis.tables.comparisons import compare_rows
from wlora.analysis.tables.grid import draw, draw_companion, draw_comparisons
from wlora.analysis.tables.layouts import LAYOUTS, Layout
from wlora.analysis.tables.paper import paper_table, read_printed, unexplained_averages
from wlora.analysis.tables.summary import caption_summary, draw_summary, summarize_study
from wlora.analysis.tables.writing import companion_csv, comparisons_csv, runs_csv, to_csv, to_latex, to_markdown, write_csv
from wlora.cli.entry import serve
from wlora.config.schema import config_folder
from wlora.config.spelling import expand_home
from wlora.errors import ConfigError, unknown_name, wrong_value
from wlora.storage.atomic_write import check_folders, write_whole
from wlora.storage.records import RecordStore

USAGE = """\
usage: python -m wlora.tables 1|2|3|4|5|6|all|demo|claims|summary [key=value ...]

Reads the records of one study and writes to <results_dir>/tables: tableN.csv, .md and .tex; tableN_paper.* (the paper's
numbers and our differences from them); tableN_comparisons.* (WLoRA against RLoRA and LoRA); runs.csv (one line per run).
summary.* has one line per task and setting: score, parameters, seconds, memory. It includes runs that fit no table of the
paper. `all` also writes the summary if some runs fit no table, and only the summary if no run fits one. Runs on your own
data with a benchmark's name are listed as NAME_own, never in the benchmark's column.
claims.* tells for each claim of the paper whether it holds on these runs, does not hold, or is undecided: per task and over
tasks, with intervals and tests, over the examples of the dev sets, and with one learning rate for both methods.

  results_dir=results     folder of the study; results/paper prints the paper's own numbers
  model=NAME              only runs of this model; default for each table: the paper's model if it has runs, else the model
                          with most runs
  score=last|best         scores after the last step, or at the best evaluation of each run on the dev set; the CSV has both
  seeds=N                 expected runs per cell; default: 5 as in the paper; for another model, the largest number in a cell
  bootstrap_seed=0        random seed of the bootstrap intervals
  task=..  method=..      only these columns and rows, for example task=sst2,mrpc
  key=value,value         only runs with one of these values, for any other key of the configuration:
                          compat=paper  train.max_steps=512"""


def main(words: Sequence[str] | None = None, runs: Sequence[Run] | None = None) -> None:
    """Write the requested tables. Exit codes: 0 success, 2 wrong request.

    Args:
        words: the arguments; None for those of the command line.
        runs: all runs of the study, if they have been read already.
    """
    serve(lambda given: _write(given, runs), USAGE, words)


@dataclass(frozen=True)
class Request:
    """Options of a tables command.

    Attributes:
        folder: output folder.
        model: name of the model; None for the default.
        score: `last` or `best`.
        seeds: expected runs per cell; None for the default.
        bootstrap_seed: random seed of the intervals.
        best: metrics of the runs at their best evaluation.
    """

    folder: Path
    model: str | None
    score: Score
    seeds: int | None
    bootstrap_seed: int
    best: Best


def _write(words: Sequence[str], known: Sequence[Run] | None) -> None:
    defaults = {"results_dir": "results", "model": None, "seeds": None, "bootstrap_seed": "0", "score": "last"}
    names, options, filters = read_words(words, defaults)
    layouts = [] if names == ["summary"] else _layouts(["all"] if names == ["claims"] else names)
    seeds, bootstrap_seed = _integer("seeds", options["seeds"], 1), _integer("bootstrap_seed", options["bootstrap_seed"], 0)
    score = read_score(options["score"])
    results = Path(expand_home("results_dir", options["results_dir"] or "results"))
    check_folders(results, "tables")
    if os.path.isfile(results / "table1.csv") and not os.path.isdir(results / "records"):
        for layout in layouts:
            _write_paper(layout, results)
        return
    everything = read_runs(results) if known is None else known
    check_model(options["model"], everything)
    # Methods in NOT_COMPARED, such as `single` (one adapter per run, for Figure 2), belong in no table.
    runs = [run for run in select(everything, filters) if run.method not in NOT_COMPARED]
    mine = [run for run in runs if options["model"] in (None, run.model)]
    request = Request(results / "tables", options["model"], score, seeds, bootstrap_seed or 0, read_best(results, mine))
    if not layouts:
        _write_summary(mine, request, shown=True)
        return
    if names == ["claims"]:
        _write_claims(_restrict([LAYOUTS[name] for name in TESTED], filters), runs, request)
        return
    done = [run for run in mine if run.status == "success"]
    left = [run for run in done if not any(belongs(run, layout) for layout in layouts)]
    alone = len(layouts) > 1 and bool(left) and len(left) == len(done)
    if alone:
        print("these runs fit no table of the paper; summary:")
    else:
        for layout in _restrict(layouts, filters):
            _write_table(layout, runs, request, shown=len(layouts) == 1)
    if left and len(layouts) > 1:
        _write_summary(mine, request, shown=alone)
    elif left:
        print(f"{_where(left)} not in table {layouts[0].name}; python -m wlora.tables summary shows all runs")
    _save(results / "tables" / "runs.csv", runs_csv(everything))


def _where(runs: Sequence[Run]) -> str:
    tasks = sorted({run.task for run in runs})
    return f"{len(runs)} runs on {', '.join(tasks)} are"


def read_score(text: str | None) -> Score:
    """Read the option `score`; ConfigError for a wrong value."""
    if text == "best":
        return "best"
    if text != "last":
        raise wrong_value("score", text, "last | best")
    return "last"


def _layouts(names: Sequence[str]) -> list[Layout]:
    if len(names) != 1:
        raise ConfigError(
            f"tables={' '.join(names) or 'none'}: allowed is one of {', '.join(LAYOUTS)}, all, claims, summary"
        )
    if names[0] == "all":
        return [layout for name, layout in LAYOUTS.items() if name != "demo"]
    if names[0] not in LAYOUTS:
        raise unknown_name(f"table {names[0]}", names[0], [*LAYOUTS, "all", "claims", "summary"])
    return [LAYOUTS[names[0]]]


def _restrict(layouts: Sequence[Layout], filters: dict[str, str]) -> list[Layout]:
    """Keep the columns of `task=...` and the rows of `method=...`, and drop tables without remaining columns."""
    tasks, methods = (filters[key].split(",") if key in filters else None for key in ("task", "method"))
    found = []
    for layout in layouts:
        columns, stand_ins = (
            tuple(column for column in some if tasks is None or column.task in tasks)
            for some in (layout.columns, layout.stand_ins)
        )
        rows = tuple(row for row in layout.rows if methods is None or row.method in methods)
        if columns or stand_ins:
            found.append(replace(layout, columns=columns, stand_ins=stand_ins, rows=rows))
    if not found:
        raise wrong_value("task", filters["task"], f"a task of table {layouts[0].name}: {_tasks(layouts)}")
    return found


def _tasks(layouts: Sequence[Layout]) -> str:
    return ", ".join(dict.fromkeys(column.task for layout in layouts for column in (*layout.columns, *layout.stand_ins)))


def _integer(key: str, text: str | None, least: int) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < least:
        raise wrong_value(key, text, f"int >= {least}")
    return int(text)


def check_model(model: str | None, runs: Sequence[Run]) -> None:
    """Reject a model name that is in no record and no configuration file; ConfigError with a similar one."""
    known = {run.model for run in runs} | {file.stem for file in (config_folder() / "model").glob("*.yaml")}
    if model is not None and model not in known:
        raise unknown_name(f"model={model}", model, known)


def _write_table(layout: Layout, runs: Sequence[Run], request: Request, *, shown: bool) -> None:
    """Write one table and its companion files. Print the table if `shown`, and always one line about it."""
    table, folder, bootstrap_seed = _fill(layout, runs, request), request.folder, request.bootstrap_seed
    name, title = f"table{layout.name}", f"Table {layout.name}"
    grid, said, below = draw(table), caption(table), notes(table)
    text = to_markdown(grid)
    page = [f"# {title}", said, text, *below]
    _save(folder / f"{name}.csv", to_csv(table))
    _save(folder / f"{name}.tex", to_latex(grid, caption=said, label=f"tab:{name}", notes=below))
    printed = read_printed(layout)
    if printed and layout.columns:  # none if only a task was asked for that stands in for the paper's
        beside = draw_companion(table, layout, printed)
        about = f"The paper's {title}, and in brackets ours minus the paper's. {_model_note(table)}{layout.remark}".strip()
        page += [f"## {title} in the paper", about, to_markdown(beside), *_row_notes(layout)]
        _save(folder / f"{name}_paper.csv", companion_csv(table, printed))
        _save(folder / f"{name}_paper.tex", to_latex(beside, caption=about, label=f"tab:{name}-paper"))
    answers = compare_rows(table, bootstrap_seed=bootstrap_seed)
    about = (
        f"Comparisons within {title}: mean difference and probability of improvement over tasks and seeds, with 95 % "
        f"bootstrap intervals (seeds drawn for all tasks together; bootstrap_seed={bootstrap_seed}). With few seeds they "
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
    print(
        f"{folder / name}.md: {full} of {len(table.cells)} cells, {missing} runs missing (model={table.model})", flush=True
    )


def _fill(layout: Layout, runs: Sequence[Run], request: Request) -> Table:
    options: dict[str, Any] = {"seeds": request.seeds, "best": request.best, "score": request.score}
    return fill(layout, runs, model=request.model, bootstrap_seed=request.bootstrap_seed, **options)


def _write_claims(layouts: Sequence[Layout], runs: Sequence[Run], request: Request) -> None:
    """Test the paper's claims on every table that has runs. Write the results and print the verdicts."""
    tables: dict[str, Table] = {}
    for layout in layouts:
        table = _fill(layout, runs, request)
        if table.runs() and not table.repeats(tables.values()):
            tables[layout.name] = table
    findings = check_claims(tables.values(), bootstrap_seed=request.bootstrap_seed)
    parts = claim_parts(findings, tables, Predictions(RecordStore(request.folder.parent)), request.bootstrap_seed)
    if not parts:
        raise ConfigError("claims: no two methods of a claim have runs on a common task")
    said = f"{', '.join(sorted({table.model for table in tables.values()}))}: dev sets, {EVALUATION[request.score]}."
    page = [f"# Claims\n\n{said}"]
    for part in parts:
        _save(request.folder / f"{part.name}.csv", write_csv(part.lines))
        _save(request.folder / f"{part.name}.tex", to_latex(part.grid, caption=part.about, label=f"tab:{part.name}"))
        page += [f"## {part.title}\n\n{part.about}\n\n{to_markdown(part.grid)}".strip()]
    _save(request.folder / "claims.md", "\n\n".join(page) + "\n")
    print(f"{said}\n\n{to_markdown(parts[0].grid)}\n{request.folder / 'claims.md'}: {len(parts)} tables")


def _write_summary(runs: Sequence[Run], request: Request, *, shown: bool) -> None:
    """Write the summary, one line per task and setting. Print it if `shown`, otherwise one line about it."""
    lines = summarize_study(runs, bootstrap_seed=request.bootstrap_seed, best=request.best)
    grid, said, below = draw_summary(lines, request.score), caption_summary(runs, request.score), machines(runs)
    page = "\n\n".join([said, to_markdown(grid).strip(), *below])
    _save(request.folder / "summary.csv", write_csv(lines))
    _save(request.folder / "summary.tex", to_latex(grid, caption=said, label="tab:summary", notes=below))
    _save(request.folder / "summary.md", f"# Summary\n\n{page}\n")
    print(page if shown else f"{request.folder / 'summary.md'}: {len(lines)} settings, also of runs that fit no table")


def _model_note(table: Table) -> str:
    if table.model == table.layout.model:
        return ""
    return f"The paper's model is {table.layout.model}, these runs' is {table.model}: differences are mostly the models'. "


def _row_notes(layout: Layout) -> list[str]:
    """List the notes on the paper's rows, and the printed averages that differ from the mean of their cells."""
    found: dict[str, list[str]] = {}
    for row, line in read_printed(layout).items():
        if line.note:
            found.setdefault(line.note, []).append(row.label if row.rank is None else f"{row.label} (r={row.rank})")
    listed = [f"- {', '.join(dict.fromkeys(rows))}: {note}." for note, rows in found.items()]
    listed += [f"- {line}." for line in unexplained_averages(layout)]
    return ["\n".join(listed)] if listed else []


def _write_paper(layout: Layout, folder: Path) -> None:
    """Write a table of the paper's own numbers with recomputed ALL, and list printed averages that differ from it."""
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
    """Write a file atomically; ConfigError if it cannot be written."""
    try:
        write_whole(file, text.encode())
    except OSError as error:
        raise ConfigError(f"results_dir: {file} cannot be written ({error.strerror})") from error
