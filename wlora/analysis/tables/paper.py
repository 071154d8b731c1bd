"""The numbers printed in the paper (`results/paper`), and a check of its averages against its cells."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path

from wlora.analysis.statistics import Summary
from wlora.analysis.tables.cells import Cell, Table, average, decimals, mark
from wlora.analysis.tables.layouts import Column, Layout, Row
from wlora.errors import ConfigError
from wlora.reading import open_file

# Half a unit of the last printed digit, plus a small tolerance for binary fractions.
_ROUNDING = 0.5 + 1e-6


@dataclass(frozen=True)
class PrintedRow:
    """A printed row: parameters, scores by column of the file, the average, and a note."""

    parameters: str
    values: dict[str, float]
    average: float | None
    note: str


def paper_folder() -> Path:
    """Return the folder of the paper's numbers: inside an installed wheel, or in the checkout."""
    package = Path(__file__).parent.parent.parent
    installed = package / "results" / "paper"
    return installed if installed.is_dir() else package.parent / "results" / "paper"


def column_name(column: Column, metric: str) -> str:
    """Return the column name of a metric in the CSV files, which is the same for the paper's files and ours."""
    return f"{column.task}_{metric}"


def read_printed(layout: Layout, folder: Path | None = None) -> dict[Row, PrintedRow]:
    """Read the paper's table; empty for a layout without one (the demo).

    Raises:
        ConfigError: the file is not a valid table.
    """
    file = (folder or paper_folder()) / f"table{layout.name}.csv"
    if not os.path.isfile(file):
        return {}
    names = [column_name(column, metric) for column in layout.columns for metric in column.metrics]
    printed = {}
    shown = set(layout.rows)
    try:
        with io.TextIOWrapper(open_file(file), encoding="utf-8", newline="") as stream:
            for line in csv.DictReader(stream):
                row = Row(line["method"], _integer(line["rank"]), _integer(line["k"]))
                mean = float(line["all"]) if line.get("all") else None
                values = {name: float(line[name]) for name in names}
                if row in shown:
                    printed[row] = PrintedRow(line.get("params", ""), values, mean, line["note"])
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ConfigError(f"{file}: cannot be read ({type(error).__name__}: {error})") from None
    return printed


def paper_table(layout: Layout, folder: Path | None = None) -> Table:
    """Return the paper's table as a `Table`, with the column ALL computed from its cells."""
    printed = read_printed(layout, folder)
    cells = {}
    for row in printed:
        for column in layout.columns:
            figures = tuple(Summary(printed[row].values[column_name(column, metric)]) for metric in column.metrics)
            cells[row, column.task] = Cell(figures, last=figures)
    return mark(average(Table(layout, layout.model, tuple(printed), cells)))


def unexplained_averages(layout: Layout, folder: Path | None = None) -> list[str]:
    """List the rows whose printed ALL differs from the mean of their cells by more than rounding."""
    table, printed = paper_table(layout, folder), read_printed(layout, folder)
    unit = 10.0 ** -decimals(layout)
    found = []
    for row, cell in table.averages.items():
        mean, computed = printed[row].average, cell.value
        if mean is not None and computed is not None and abs(computed - mean) > _ROUNDING * unit:
            rank = f", r={row.rank}" if layout.group == "rank" else ""
            found.append(f"{row.label}{rank}: the paper prints {mean:.4f}, its cells give {computed:.4f}")
    return found


def _integer(text: str) -> int | None:
    return int(text) if text else None
