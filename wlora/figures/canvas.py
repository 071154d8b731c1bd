"""What all figures share: size, colours, labels of runs, files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wlora.errors import ConfigError
from wlora.study import ENDED, Run, choose_point
from wlora.tables.layouts import GLUE, LABELS, LAYOUTS, Row

matplotlib.use("Agg")

# Widths of a text column and of a page, in inches, at which the figures are read.
COLUMN, PAGE = 3.4, 7.0

# Okabe and Ito's palette, told apart under every common colour blindness; markers and dashes tell lines apart besides.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*<>hp"
DASHES = ("-", "--", "-.", ":")

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
    "pdf.fonttype": 42,  # embedded as TrueType: what publishers ask for
}

TITLES = {column.task: column.title for layout in LAYOUTS.values() for column in (*GLUE, *layout.columns)}


def nothing(figure: str, missing: str) -> ConfigError:
    """Build the message for a figure without data."""
    return ConfigError(f"figure {figure}: {missing}")


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Open a figure of rows × columns panels; width and height (of one row) in inches."""
    pyplot.rcParams.update(STYLE)
    figure, axes = pyplot.subplots(rows, columns, figsize=(width, height * rows), squeeze=False)
    return figure, [list(line) for line in axes]


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and PDF, each whole or not at all; returns the files.

    Raises:
        ConfigError: the folder cannot be written.
    """
    files = [folder / f"{name}.{kind}" for kind in ("png", "pdf")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            staging = file.with_name(f".{os.getpid()}.{file.name}")
            # Without a date the same records give the same file.
            figure.savefig(staging, metadata={"CreationDate": None} if file.suffix == ".pdf" else {"Software": None})
            os.replace(staging, file)
    except OSError as error:
        raise ConfigError(f"results_dir: {folder} cannot be written ({error.strerror})") from error
    finally:
        pyplot.close(figure)
    return files


def style_of(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Give every label a colour, a marker and a dash of its own."""
    return {
        label: {
            "color": COLOURS[index % len(COLOURS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        }
        for index, label in enumerate(labels)
    }


def count_axis(axis: Axes) -> None:
    """Put ticks at whole numbers only."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def tasks_of(runs: Iterable[Run]) -> list[str]:
    """Return the tasks of runs, in the tables' order."""
    known = list(TITLES)
    return sorted({run.task for run in runs}, key=lambda task: (known.index(task) if task in known else 99, task))


def chosen_runs(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """Return, by label and task, the successful runs at the chosen learning rate and warm-up of each setting.

    Settings that differ within a method, rank and K are told apart in the label by the fields that differ.
    """
    settings: dict[tuple[str, Row, str], list[Run]] = {}
    for run in runs:
        if run.status in ENDED:
            row = Row(run.method, run.rank, run.k)
            settings.setdefault((run.task, row, repr(sorted(run.setting.items(), key=str))), []).append(run)
    ranks = {row.rank for _, row, _ in settings if row.rank is not None}
    found: dict[tuple[str, str], list[Run]] = {}
    order = list(LABELS)

    def place(key: tuple[str, Row, str]) -> tuple[int, int, int, str]:
        known = order.index(key[1].method) if key[1].method in order else len(order)
        return known, key[1].rank or 0, key[1].k or 0, key[2]

    for task, row, setting in sorted(settings, key=place):
        group = settings[task, row, setting]
        choice = choose_point(group)
        if choice is None:
            continue
        alike = [other for (name, same, _), others in settings.items() if (name, same) == (task, row) for other in others]
        label = (
            row.label + (f" r={row.rank}" if len(ranks) > 1 and row.rank is not None else "") + _difference(group[0], alike)
        )
        kept = [run for run in group if run.point == choice.point and run.status == "success"]
        found[label, task] = sorted(kept, key=lambda run: run.seed)
    return found


def _difference(run: Run, alike: Sequence[Run]) -> str:
    """Name the fields in which a run differs from others of its method, rank and K."""
    differing = [key for key in run.setting if any(other.setting.get(key) != run.setting[key] for other in alike)]
    return "".join(f" {key.rpartition('.')[2]}={run.setting[key]}" for key in differing if key != "method.k")
