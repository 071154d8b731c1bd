"""The details of single runs in the report, reduced in size: learning curves, kept adapters and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from wlora.analysis.examples import Answers, Predictions
from wlora.analysis.series import smooth
from wlora.analysis.study import Run
from wlora.analysis.study_reader import read_curve
from wlora.analysis.targets import selects, short_kind, targets_of
from wlora.storage.records import RecordStore

# Limits that keep the page small: runs with details, points per curve, and predicted examples over all runs.
RUNS = 600
POINTS = 48
EXAMPLES = 2_000_000
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def curves(runs: Sequence[Run], store: RecordStore) -> dict[str, dict[str, list[Any]]]:
    """Return the learning curves by run_id: smoothed `loss` and primary `metric` as [steps, values], and steps of `events`.

    For a damaged curve, print a notice and leave it out.
    """
    found = {}
    for run in runs:
        points = read_curve(store, run)
        loss = [(point["step"], point["loss"]) for point in points if "loss" in point]
        primary = run.record.primary_metric
        metric = [(point["step"], point["metrics"][primary]) for point in points if primary in point.get("metrics", {})]
        if loss or metric:
            moments = sorted({event["step"] for event in run.record.events if event["kind"] != "dot_product"})
            moments = moments if len(moments) <= 4 else [moments[0], moments[-1]]
            found[run.record.run_id] = {"loss": _thin(smooth(loss)), "metric": _thin(metric), "events": moments}
    return found


def _thin(curve: Sequence[tuple[int, float]]) -> list[list[float]]:
    """Keep evenly spaced points including the last one; return [steps, values]."""
    finite = [(step, value) for step, value in curve if np.isfinite(value)]
    chosen = sorted({round(i) for i in np.linspace(0, len(finite) - 1, min(POINTS, len(finite)))})
    return [[finite[i][0] for i in chosen], [float(f"{finite[i][1]:.4g}") for i in chosen]]


def adapters(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the adapters that runs of selecting methods kept.

    Returns:
        `grids`: for each distinct set of targets, the names of the kinds of modules and the number of layers. `runs`: by
            run_id, the index of the grid and one [layer, kind, ω, rank] per kept adapter; ω is None for methods without ω.
    """
    grids: list[dict[str, Any]] = []
    places: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {}
    found = {}
    for run in runs:
        if not selects(run):
            continue
        key = repr((run.record.config["model"].get("architecture"), run.setting.get("method.targets")))
        if key not in places:
            targets = targets_of(run)
            kinds = list(dict.fromkeys(target.kind for target in targets))
            place = {target.name: (target.layer, kinds.index(target.kind)) for target in targets}
            grid = {"layers": 1 + max(target.layer for target in targets), "kinds": [short_kind(kind) for kind in kinds]}
            grids += [grid] if grid not in grids else []
            places[key] = grids.index(grid), place
        number, place = places[key]
        kept = [
            [*place[adapter["name"]], None if adapter["omega"] is None else round(adapter["omega"], 3), adapter["rank"]]
            for adapter in run.record.adapters
            if adapter["name"] in place
        ]
        found[run.record.run_id] = [number, kept]
    return {"grids": grids, "runs": found}


def predictions(runs: Sequence[Run], read: Predictions) -> dict[str, Any]:
    """Return the predictions of runs on the first validation split, with one letter per example.

    Returns:
        `sets`: the distinct dev sets, each with its task, fold, label names, and the true classes of its examples. For tasks
            without classes, the letter is always 1. `runs`: by run_id, the index of the set and the predicted classes. For
            tasks without classes, the letter is 1 for a right and 0 for a wrong answer.
    """
    sets: list[dict[str, Any]] = []
    known: list[tuple[dict[str, Any], str | None]] = []
    found, total = {}, 0
    for run in runs:
        answers = read(run) if total < EXAMPLES else None
        if answers is None or not len(answers.right):
            continue
        letters = _letters(answers)
        if letters is None:
            continue
        gold, predicted = letters
        names = list(run.record.config["task"].get("labels") or []) if answers.label is not None else []
        one = {"task": run.task, "fold": run.record.config["task"].get("fold"), "labels": names, "gold": gold}
        # True classes tell dev sets apart; without classes, all examples have the same letter.
        own = one, run.record.task.get("data") if answers.label is None else None
        if own not in known:
            known.append(own)
            sets.append(one)
        found[run.record.run_id] = [known.index(own), predicted]
        total += len(predicted)
    return {"sets": sets, "runs": found}


def _letters(answers: Answers) -> tuple[str, str] | None:
    """Encode true and predicted classes with one letter each; None if there are more classes than letters."""
    if answers.label is None or answers.prediction is None:
        return "1" * len(answers.right), "".join("1" if right else "0" for right in answers.right)
    both = np.concatenate([answers.label, answers.prediction])
    if both.min() < 0 or both.max() >= len(DIGITS):
        return None
    return "".join(DIGITS[i] for i in answers.label), "".join(DIGITS[i] for i in answers.prediction)
