"""The report of a study: one self-contained HTML file with compressed data and JavaScript."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from wlora.analysis.examples import Predictions
from wlora.analysis.report.details import RUNS, adapters, curves, predictions
from wlora.analysis.report.rows import columns_of
from wlora.analysis.report.tables import claims_data, fill_tables, page_of_claims, page_of_classes, page_of_tables
from wlora.analysis.study import Run
from wlora.analysis.tables.best import read_best
from wlora.analysis.tables.cells import NOT_COMPARED, Score
from wlora.analysis.tables.layouts import LABELS
from wlora.analysis.tables.settings import TITLES, chosen_runs, runs_by_setting, tasks_of
from wlora.analysis.tables.summary import summarize_study
from wlora.errors import ConfigError
from wlora.storage.records import RecordStore

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("data.js", "charts.js", "explore.js", "examples.js", "main.js")
SCORES: tuple[Score, ...] = ("last", "best")


def build_page(
    results: Path, runs: Sequence[Run], *, model: str | None, score: Score, notices: Sequence[str], command: str
) -> str:
    """Return the page of one study.

    Args:
        results: the results folder, for curves and predictions.
        runs: the runs to show, not empty.
        model: the tables show the runs of this model; None for the default of every table.
        score: the evaluation that the page shows when it is opened; a switch on the page shows the other one.
        notices: problems found in the records.
        command: the command that makes this page.

    Raises:
        ConfigError: the package that contains Vega-Lite is not installed.
    """
    store = RecordStore(results)
    best, predicted = read_best(results, runs), Predictions(store)
    labels = {run.record.run_id: label for (label, _), group in runs_by_setting(runs).items() for run in group}
    compared = [run for run in runs if run.method not in NOT_COMPARED]
    chosen = chosen_runs(compared)
    reported = [run for group in chosen.values() for run in group]
    names = {run.record.run_id for run in reported}
    others = [run for run in compared if run.status == "success" and run.record.run_id not in names]
    detailed = [*reported, *others][:RUNS]
    filled = [fill_tables(runs, model=model, best=best, score=one, predictions=predicted) for one in SCORES]
    summary = summarize_study(runs, best=best) if reported else []
    data = {
        "score": score,
        "titles": {task: TITLES.get(task, task) for task in tasks_of(runs)},
        "methods": list(LABELS.values()),
        "notCompared": [LABELS.get(name, name) for name in NOT_COMPARED],
        "runs": columns_of(runs, labels, names, best),
        "adapters": adapters(detailed),
        "claims": {one.score: claims_data(one.findings) for one in filled},
    }
    more = {"curves": curves(detailed, store), "predictions": predictions(detailed, predicted)}
    parts = {
        "TITLE": html.escape(f"{results.resolve().name}: WeightLoRA study"),
        "SUMMARY": html.escape(_summary(runs)),
        "NOTICES": "".join(f"<p class=notice>{html.escape(line)}</p>" for line in notices),
        "CLAIMS": _switched({one.score: page_of_claims(one) for one in filled}),
        "TABLES": _switched({one.score: page_of_tables(runs, one, summary) for one in filled}),
        "CLASSES": page_of_classes(chosen),
        "ENVIRONMENTS": _environments(runs),
        "COMMAND": html.escape(command),
        "DATA": _packed(json.dumps(data, separators=(",", ":"), allow_nan=False)),
        "MORE": _packed(json.dumps(more, separators=(",", ":"), allow_nan=False)),
        "VEGA": _packed(_vega()),
        "STYLE": (ASSETS / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS),
    }
    page = (ASSETS / "page.html").read_text(encoding="utf-8")
    return re.sub(r"@([A-Z]+)@", lambda found: parts[found[1]], page)


@cache
def _vega() -> str:
    """Return Vega-Lite, Vega and vega-embed as JavaScript that needs no network."""
    try:
        import vl_convert
    except ImportError:
        raise ConfigError("the report needs vl-convert-python\nway out: pip install 'wlora[figures]'") from None
    return str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # its type stubs require an optional argument


def _packed(text: str) -> str:
    """Compress a text for an inline script. The page decompresses it with DecompressionStream."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def _switched(pages: dict[Score, str]) -> str:
    return "\n".join(f'<div data-score="{score}">\n{page}\n</div>' for score, page in pages.items())


def _summary(runs: Sequence[Run]) -> str:
    commits = sorted({str(run.record.environment.get("git_commit"))[:7] for run in runs})
    models, machines = (sorted({getattr(run, name) for run in runs}) for name in ("model", "machine"))
    code = f"commit {commits[0]}" if len(commits) == 1 else f"{len(commits)} commits"
    return f"{', '.join(models)}. Scores are on the dev sets. Code: {code}. Machines: {'; '.join(machines)}."


def _environments(runs: Sequence[Run]) -> str:
    """Return a table of the distinct environments with their number of runs."""
    keys = ("wlora", "git_commit", "git_dirty", "python", "device", "processes", "precision")
    packages = ("torch", "transformers", "datasets", "accelerate")
    found: Counter[tuple[str, ...]] = Counter()
    for run in runs:
        environment: dict[str, Any] = run.record.environment
        versions = environment.get("packages", {})
        values = [environment.get(key) for key in keys] + [versions.get(name) for name in packages]
        found[(*("" if value is None else str(value)[:12] for value in values), run.machine)] += 1
    head = "".join(f'<th scope="col">{name.replace("_", " ")}</th>' for name in ("runs", *keys, *packages, "machine"))
    lines = (
        "".join(f"<td>{html.escape(str(value))}</td>" for value in (count, *values)) for values, count in found.most_common()
    )
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
