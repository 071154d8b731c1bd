"""Learning curves as series of steps and values: smoothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def smooth(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Replace each point by the mean over a window around it. The window is a tenth of the curve."""
    half, count = len(curve) // 20, len(curve)
    sums = np.concatenate([[0.0], np.cumsum([value for _, value in curve])])
    edges = ((max(0, index - half), min(count, index + half + 1)) for index in range(count))
    return [(step, (sums[high] - sums[low]) / (high - low)) for (step, _), (low, high) in zip(curve, edges, strict=True)]
