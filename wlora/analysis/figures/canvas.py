"""Shared code of all figures: sizes, colours and files."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wlora.analysis.statistics import Summary, generator, summarize
from wlora.analysis.study import Run
from wlora.analysis.tables.settings import tasks_of
from wlora.errors import ConfigError
from wlora.storage.atomic_write import staged

matplotlib.use("Agg")

# Widths of a text column and of a page in inches. Figures are drawn at their printed size.
COLUMN, PAGE = 3.4, 7.0

# Okabe and Ito's palette, safe for the common kinds of colour blindness. Markers and dashes distinguish lines as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*<>hp"
DASHES = ("-", "--", "-.", ":")

# More panels would be too small to read on a page, and their layout would take a minute.
PANELS = 60

# Maximum number of settings with distinct colours and markers.
SETTINGS = 24

STYLE: dict[Any, Any] = {
    "font.size": 7,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 6,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # embed TrueType fonts, as publishers require
}


def nothing(figure: str, missing: str) -> ConfigError:
    """Build the error for a figure without data."""
    return ConfigError(f"figure {figure}: {missing}")


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Open a figure of rows × columns panels; width and height (of one row) in inches.

    Raises:
        ConfigError: more than `PANELS`.
    """
    if rows * columns > PANELS:
        raise ConfigError(
            f"figure: {rows * columns} panels, more than {PANELS}\nway out: choose, as in task=sst2 method=wlora"
        )
    pyplot.rcParams.update(STYLE)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height * rows), squeeze=False)
    return figure, [list(line) for line in axes]


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and PDF, each atomically; return the files.

    Raises:
        ConfigError: the folder cannot be written.
    """
    files = [folder / f"{name}.{kind}" for kind in ("png", "pdf")]
    try:
        for file in files:
            # Omit the creation date, so that the same records give identical files.
            metadata = {"CreationDate": None} if file.suffix == ".pdf" else {"Software": None}
            with staged(file) as staging:
                figure.savefig(staging, format=file.suffix[1:], metadata=metadata)
                os.replace(staging, file)
            figure.set_layout_engine("none")  # reuse the layout of the first file; computing it takes most of the time
    except OSError as error:
        raise ConfigError(f"results_dir: {folder} cannot be written ({error.strerror})") from error
    finally:
        pyplot.close(figure)
    return files


def style_of(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Assign a distinct colour, marker and line style to every label.

    Raises:
        ConfigError: more than `SETTINGS`.
    """
    if len(labels) > SETTINGS:
        raise ConfigError(
            f"figure: {len(labels)} settings, more than the {SETTINGS} that can be told apart\n"
            "way out: choose, as in method=lora,wlora rank=8"
        )
    return {
        label: {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        }
        for index, label in enumerate(labels)
    }


def side_by_side(values: Sequence[float], *, ratio: float, widest: float) -> list[float]:
    """Spread marks with equal values on a logarithmic axis around that value, so that none hides another.

    Args:
        values: positions of the marks.
        ratio: ratio between neighbouring marks after spreading.
        widest: maximum ratio between the first and the last mark of one value.
    """
    count, seen = Counter(values), Counter[float]()
    moved = []
    for value in values:
        step = min(ratio, widest ** (1 / max(1, count[value] - 1)))
        moved.append(value * step ** (seen[value] - (count[value] - 1) / 2))
        seen[value] += 1
    return moved


def count_axis(axis: Axes) -> None:
    """Put ticks at whole numbers only."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def tasks_and_labels(groups: dict[tuple[str, str], list[Run]]) -> tuple[list[str], list[str]]:
    """Return the tasks and the labels of groups with the keys (label, task), each in the order in which it is drawn."""
    return tasks_of(run for group in groups.values() for run in group), list(dict.fromkeys(label for label, _ in groups))


def page_width(columns: int, each: float = 2.4) -> float:
    """Return the width of a figure in inches: `each` per column of panels, at least a text column, at most a page."""
    return max(COLUMN, min(PAGE, each * columns))


def leave_out(axis: Axes, why: str = "") -> None:
    """Hide a panel and write the reason in its place."""
    axis.clear()
    axis.set_axis_off()
    axis.text(0.5, 0.5, why, ha="center", va="center", color="0.4", transform=axis.transAxes)


def fit(title: str, inches: float) -> str:
    """Break the lines of a title or axis label so that none is longer than a panel of this width."""
    # About 14 characters of the page's font fit in an inch.
    return "\n".join(textwrap.fill(line, round(14 * inches)) for line in title.split("\n"))


def metric_name(groups: dict[tuple[str, str], list[Run]], task: str) -> str:
    """Return the name of a task's primary metric; keys are (label, task)."""
    name = next(group[0].record.primary_metric for (_, where), group in groups.items() if where == task)
    return name.replace("_", "/")


def mean_score(group: Sequence[Run], name: str) -> Summary:
    """Summarise the scores of a group of runs; the name seeds the bootstrap."""
    return summarize([run.score for run in group], generator(0, name))


def error_bars(summary: Summary) -> np.ndarray | None:
    """Return the lengths of the error bars, [2, 1]; None without an interval."""
    if summary.low is None or summary.high is None:
        return None
    return np.array([[max(0.0, summary.mean - summary.low)], [max(0.0, summary.high - summary.mean)]])


def add_legend(figure: Figure, axes: Sequence[Axes], more: dict[str, Any] | None = None) -> None:
    """Draw one legend for all panels below them, in as many columns as fit on the page."""
    once: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            once.setdefault(label, handle)
    once |= more or {}
    for columns in range(min(len(once), 4), 0, -1):
        legend = figure.legend(list(once.values()), list(once), loc="outside lower center", ncols=columns)
        box = legend.get_window_extent()
        if columns == 1 or box.width <= figure.bbox.width:
            # Enlarge the figure by the legend's height, so that the panels keep their size.
            figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)
            return
        legend.remove()
