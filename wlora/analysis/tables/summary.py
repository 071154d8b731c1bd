"""Summary of any study: one line per task and setting with scores and costs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from wlora.analysis.statistics import generator, summarize
from wlora.analysis.study import Run
from wlora.analysis.tables.caption import EVALUATION, dev_rows_text, edges, rows_text
from wlora.analysis.tables.cells import NOT_COMPARED, Best, Score
from wlora.analysis.tables.grid import Entry, Grid, count_text
from wlora.analysis.tables.settings import TITLES, chosen_runs, runs_by_setting, tasks_of
from wlora.analysis.tuning import choose_point
from wlora.errors import ConfigError
from wlora.storage.records import Record

DIGITS = 4
HEADINGS = ("Task", "Setting", "Score", "# Params", "Lowest layer", "Train s", "Saved MiB", "Peak MiB")


def summarize_study(runs: Sequence[Run], *, bootstrap_seed: int = 0, best: Best | None = None) -> list[dict[str, Any]]:
    """Return one line per task and setting at the chosen point. The runs for Figure 2 are left out.

    Scores are means of the primary metric over seeds, with sample standard deviation and 95 % interval. `mean_best` and
    `std_best` refer to the best evaluations, if all are known. Seconds and bytes are medians. `lowest_layer` is the lowest
    layer that kept an adapter at the last cut, as mean over seeds. `saved_bytes` are the bytes saved for the backward pass
    by the longest micro-batch at the end. `peak_bytes` is the peak memory of the device, or of the process without a GPU.
    `omega_low` and `omega_high` are the extremes of ω over the kept adapters, and `kept` lists these per seed.

    Raises:
        ConfigError: no successful run.
    """
    chosen = chosen_runs([run for run in runs if run.method not in NOT_COMPARED])
    if not chosen:
        raise ConfigError("summary: no successful run")
    lines = []
    for task in tasks_of(run for group in chosen.values() for run in group):
        for (label, where), group in chosen.items():
            if where == task:
                lines.append({"task": task, "setting": label, **_line(group, f"{label} {task}", bootstrap_seed, best or {})})
    return lines


def _line(group: Sequence[Run], name: str, bootstrap_seed: int, best: Best) -> dict[str, Any]:
    records = [run.record for run in group]
    score = summarize([run.score for run in group], generator(bootstrap_seed, name))
    peaks = [best[record.run_id][record.primary_metric] for record in records if record.run_id in best]
    peak = summarize(peaks, generator(bootstrap_seed, name)) if len(peaks) == len(group) else None
    lowest = [found for record in records if (found := _lowest_layer(record.events)) is not None]
    saved = [record.memory["saved"] for record in records if "saved" in record.memory]
    omegas = [adapter["omega"] for record in records for adapter in record.adapters if adapter["omega"] is not None]
    return {
        "metric": records[0].primary_metric,
        "n": score.n,
        "mean": score.mean,
        "std": score.std,
        "low": score.low,
        "high": score.high,
        "mean_best": peak.mean if peak else None,
        "std_best": peak.std if peak else None,
        **group[0].point.columns(),
        "parameters": fmean(run.trained for run in group),
        "lowest_layer": fmean(lowest) if lowest else None,
        "omega_low": min(omegas, default=None),
        "omega_high": max(omegas, default=None),
        "kept": "; ".join(f"{run.seed}: {_kept(run.record)}" for run in group) if omegas else None,
        "train_seconds": median(record.seconds["train"] for record in records),
        "saved_bytes": median(saved) if len(saved) == len(records) else None,
        "peak_bytes": median(record.memory.get("device", record.memory.get("process", 0)) for record in records) or None,
    }


def _kept(record: Record) -> str:
    """List the adapters that a run kept by layer and module, as in `2.value 5.query`."""
    parts = [adapter["name"].split(".") for adapter in record.adapters]
    return " ".join(".".join([*[part for part in name if part.isdigit()][:1], name[-1]]) for name in parts)


def _lowest_layer(events: Sequence[dict[str, Any]]) -> int | None:
    return next((event["lowest_layer"] for event in reversed(events) if event.get("lowest_layer") is not None), None)


def caption_summary(runs: Sequence[Run], score: Score) -> str:
    """Return the caption: models, evaluation, training rows, and chosen rates at the edge of the tried ones."""
    groups = runs_by_setting([run for run in runs if run.method not in NOT_COMPARED])
    models = ", ".join(sorted({run.model for run in runs}))
    said = f"{models}: dev sets, {EVALUATION[score]}."
    parts = [f"{said} Mean ± standard deviation of the primary metric over seeds (runs)."]
    samples: dict[str, None] = {}
    for (_, task), group in groups.items():
        rows, scored = rows_text(group[0]), dev_rows_text(group[0])
        if "a sample" in rows or scored:
            samples[f"{TITLES.get(task, task)} ({rows}{scored})"] = None
    if samples:
        parts.append(f"Training rows: {', '.join(samples)}.")
    choices = {(label, TITLES.get(task, task)): choose_point(group) for (label, task), group in groups.items()}
    known = {key: choice for key, choice in choices.items() if choice is not None}
    if raced := sum(choice.raced for choice in known.values()):
        parts.append(f"The learning rates of {raced} of {len(known)} settings were raced by successive halving.")
    return " ".join(parts + edges(known))


def draw_summary(lines: Sequence[dict[str, Any]], score: Score = "last") -> Grid:
    """Draw the lines as a table: scores as mean ± deviation (runs)."""
    mean, std = ("mean", "std") if score == "last" else ("mean_best", "std_best")
    body: list[tuple[str | Entry, ...]] = []
    rules = set()
    for index, line in enumerate(lines):
        new = index == 0 or line["task"] != lines[index - 1]["task"]
        if index and new:
            rules.add(index)
        spread = "" if line[std] is None else f"{line[std]:.{DIGITS}f}"
        body.append(
            (
                TITLES.get(line["task"], line["task"]) if new else "",
                line["setting"],
                Entry("" if line[mean] is None else f"{line[mean]:.{DIGITS}f}", spread, line["n"]),
                count_text(line["parameters"]),
                "" if line["lowest_layer"] is None else f"{line['lowest_layer']:.1f}",
                f"{line['train_seconds']:.0f}",
                *("" if line[key] is None else f"{line[key] / 2**20:.0f}" for key in ("saved_bytes", "peak_bytes")),
            )
        )
    return Grid(tuple(("", heading) for heading in HEADINGS), tuple(body), frozenset(rules), texts=2)
