"""Entry point: `python -m wlora.report results_dir=results/first_runs`, one HTML page of a study. Never imports torch.

The page is self-contained (tables, figures, environments and runs) and needs no network. The command also regenerates the
tables and figures in the folders of `python -m wlora.tables` and `python -m wlora.figures`.
"""

from __future__ import annotations

import base64
import contextlib
import html
import importlib.util
import io
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

from wlora.analysis.classes import summarize_classes
from wlora.analysis.study import Run, read_words, select
from wlora.analysis.study_reader import read_study
from wlora.analysis.tables.cells import NOT_COMPARED
from wlora.cli.entry import serve
from wlora.errors import ConfigError
from wlora.storage.atomic_write import check_folders, write_whole

USAGE = """\
usage: python -m wlora.report [key=value ...]

Writes <results_dir>/report.html: all tables and figures of one study, its environments, and its runs.

  results_dir=results     folder of the study
  model=NAME              only runs of this model; default: as for python -m wlora.tables and wlora.figures
  score=last|best         as for python -m wlora.tables
  key=value,value         as for python -m wlora.tables"""

# Replacements in the HTML rendered from the tables' Markdown. Any other HTML in the Markdown stays escaped.
_RENDERED = {"h2>": "h4>", "h1>": "h3>", "&lt;u&gt;": "<u>", "&lt;/u&gt;": "</u>"}
_RENDERED |= {"<table>": '<div class="wide"><table>', "</table>": "</table></div>"}

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --faint: #6b6b6b; --line: #d5d5d5; --shade: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #171717; --faint: #a0a0a0; --line: #3a3a3a; --shade: #222; }
}
body { margin: 0 auto; padding: 1rem; max-width: 80rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--ink); }
figure { margin: 1rem 0; } img { max-width: 100%; background: #fff; }
figcaption, .faint { color: var(--faint); font-size: .85rem; }
pre { background: var(--shade); padding: .6rem; overflow-x: auto; font-size: .85rem; }
nav a { margin-right: 1rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p>$summary</p>
$notices
<nav><a href="#tables">Tables</a><a href="#figures">Figures</a>$classes_link<a href="#environments">Environments</a>
<a href="#commands">Commands</a><a href="#runs">Runs</a></nav>
<h2 id="tables">Tables</h2>
$tables
<h2 id="figures">Figures</h2>
$figures
$classes
<h2 id="environments">Environments</h2>
$environments
<h2 id="commands">Commands</h2>
<pre>$commands</pre>
<h2 id="runs">Runs</h2>
$runs
</body>
</html>
""")


def main(words: Sequence[str] | None = None) -> None:
    """Write the report. Exit codes: 0 success, 2 wrong request or no records."""
    serve(lambda given: print(write(given)), USAGE, words, alone=True)


def write(words: Sequence[str]) -> Path:
    """Write the page of one study and return its path.

    Raises:
        ConfigError: there are no records, or the tables or figures command rejects the request.
    """
    names, options, filters = read_words(words, {"results_dir": "results", "model": None, "score": "last"})
    if names:
        raise ConfigError(f"report {' '.join(names)}: allowed is key=value")
    if importlib.util.find_spec("markdown_it") is None:
        raise ConfigError("the report needs markdown-it-py\nway out: pip install 'wlora[figures]'")
    results = Path(options["results_dir"] or "results")
    check_folders(results, "tables", "figures")
    everything, faults = read_study(results)
    runs = select(everything, filters)
    if not runs:
        raise ConfigError(f"results_dir={results}: no records to report")
    made, summarized = _commands(results, options, filters, runs)
    notices = [f"notice: {fault}; it is left out" for fault in faults]
    printed = ""
    for command in made:
        said, told = _run(command, everything)
        printed += said
        notices += told
    # Include only files written by these commands, not older files in the same folders.
    pages = [
        *re.findall(r"^(.+/table\w+\.md): ", printed, re.MULTILINE),
        *([results / "tables" / "summary.md"] * summarized),
    ]
    images = re.findall(r"^(.+?\.png)  ", printed, re.MULTILINE)
    for line in dict.fromkeys(notices):
        print(line, file=sys.stderr)
    commits = sorted({str(run.record.environment.get("git_commit"))[:10] for run in runs})
    page = PAGE.substitute(
        title=html.escape(f"wlora: {results.name}"),
        summary=html.escape(
            f"{len(runs)} runs of {len({run.method for run in runs})} methods on {len({run.task for run in runs})} tasks, "
            f"{', '.join(sorted({run.model for run in runs}))}; scores are on the dev sets. "
            f"Code: commit {', '.join(commits)}."
        ),
        notices="\n".join(f"<p>{html.escape(line)}</p>" for line in dict.fromkeys(notices)),
        tables="\n".join(_tables(map(Path, pages))),
        figures="\n".join([*_figures(map(Path, images)), _left_out(printed)]),
        classes_link='<a href="#classes">Classes</a>' if any(run.record.classes for run in runs) else "",
        classes="\n".join(_classes(runs)),
        environments=_table(*_environments(runs)),
        commands=html.escape("\n".join(shlex.join(["python", "-m", *command]) for command in made)),
        runs=_table(*_runs(runs)),
    )
    target = results / "report.html"
    try:
        write_whole(target, page.encode())
    except OSError as error:
        raise ConfigError(f"results_dir: {results} cannot be written ({error.strerror})") from error
    return target


def _commands(
    results: Path, options: dict[str, str | None], filters: dict[str, str], runs: Sequence[Run]
) -> tuple[list[list[str]], bool]:
    """Return the commands whose output the report contains, and whether the summary is one of them.

    The summary needs at least one successful run.
    """
    shared = [f"results_dir={results}", *(f"{key}={value}" for key, value in filters.items())]
    shared += [f"model={options['model']}"] if options["model"] else []
    scored = [] if options["score"] == "last" else [f"score={options['score']}"]
    shown = [run for run in runs if run.method not in NOT_COMPARED and options["model"] in (None, run.model)]
    summarized = any(run.status == "success" for run in shown)
    summary = [["wlora.tables", "summary", *shared, *scored]] if summarized else []
    return [["wlora.tables", "all", *shared, *scored], *summary, ["wlora.figures", "all", *shared]], summarized


def _run(command: list[str], runs: Sequence[Run]) -> tuple[str, list[str]]:
    """Run another entry point in this process; return its output and notices. Its errors are re-raised as ConfigError."""
    from wlora.cli import figures, tables

    entry = {"wlora.tables": tables.main, "wlora.figures": figures.main}[command[0]]
    said, wrong = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
            entry(command[1:], runs)
    except SystemExit as end:
        if end.code:
            lines = [line for line in wrong.getvalue().splitlines() if not line.startswith("notice: ")]
            raise ConfigError("\n".join(lines).removeprefix("error: ")) from None
    return said.getvalue(), [line for line in wrong.getvalue().splitlines() if line.startswith("notice: ")]


def _tables(files: Iterable[Path]) -> Iterator[str]:
    """Yield the page of every table and the summary as HTML, except pages without any run."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    for file in files:
        text = file.read_text(encoding="utf-8")
        if not re.search(r"\(\d+\) \|", text):
            continue
        rendered = reader.render(text)
        for before, after in _RENDERED.items():
            rendered = rendered.replace(before, after)
        yield rendered


def _figures(files: Iterable[Path]) -> Iterator[str]:
    for file in sorted(files):
        content = base64.b64encode(file.read_bytes()).decode()
        name = html.escape(file.stem)
        yield f'<figure><img alt="{name}" src="data:image/png;base64,{content}"><figcaption>{name}</figcaption></figure>'


def _left_out(printed: str) -> str:
    """Return an HTML note that lists the figures which `wlora.figures` has left out, with reasons; empty if none."""
    listed = [f"{name} ({reason})" for name, reason in re.findall(r"^(\w+): left out \((.+)\)$", printed, re.MULTILINE)]
    return f'<p class="faint">Left out: {html.escape(", ".join(listed))}.</p>' if listed else ""


def _classes(runs: Sequence[Run]) -> Iterator[str]:
    """Yield precision, recall and F1 of every class, and the confusion matrix, for each task and method that has them."""
    for number, found in enumerate(summarize_classes(runs)):
        if number == 0:
            yield '<h2 id="classes">Classes</h2>'
        yield f"<h3>{html.escape(found.title)}</h3>{_table(found.head, found.rows)}"
        if found.confusion:
            named = [[name, *row] for name, row in zip(found.names, found.confusion, strict=True)]
            yield '<p class="faint">Rows by true class (line) and predicted class (column)</p>'
            yield _table(["", *found.names], named)


def _environments(runs: Sequence[Run]) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows of a table of the distinct environments and their number of runs."""
    keys = ("wlora", "git_commit", "git_dirty", "python", "cpus", "device", "processes", "precision")
    packages = ("torch", "transformers", "datasets", "accelerate")
    found: Counter[tuple[str, ...]] = Counter()
    for run in runs:
        environment = run.record.environment
        versions = environment.get("packages", {})
        values = [environment.get(key) for key in keys] + [versions.get(name) for name in packages] + [run.machine]
        found[tuple("" if value is None else str(value) for value in values)] += 1
    return ["runs", *keys, *packages, "machine"], [[count, *values] for values, count in found.most_common()]


def _runs(runs: Sequence[Run]) -> tuple[list[str], list[list[Any]]]:
    head = ["task", "method", "rank", "K", "learning rate", "seed", "status", "score", "parameters", "seconds", "run_id"]
    rows = []
    for run in sorted(runs, key=lambda run: (run.task, run.method, run.rank or 0, run.k or 0, str(run.point), run.seed)):
        record = run.record
        score = f"{record.metrics[record.primary_metric]:.4f}" if record.primary_metric in record.metrics else ""
        count = record.parameters.get("adapter_final", 0) + record.parameters.get("base", 0)
        seconds = f"{record.seconds['train']:.0f}" if "train" in record.seconds else ""
        lr = f"{record.config['lr']:g}"
        rows.append([run.task, run.method, run.rank, run.k, lr, run.seed, run.status, score, count, seconds, record.run_id])
    return head, rows


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in head)
    lines = ["".join(f"<td>{html.escape('' if value is None else str(value))}</td>" for value in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
