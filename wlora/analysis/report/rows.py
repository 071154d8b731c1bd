"""The runs of a study as columns, for the table and the charts of the report."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from wlora.analysis.study import Run
from wlora.analysis.tables.cells import Best
from wlora.analysis.tables.layouts import LABELS, row_of

DIGITS = 5


def columns_of(
    runs: Sequence[Run], labels: Mapping[str, str], reported: Collection[str], best: Best
) -> dict[str, list[Any]]:
    """Return one list per column with one value per run; None if the run has no value.

    Args:
        runs: the runs to list.
        labels: the label of each run's setting, by run_id; a run without a label is labelled by its method.
        reported: run_ids of the runs that are averaged in tables.
        best: metrics at the best evaluations.
    """
    lines = [_line(run, labels, reported, best.get(run.record.run_id)) for run in runs]
    names = list(dict.fromkeys(name for line in lines for name in line))
    return {name: [line.get(name) for line in lines] for name in names}


def _line(
    run: Run, labels: Mapping[str, str], reported: Collection[str], best: Mapping[str, float] | None
) -> dict[str, Any]:
    record, memory = run.record, run.record.memory
    primary, counts, seconds = record.primary_metric, record.parameters, record.seconds
    return {
        "id": record.run_id,
        "task": run.task,
        "model": run.model,
        "method": LABELS.get(run.method, run.method),
        "setting": labels.get(record.run_id, row_of(run).label),
        "k": run.k,
        "rank": run.rank,
        "lr": run.point.lr,
        "warmup": run.point.warmup,
        "head_lr": run.point.head_lr,
        "seed": run.seed,
        "status": run.status,
        "metric": primary,
        "last": _rounded(record.metrics.get(primary)),
        "best": _rounded((best or {}).get(primary)),
        "parameters": run.trained if counts else None,
        "kept": len(record.adapters) if run.rank is not None and run.status == "success" else None,
        "seconds": _rounded(seconds.get("train"), 1),
        "saved": memory.get("saved"),
        "peak": memory.get("device", memory.get("process")),
        "machine": run.machine,
        "reported": record.run_id in reported,
        "command": command_of(run),
        "error": record.error,
    }


def command_of(run: Run) -> str:
    """Return the command of a run as typed by the user; for a record without it, a command that repeats the run."""
    words = [str(word) for word in run.record.environment.get("overrides") or [f"from={run.record.run_id}"]]
    return f"python -m wlora.run {shlex.join(words)}"


def _rounded(value: float | None, digits: int = DIGITS) -> float | None:
    # A diverged run may have recorded NaN, which JSON does not support.
    return round(value, digits) if value is not None and value == value and abs(value) != float("inf") else None
