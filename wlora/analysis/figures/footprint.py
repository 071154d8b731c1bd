"""Figure 3: the memory of a training step against the number of connected adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from matplotlib.figure import Figure

from wlora.analysis.figures.canvas import COLUMN, count_axis, new_figure, nothing, style_of
from wlora.reading import find_misfit, read_file
from wlora.storage.sealing import unseal

GIB = 2**30
# Memory of the GPU in the paper's example, in GB. Its line is drawn if the measurements come close to it.
V100 = 16


def memory(folder: Path, model: str | None = None) -> Figure:
    """Draw every measurement of `python -m wlora.memory` in a folder, one panel each.

    On a GPU, the figure shows the peak memory of the device; otherwise the bytes saved for the backward pass.
    """
    found = [_read(file) for file in sorted(folder.glob("*.json"))]
    found = [one for one in found if model is None or one["model"] == model]
    if not found:
        raise nothing("memory", f"no measurement in {folder}; python -m wlora.memory model=NAME makes one")
    figure, axes = new_figure(len(found), 1, width=COLUMN, height=2.0)
    for (axis,), one in zip(axes, found, strict=True):
        key = "peak_bytes" if all(point["peak_bytes"] for point in one["points"]) else "saved_bytes"
        orders = list(dict.fromkeys(point["order"] for point in one["points"]))
        styles = style_of(orders)
        for order in orders:
            x, y = _series(one["points"], order, key)
            line = "none" if order == "as selected" else "-"
            axis.plot(x, y, label=order, color=styles[order]["color"], marker=styles[order]["marker"], linestyle=line)
        top = max(point[key] for point in one["points"]) / GIB
        if V100 / 2 < top < 4 * V100:
            axis.axhline(V100, color="#D55E00", linestyle="--", linewidth=0.8, label=f"V100 {V100} GB")
        axis.set_ylim(bottom=0)
        count_axis(axis)
        axis.set_xlabel(f"connected adapters of {one['n']}")
        axis.set_ylabel("peak memory, GiB" if key == "peak_bytes" else "saved for backward, GiB")
        where = one["environment"]["precision"]
        axis.set_title(f"{one['model']}, rank {one['rank']}, {one['batch_size']}×{one['length']} tokens, {where}")
        axis.legend()
    return figure


class _Measured(TypedDict):
    order: str
    connected: int
    saved_bytes: int
    peak_bytes: int | None


class _Where(TypedDict):
    precision: str


class _Measurement(TypedDict):
    model: str
    rank: int
    n: int
    batch_size: int
    length: int
    environment: _Where
    points: list[_Measured]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = unseal(read_file(file))
        if misfit := find_misfit(content, _Measurement):
            raise ValueError(misfit)
        if not content["points"]:
            raise ValueError("it has no points")
        return content
    except (OSError, ValueError) as error:
        raise nothing("memory", f"measurement {file} is damaged: {error}; python -m wlora.memory makes it again") from None


def _series(points: Sequence[dict[str, Any]], order: str, key: str) -> tuple[list[int], list[float]]:
    chosen = sorted((point["connected"], point[key] / GIB) for point in points if point["order"] == order)
    return [count for count, _ in chosen], [size for _, size in chosen]
