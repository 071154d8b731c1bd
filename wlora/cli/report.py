"""Entry point: `python -m wlora.report results_dir=results/cpu_study`, one HTML page of a study. Never imports torch.

The page needs no network and no other file. It is made from the records alone; the command writes nothing else.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from wlora.analysis.report.page import build_page
from wlora.analysis.study import read_words, select
from wlora.analysis.study_reader import read_study
from wlora.cli.entry import serve
from wlora.cli.tables import check_model, read_score
from wlora.config.spelling import expand_home
from wlora.errors import ConfigError
from wlora.storage.atomic_write import check_folders, write_whole

USAGE = """\
usage: python -m wlora.report [key=value ...]

Writes <results_dir>/report.html, one page that needs no network. It shows the claims of the paper with their intervals, all
runs in a table that can be sorted and filtered, score against cost, learning curves, score against learning rate, kept
adapters, a comparison of the predictions of two runs, all tables, and environments.

  results_dir=results     folder of the study
  model=NAME              tables of this model; default: as for python -m wlora.tables
  score=last|best         which scores the page shows first; a switch on the page shows the others
  key=value,value         only runs with one of these values, as for python -m wlora.tables"""


def main(words: Sequence[str] | None = None) -> None:
    """Write the report. Exit codes: 0 success, 2 wrong request or no records."""
    serve(lambda given: print(write(given)), USAGE, words, alone=True)


def write(words: Sequence[str]) -> Path:
    """Write the page of one study and return its path.

    Raises:
        ConfigError: a wrong request, no records, or the page cannot be written.
    """
    names, options, filters = read_words(words, {"results_dir": "results", "model": None, "score": "last"})
    if names:
        raise ConfigError(f"report {' '.join(names)}: allowed is key=value")
    score = read_score(options["score"])
    results = Path(expand_home("results_dir", options["results_dir"] or "results"))
    check_folders(results)
    everything, faults = read_study(results)
    check_model(options["model"], everything)
    runs = select(everything, filters | ({"model": options["model"]} if options["model"] else {}))
    if not runs:
        raise ConfigError(f"results_dir={results}: no records to report")
    notices = [f"{fault}; it is left out" for fault in faults]
    for line in notices:
        print(f"notice: {line}", file=sys.stderr)
    command = shlex.join(["python", "-m", "wlora.report", *words])
    page = build_page(results, runs, model=options["model"], score=score, notices=notices, command=command)
    target = results / "report.html"
    try:
        write_whole(target, page.encode())
    except OSError as error:
        raise ConfigError(f"results_dir: {results} cannot be written ({error.strerror})") from error
    return target
