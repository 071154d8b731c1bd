"""Entry point: `python -m wlora.figures adapters results_dir=results/cpu_study`. Never imports torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wlora.analysis.study import Run, main_model, read_words, select
from wlora.analysis.study_reader import read_runs
from wlora.analysis.tables.cells import NOT_COMPARED
from wlora.cli.entry import serve
from wlora.config.spelling import expand_home
from wlora.errors import ConfigError, unknown_name
from wlora.storage.atomic_write import check_folders
from wlora.storage.records import RecordStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USAGE = """\
usage: python -m wlora.figures NAME|all [key=value ...]

Reads the records of one study and writes <results_dir>/figures/NAME.png and .pdf:

  dot_products   Figure 2: |<grad f, AB>| of every adapter trained alone (scripts/figure2.sh), kept ones starred
  memory         Figure 3: memory against the number of connected adapters (python -m wlora.memory)
  adapters       layer x module: how often each adapter is kept over seeds, mean omega and rank
  pareto         score against parameters and against seconds, with 95 % intervals
  curves         learning curves with the steps at which adapters were cut or grown
  rates          score against learning rate, one line per setting, the chosen rate starred
  selection      score against K and T, with LoRA as a reference line (scripts/k_curve.sh); omega at the cut
  all            every figure for which the study has data

  results_dir=results     folder of the study
  model=NAME              only runs of this model; default: for each figure, the model with most runs
  key=value,value         only runs with one of these values: task=sst2 method=lora,wlora model=minilm"""


def main(words: Sequence[str] | None = None, runs: Sequence[Run] | None = None) -> None:
    """Draw the requested figures. Exit codes: 0 success, 2 wrong request or nothing to draw.

    Args:
        words: the arguments; None for those of the command line.
        runs: all runs of the study, if they have been read already.
    """
    serve(lambda given: _draw(given, runs), USAGE, words)


def _draw(words: Sequence[str], known: Sequence[Run] | None) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("figures need matplotlib\nway out: pip install 'wlora[figures]'")
    names, options, filters = read_words(words, {"results_dir": "results"})
    results = Path(expand_home("results_dir", options["results_dir"] or "results"))
    check_folders(results, "figures")
    figures = _figures(results, filters, read_runs(results) if known is None else known)
    allowed = sorted([*figures, "all"])
    if len(names) != 1:
        raise ConfigError(f"figures={' '.join(names) or 'none'}: allowed is one of {', '.join(allowed)}")
    if names[0] not in allowed:
        raise unknown_name(f"figure {names[0]}", names[0], allowed)
    from wlora.analysis.figures.canvas import save

    drawn = 0
    for name in figures if names == ["all"] else names:
        try:
            figure = figures[name]()
        except ConfigError as error:
            if names != ["all"]:
                raise
            print(f"{name}: left out ({str(error).partition(': ')[2].splitlines()[0]})")
            continue
        drawn += 1
        print("  ".join(map(str, save(figure, results / "figures", name))), flush=True)
    if not drawn:
        raise ConfigError(f"results_dir={results}: nothing to draw")


def _figures(results: Path, filters: dict[str, str], everything: Sequence[Run]) -> dict[str, Callable[[], Figure]]:
    """Return a drawing function for every figure of a study, by name."""
    from wlora.analysis.figures import adapters, cost, footprint, scores

    runs = select(everything, filters)
    single = _of_main_model([run for run in runs if run.method in NOT_COMPARED], "dot_products")
    ours = _of_main_model([run for run in runs if run.method not in NOT_COMPARED], "the others")
    return {
        "dot_products": lambda: adapters.dot_products([*single, *(run for run in runs if run.method not in NOT_COMPARED)]),
        "memory": lambda: footprint.memory(results / "memory", filters.get("model")),
        "adapters": lambda: adapters.adapters(ours),
        "pareto": lambda: cost.pareto(ours),
        "curves": lambda: scores.curves(ours, RecordStore(results)),
        "rates": lambda: scores.rates(ours),
        "selection": lambda: scores.selection(ours),
    }


def _of_main_model(runs: list[Run], what: str) -> list[Run]:
    """Keep only the runs of the model with most runs, and print a note if there are other models."""
    models, main = sorted({run.model for run in runs}), main_model(runs)
    if main is None or len(models) == 1:
        return runs
    print(f"{what}: runs of model={main}; model=NAME chooses among {', '.join(models)}")
    return [run for run in runs if run.model == main]
