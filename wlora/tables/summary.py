"""A study whatever its settings: one line per task and setting, with what it scored and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from wlora.errors import ConfigError
from wlora.statistics import generator, summarize
from wlora.study import Run
from wlora.tables.grid import Entry, Grid, count_text
from wlora.tables.settings import TITLES, chosen_runs, tasks_of

DIGITS = 4
HEADINGS = ("Task", "Setting", "Score", "# Params", "Lowest layer", "Train s", "Saved MiB", "Peak MiB")


def summarize_study(runs: Sequence[Run], *, bootstrap_seed: int = 0) -> list[dict[str, Any]]:
    """Return a line per task and setting, at the chosen learning rate and warm-up; Figure 2's runs are left out.

    Scores are means of the primary metric over seeds, with sample deviation and 95 % interval; seconds and bytes are
    medians. `lowest_layer` is the mean over seeds of the lowest layer that kept an adapter at the last cut, `saved_bytes`
    what the longest micro-batch keeps for its backward pass at the end, `peak_bytes` those of the device, or of the process.

    Raises:
        ConfigError: no successful run.
    """
    chosen = chosen_runs([run for run in runs if run.method != "single"])
    if not chosen:
        raise ConfigError("summary: no successful run")
    lines = []
    for task in tasks_of(run for group in chosen.values() for run in group):
        for (label, where), group in chosen.items():
            if where == task:
                lines.append({"task": task, "setting": label, **_line(group, generator(bootstrap_seed, f"{label} {task}"))})
    return lines


def _line(group: Sequence[Run], draws: Any) -> dict[str, Any]:
    records = [run.record for run in group]
    score = summarize([run.score for run in group], draws)
    lowest = [found for record in records if (found := _lowest_layer(record.events)) is not None]
    saved = [record.memory["saved"] for record in records if "saved" in record.memory]
    return {
        "metric": records[0].primary_metric,
        "n": score.n,
        "mean": score.mean,
        "std": score.std,
        "low": score.low,
        "high": score.high,
        "lr": group[0].point[0],
        "parameters": fmean(record.parameters["adapter_final"] + record.parameters["base"] for record in records),
        "lowest_layer": fmean(lowest) if lowest else None,
        "train_seconds": median(record.seconds["train"] for record in records),
        "saved_bytes": median(saved) if len(saved) == len(records) else None,
        "peak_bytes": median(record.memory.get("device", record.memory.get("process", 0)) for record in records) or None,
    }


def _lowest_layer(events: Sequence[dict[str, Any]]) -> int | None:
    return next((event["lowest_layer"] for event in reversed(events) if event.get("lowest_layer") is not None), None)


def draw_summary(lines: Sequence[dict[str, Any]]) -> Grid:
    """Draw the lines as a table: scores as mean ± deviation (runs)."""
    body: list[tuple[str | Entry, ...]] = []
    rules = set()
    for index, line in enumerate(lines):
        new = index == 0 or line["task"] != lines[index - 1]["task"]
        if index and new:
            rules.add(index)
        spread = "" if line["std"] is None else f"{line['std']:.{DIGITS}f}"
        body.append(
            (
                TITLES.get(line["task"], line["task"]) if new else "",
                line["setting"],
                Entry(f"{line['mean']:.{DIGITS}f}", spread, line["n"]),
                count_text(line["parameters"]),
                "" if line["lowest_layer"] is None else f"{line['lowest_layer']:.1f}",
                f"{line['train_seconds']:.0f}",
                *("" if line[key] is None else f"{line[key] / 2**20:.0f}" for key in ("saved_bytes", "peak_bytes")),
            )
        )
    return Grid(tuple(("", heading) for heading in HEADINGS), tuple(body), frozenset(rules), texts=2)
