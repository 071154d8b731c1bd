"""Distribution of a pack's runs over passes. Padding and depth cost time in a pass, and so does every additional pass."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

# The fixed cost of a pass, in tokens through one layer: on a GPU the launches of its kernels, on a CPU the function calls.
# 57 ms of launches for a step of 12 layers, against 400 TFLOP/s, are about 2,000,000 tokens.
_PASS = {"cuda": 500_000, "cpu": 2_000}


@dataclass(frozen=True)
class Piece:
    """A micro-batch of one run, or a part of it.

    Attributes:
        run: index of the run.
        rows: row indices.
        length: number of tokens of the longest row.
        lowest: index of the lowest layer with an adapter, where the backward pass ends; None without adapters.
        part: index of the part within the micro-batch.
    """

    run: int
    rows: list[int]
    length: int
    lowest: int | None
    part: int = 0


def plan_passes(
    pieces: list[Piece], *, layers: int, device: str, most_rows: int | None, padded: bool = True
) -> list[list[Piece]]:
    """Distribute pieces over passes.

    All rows of a pass are padded to the longest piece, and its backward pass ends at the lowest adapter of all pieces.
    Passes are merged as long as this saves time. The time is estimated from tokens and layers, plus a constant per pass.

    Args:
        pieces: at most one per run.
        layers: number of layers of the model.
        device: type of the device.
        most_rows: maximum rows per pass; None for no limit.
        padded: whether a piece may be padded to the length of another. If not, only pieces of equal length share a pass.
    """
    if len({(piece.length, piece.lowest) for piece in pieces}) == 1 and most_rows is None:
        return [pieces]
    passes = [[part] for piece in pieces for part in _divide(piece, most_rows)]
    constant = _PASS.get(device, _PASS["cuda"])

    def cost(group: list[Piece]) -> float:
        rows = max(len(piece.rows) for piece in group) * len(group)
        lowest = min(layers if piece.lowest is None else piece.lowest for piece in group)
        return rows * max(piece.length for piece in group) * (layers + 2 * (layers - lowest)) + constant

    def fits(group: list[Piece]) -> bool:
        rows = max(len(piece.rows) for piece in group) * len(group)
        lengths = {piece.length for piece in group}
        return (most_rows is None or rows <= most_rows) and _once_per_run(group) and (padded or len(lengths) == 1)

    passes.sort(key=lambda group: (group[0].lowest is None, group[0].lowest, group[0].length))
    while True:
        pairs = [(a, b) for a, b in itertools.combinations(passes, 2) if fits(a + b)]
        savings = [cost(a) + cost(b) - cost(a + b) for a, b in pairs]
        saving, (a, b) = max(zip(savings, pairs, strict=True), key=lambda found: found[0], default=(0.0, ([], [])))
        if saving <= 0:
            return passes
        passes = [group for group in passes if group is not a and group is not b] + [a + b]


def _once_per_run(group: list[Piece]) -> bool:
    return len({piece.run for piece in group}) == len(group)


def _divide(piece: Piece, most_rows: int | None) -> list[Piece]:
    """Divide a piece into parts of at most the given number of rows."""
    if most_rows is None or len(piece.rows) <= most_rows:
        return [piece]
    starts = range(0, len(piece.rows), most_rows)
    return [replace(piece, rows=piece.rows[at : at + most_rows], part=part) for part, at in enumerate(starts)]
