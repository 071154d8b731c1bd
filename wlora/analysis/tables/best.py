"""The best evaluation of a run on the dev set, from its learning curve. It is optimistic: the same set chooses it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from wlora.analysis.study import Run
from wlora.analysis.study_reader import read_curve
from wlora.analysis.tables.cells import Best
from wlora.storage.index import Entry, Index
from wlora.storage.records import RecordStore


def read_best(results_dir: str | Path, runs: Iterable[Run]) -> Best:
    """Return, by run_id, the metrics of successful runs at the evaluation with the highest primary metric.

    Runs whose curve is missing, damaged or without an evaluation are left out, and a notice is printed. Curves with a valid
    entry in `wlora.storage.index` are not read.
    """
    store, found, unknown = RecordStore(results_dir), dict[str, Mapping[str, float]](), 0
    index = Index(store, ".jsonl")
    known = {name: columns for name, _, columns in index}
    for run in runs:
        if run.status != "success":
            continue
        name, primary = run.record.run_id, run.record.primary_metric
        wanted = json.dumps([run.record.curve, primary]).encode()
        said, *best = known.get(name, (b"",))
        if said == wanted:
            found[name] = json.loads(best[0])
            continue
        scored = [point["metrics"] for point in read_curve(store, run, key="metrics") if _has(point, primary)]
        if scored:
            found[name] = max(scored, key=lambda metrics: float(metrics[primary]))
            index.add(Entry(name, b"", (wanted, json.dumps(found[name]).encode())))
        unknown += not scored
    index.write()
    if unknown:
        print(
            f"notice: {unknown} runs have no readable learning curve with evaluations: their best scores are not known",
            file=sys.stderr,
        )
    return found


def _has(point: Any, metric: str) -> bool:
    """Tell whether a point of a learning curve contains a metric. Without a checksum, a point may be any JSON value."""
    value = point["metrics"].get(metric) if isinstance(point, dict) and isinstance(point.get("metrics"), dict) else None
    return isinstance(value, float | int) and math.isfinite(value)
