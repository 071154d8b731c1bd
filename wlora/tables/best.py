"""The best evaluation of a run on the dev set, from its learning curve: optimistic, as the same set chooses it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wlora.records import RecordStore
from wlora.study import Run, read_curve
from wlora.tables.cells import Best


def read_best(results_dir: str | Path, runs: Iterable[Run]) -> Best:
    """Return, by run_id, the metrics of successful runs where the primary one was highest.

    A run whose curve is missing, damaged or without an evaluation is left out, and told.
    """
    store, found, unknown = RecordStore(results_dir), {}, 0
    for run in runs:
        if run.status == "success":
            primary = run.record.primary_metric
            scored = [point["metrics"] for point in read_curve(store, run) if _has(point, primary)]
            if scored:
                found[run.record.run_id] = max(scored, key=lambda metrics: float(metrics[primary]))
            unknown += not scored
    if unknown:
        print(
            f"notice: {unknown} runs have no readable learning curve with evaluations: their best scores are not known",
            file=sys.stderr,
        )
    return found


def _has(point: Any, metric: str) -> bool:
    """Tell whether a point of a curve, which may be anything where no checksum vouches for it, holds a metric."""
    value = point["metrics"].get(metric) if isinstance(point, dict) and isinstance(point.get("metrics"), dict) else None
    return isinstance(value, float | int) and math.isfinite(value)
