"""Entry point: `python -m wlora.figures adapters results_dir=results/cpu_study`. Never imports torch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wlora.console import protect_output
from wlora.errors import ConfigError, unknown_name
from wlora.records import RecordStore
from wlora.study import read_runs, read_words, select

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USAGE = """\
usage: python -m wlora.figures NAME|all [key=value ...]

Reads the records of one study and writes <results_dir>/figures/NAME.png and .pdf:

  dot_products   Figure 2: |<grad f, AB>| of every adapter trained alone (scripts/figure2.sh), kept ones starred
  memory         Figure 3: memory against the number of connected adapters (python -m wlora.memory)
  adapters       layer x module: how often each adapter is kept over seeds, mean omega and rank
  pareto         score against parameters and against seconds, with 95 % intervals
  curves         learning curves with the moments of cuts and growths
  selection      score against K and T with LoRA as a line (scripts/k_curve.sh), omega at the cut
  all            those for which there is something to draw

  results_dir=results     the study
  key=value,value         keep the runs that have one of the values: task=sst2 method=lora,wlora model=minilm"""


def main(words: Sequence[str] | None = None) -> None:
    """Draw what is asked for; exits with 0, or 2 after a mistake or where there is nothing to draw."""
    protect_output()
    words = sys.argv[1:] if words is None else words
    if not words or {"-h", "--help"} & set(words):
        print(USAGE)
        sys.exit(0 if words else 2)
    try:
        _draw(words)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _draw(words: Sequence[str]) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("figures need matplotlib\nway out: pip install 'wlora[figures]'")
    names, options, filters = read_words(words, {"results_dir": "results"})
    results = Path(options["results_dir"] or "results")
    figures = _figures(results, filters)
    if len(names) != 1 or names[0] not in (*figures, "all"):
        raise unknown_name(f"figure {' '.join(names) or '(none)'}", names[0] if names else "", [*figures, "all"])
    from wlora.figures.canvas import save

    drawn = 0
    for name in figures if names == ["all"] else names:
        try:
            figure = figures[name]()
        except ConfigError as error:
            if names != ["all"]:
                raise
            print(f"{name}: left out ({str(error).partition(': ')[2]})")
            continue
        drawn += 1
        print("  ".join(map(str, save(figure, results / "figures", name))), flush=True)
    if not drawn:
        raise ConfigError(f"results_dir={results}: nothing to draw")


def _figures(results: Path, filters: dict[str, str]) -> dict[str, Callable[[], Figure]]:
    """Return all figures of a study, each undrawn."""
    from wlora.figures import adapters, footprint, scores

    runs = select(read_runs(results), filters)
    return {
        "dot_products": lambda: adapters.dot_products(runs),
        "memory": lambda: footprint.memory(results / "memory", filters.get("model")),
        "adapters": lambda: adapters.adapters([run for run in runs if run.method != "single"]),
        "pareto": lambda: scores.pareto([run for run in runs if run.method != "single"]),
        "curves": lambda: scores.curves([run for run in runs if run.method != "single"], RecordStore(results)),
        "selection": lambda: scores.selection([run for run in runs if run.method != "single"]),
    }


if __name__ == "__main__":
    main()
