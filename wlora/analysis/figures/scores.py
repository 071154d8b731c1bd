"""Figures of scores: against cost (`pareto`), rate (`rates`), K, T and ω (`selection`), and over training (`curves`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from wlora.analysis.figures.canvas import COLUMN, PAGE, count_axis, new_figure, nothing, style_of
from wlora.analysis.series import smooth
from wlora.analysis.statistics import Summary, generator, summarize
from wlora.analysis.study import Run
from wlora.analysis.study_reader import read_curve
from wlora.analysis.tables.layouts import LABELS, row_of
from wlora.analysis.tables.settings import TITLES, chosen_runs, runs_by_setting, tasks_of
from wlora.analysis.tuning import Choice, choose_point
from wlora.storage.records import RecordStore

# Kinds of events that a learning curve marks.
MARKED = ("cut", "select", "extend", "grow", "prune", "share", "allocate")


def pareto(runs: Sequence[Run]) -> Figure:
    """Draw score against cost, one point per setting, with 95 % intervals.

    Costs are trained parameters, training seconds, and where all records tell them the bytes saved for the backward pass.
    """
    chosen = chosen_runs(runs)
    if not chosen:
        raise nothing("pareto", "no successful run")
    tasks, labels = tasks_of(run for group in chosen.values() for run in group), list(dict.fromkeys(k for k, _ in chosen))
    styles = style_of(labels)
    several = len({run.machine for group in chosen.values() for run in group}) > 1
    with_memory = all("saved" in run.record.memory for group in chosen.values() for run in group)
    rows = 3 if with_memory else 2
    figure, axes = new_figure(rows, len(tasks), width=max(COLUMN, min(PAGE, 2.4 * len(tasks))), height=1.9)
    for column, task in enumerate(tasks):
        panels = [line[column] for line in axes]
        upper, lower, *memory = panels
        for label in labels:
            group = chosen.get((label, task))
            if not group:
                continue
            score = _summary(group, f"{label} {task}")
            seconds = summarize([run.record.seconds["train"] for run in group], generator(0, f"{label} {task} seconds"))
            parameters = float(np.mean([_trained(run) for run in group]))
            style: dict[str, Any] = {
                "color": styles[label]["color"],
                "fmt": styles[label]["marker"],
                "elinewidth": 0.6,
                "label": label,
            }
            upper.errorbar(parameters, score.mean, yerr=_bars(score), **style)
            lower.errorbar(seconds.mean, score.mean, xerr=_bars(seconds), yerr=_bars(score), **style)
            for panel in memory:
                saved = float(np.mean([run.record.memory["saved"] for run in group])) / 2**20
                panel.errorbar(saved, score.mean, yerr=_bars(score), **style)
                panel.set_xlabel("MiB saved for the backward pass")
        _count_scale(upper, max(_trained(run) for group in chosen.values() for run in group))
        upper.set_title(TITLES.get(task, task))
        upper.set_xlabel("trained parameters without the head")
        lower.set_xlabel("training seconds" + (", on different machines" if several else ""))
        for axis in panels:
            axis.set_ylabel(_metric(chosen, task))
    _legend(figure, axes[0])
    return figure


def _count_scale(axis: Axes, largest: int) -> None:
    """Make an axis of parameter counts logarithmic, with a place for 0: training the head alone."""
    axis.set_xscale("symlog", linthresh=1000)
    axis.set_xticks([0, *(10**power for power in range(4, len(str(largest)) + 1))])
    axis.minorticks_off()


def _trained(run: Run) -> int:
    counts = run.record.parameters
    return counts["adapter_final"] + (counts["base"] + counts["head"] if counts["base"] else 0)


def _metric(chosen: dict[tuple[str, str], list[Run]], task: str) -> str:
    """Return the name of a task's primary metric."""
    name = next(group[0].record.primary_metric for (_, where), group in chosen.items() if where == task)
    return name.replace("_", "/")


def curves(runs: Sequence[Run], store: RecordStore) -> Figure:
    """Draw loss (smoothed) and primary metric over the steps, mean and range over seeds; dotted: cuts and growths."""
    chosen = chosen_runs(runs)
    bands = {key: _read_bands(group, store) for key, group in chosen.items()}
    if not any(bands.values()):
        raise nothing("curves", f"no learning curve of a successful run in {store.folder}")
    tasks, labels = tasks_of(run for group in chosen.values() for run in group), list(dict.fromkeys(k for k, _ in chosen))
    styles = style_of(labels)
    figure, axes = new_figure(2, len(tasks), width=max(COLUMN, min(PAGE, 2.4 * len(tasks))), height=1.8)
    for column, task in enumerate(tasks):
        upper, lower = axes[0][column], axes[1][column]
        for label in labels:
            if (found := bands.get((label, task))) is None:
                continue
            losses, metric = found
            style = {key: styles[label][key] for key in ("color", "linestyle")}
            _draw_band(upper, losses, label, style)
            _draw_band(lower, metric, label, style, marker=styles[label]["marker"])
            events = (event for run in chosen[label, task] for event in run.record.events)
            moments = sorted({event["step"] for event in events if event["kind"] in MARKED})
            for moment in moments if len(moments) <= 4 else (moments[0], moments[-1]):
                for axis in (upper, lower):
                    axis.axvline(moment, color=style["color"], linewidth=0.5, linestyle=":")
        upper.set_title(TITLES.get(task, task))
        upper.set_ylabel("training loss, smoothed")
        lower.set_ylabel(_metric(chosen, task))
        for axis in (upper, lower):
            axis.set_xlim(left=0)
        lower.set_xlabel("optimiser step")
    changes = Line2D([], [], color="0.3", linewidth=0.5, linestyle=":")
    _legend(figure, axes[0], {"adapters cut or grown": changes})
    return figure


def _read_bands(group: Sequence[Run], store: RecordStore) -> tuple[np.ndarray, np.ndarray] | None:
    """Return smoothed loss and primary metric of the runs of a setting; None if none has a curve.

    The curves of one setting at a time: those of a large study do not fit in memory.
    """
    metric, losses, scores = group[0].record.primary_metric, [], []
    for run in group:
        curve = read_curve(store, run)
        losses.append(smooth([(p["step"], p["loss"]) for p in curve if "loss" in p]))
        scores.append([(p["step"], p["metrics"][metric]) for p in curve if metric in p.get("metrics", {})])
    return (_band(losses), _band(scores)) if any(losses) or any(scores) else None


def _band(series: Sequence[Sequence[tuple[int, float]]]) -> np.ndarray:
    """Return [4, steps]: the steps that all of several curves have, their mean, lowest and highest value there."""
    by_step: dict[int, list[float]] = {}
    for curve in series:
        for step, value in curve:
            by_step.setdefault(step, []).append(value)
    whole = sorted(step for step, values in by_step.items() if len(values) == len(series))
    bands = [(step, np.mean(by_step[step]), min(by_step[step]), max(by_step[step])) for step in whole]
    return np.array(bands, dtype=float).reshape(-1, 4).T


def _draw_band(axis: Axes, band: np.ndarray, label: str, style: dict[str, Any], marker: str | None = None) -> None:
    """Draw the mean of several curves and their range."""
    steps, means, low, high = band
    if len(steps):
        axis.plot(steps, means, label=label, marker=marker if len(steps) < 30 else None, **style)
        if (high > low).any():
            axis.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)


def rates(runs: Sequence[Run]) -> Figure:
    """Draw score against learning rate, a line per setting, with intervals over seeds; a star is the chosen rate's score.

    A line is over the reported seeds where these have run at all of its rates, else it is the tuning seed's.
    """
    found = {key: (choice, group) for key, group in runs_by_setting(runs).items() if (choice := _compared(group))}
    if not found:
        raise nothing(
            "rates", "no setting with successful runs at several learning rates, as -m lr=3e-4,1e-3,3e-3 makes them"
        )
    groups = {key: group for key, (_, group) in found.items()}
    tasks, labels = tasks_of(run for group in groups.values() for run in group), list(dict.fromkeys(k for k, _ in found))
    styles = style_of(labels)
    wide = len(tasks) > 1 or len(labels) > 6
    # The height includes the legend.
    height = 2.2 + 0.13 * len(labels) / (4 if wide else 2)
    figure, axes = new_figure(1, len(tasks), width=PAGE if wide else COLUMN, height=height)
    star: dict[str, Any] = {"marker": "*", "markersize": 6, "linestyle": "none"}
    star |= {"markeredgewidth": 0.4, "markeredgecolor": "black"}
    for axis, task in zip(axes[0], tasks, strict=True):
        every = {run.point.lr for (_, where), group in groups.items() if where == task for run in group}
        for label in labels:
            if (label, task) in found:
                choice, group = found[label, task]
                lines = {
                    rate: _summary(kept, f"{label} {task} {rate}") for rate, kept in _along_rates(choice, group).items()
                }
                _draw_line(axis, list(lines.items()), label, styles[label])
                reported = [run for run in choice.reported(group) if run.status == "success"]
                if reported:
                    score, style = _summary(reported, f"{label} {task}"), {**star, "color": styles[label]["color"]}
                    axis.errorbar([choice.point.lr], [score.mean], yerr=_bars(score), elinewidth=0.6, zorder=5, **style)
        axis.set_xscale("log")
        axis.set_xticks(sorted(every), [np.format_float_scientific(rate, trim="-", exp_digits=1) for rate in sorted(every)])
        axis.minorticks_off()
        axis.set_title(TITLES.get(task, task))
        axis.set_xlabel("learning rate")
        axis.set_ylabel(_metric(groups, task))
    _legend(figure, axes[0], {"chosen, over the reported seeds": Line2D([], [], color="0.8", **star)})
    return figure


def _compared(group: Sequence[Run]) -> Choice | None:
    """Return the choice of a setting that has succeeded at several rates."""
    several = len({run.point.lr for run in group if run.status == "success"}) > 1
    return choose_point(group) if several else None


def _along_rates(choice: Choice, group: Sequence[Run]) -> dict[float, list[Run]]:
    """Return the successful runs at each rate: of the reported seeds if they have run at all rates, else of the tuning seed.

    Of several points of one rate the best counts.
    """
    by_rate: dict[float, list[Run]] = {}
    for rate in sorted({run.point.lr for run in group}):
        at_rate = [run for run in group if run.point.lr == rate]
        best = choose_point(at_rate)
        by_rate[rate] = [run for run in at_rate if best and run.point == best.point]
    seeds = {run.seed for run in choice.reported(group)}
    seeds = {seed for seed in seeds if all(seed in {run.seed for run in at_rate} for at_rate in by_rate.values() if at_rate)}
    shown = {
        rate: [run for run in at_rate if run.status == "success" and run.seed in (seeds or {choice.seed})]
        for rate, at_rate in by_rate.items()
    }
    return {rate: kept for rate, kept in shown.items() if kept}


def selection(runs: Sequence[Run]) -> Figure:
    """Draw score against K (at the default T) and against T, with LoRA as a line, and the histogram of ω at the cut."""
    chosen = chosen_runs(runs)
    selecting = [run for group in chosen.values() for run in group if run.k is not None]
    if not selecting:
        raise nothing("selection", "no successful run of a method that reads k; scripts/k_curve.sh makes them")
    tasks = tasks_of(selecting)
    figure, axes = new_figure(3, len(tasks), width=max(COLUMN, min(PAGE, 2.4 * len(tasks))), height=1.6)
    styles = style_of(list(dict.fromkeys(name for run in selecting for name in (LABELS[run.method], _row(run)))))
    for column, task in enumerate(tasks):
        mine = [group for (_, where), group in chosen.items() if where == task]
        by_k, by_steps, histogram = (axes[row][column] for row in range(3))
        default_steps = [group for group in mine if group[0].setting.get("method.select_steps") is None]
        _draw_against(by_k, default_steps or mine, lambda run: run.k, lambda run: LABELS[run.method], styles)
        _draw_against(by_steps, [group for group in mine if group[0].method == "wlora"], _cut_step, _row, styles)
        for group in mine:
            if group[0].method == "lora":
                mean = _summary(group, f"lora {task}").mean
                for axis in (by_k, by_steps):
                    axis.axhline(mean, color="black", linewidth=0.8, linestyle="--", label=LABELS["lora"])
        histogram.hist([w for group in mine for run in group for w in _omegas(run)], bins=40, color="0.4")
        by_k.set_title(TITLES.get(task, task))
        by_k.set_xlabel("K, adapters kept")
        by_steps.set_xlabel("T, steps of selection")
        histogram.set_xlabel("ω at WLoRA's cut, all adapters")
        histogram.set_ylabel("adapters")
        for axis in (by_k, by_steps):
            axis.set_ylabel(_metric(chosen, task))
            count_axis(axis)
    _legend(figure, [axes[0][0], axes[1][0]])
    return figure


def _row(run: Run) -> str:
    return row_of(run).label


def _draw_against(
    axis: Axes,
    groups: Sequence[Sequence[Run]],
    quantity: Callable[[Run], int | None],
    label: Callable[[Run], str],
    styles: dict[str, dict[str, Any]],
) -> None:
    """Draw scores, with intervals, against a number that the runs of a group share: a line per label."""
    lines: dict[str, list[tuple[float, Summary]]] = {}
    for group in groups:
        value = quantity(group[0])
        if value is not None:
            name = label(group[0])
            lines.setdefault(name, []).append((value, _summary(group, f"{name} {value}")))
    for name, points in lines.items():
        _draw_line(axis, sorted(points, key=lambda point: point[0]), name, styles[name])


def _draw_line(axis: Axes, points: Sequence[tuple[float, Summary]], label: str, style: dict[str, Any]) -> None:
    """Draw a line through means, with intervals where all points have one."""
    bars = [bar for _, score in points if (bar := _bars(score)) is not None]
    ends = np.hstack(bars) if bars and len(bars) == len(points) else None
    means = [score.mean for _, score in points]
    axis.errorbar([x for x, _ in points], means, yerr=ends, elinewidth=0.6, label=label, **style)


def _cut_step(run: Run) -> int | None:
    return max((event["step"] for event in run.record.events if event["kind"] == "cut"), default=None)


def _omegas(run: Run) -> list[float]:
    """Return ω of every adapter at the cut of a `wlora` run, the disconnected ones included."""
    if run.method != "wlora":
        return []
    cuts = [event["omega"] for event in run.record.events if event["kind"] in ("cut", "select") and "omega" in event]
    return list(cuts[-1].values()) if cuts else []


def _summary(group: Sequence[Run], name: str) -> Summary:
    return summarize([run.score for run in group], generator(0, name))


def _bars(summary: Summary) -> np.ndarray | None:
    """Return the lengths of the error bars, [2, 1]; None without an interval."""
    if summary.low is None or summary.high is None:
        return None
    return np.array([[max(0.0, summary.mean - summary.low)], [max(0.0, summary.high - summary.mean)]])


def _legend(figure: Figure, axes: Sequence[Axes], more: dict[str, Any] | None = None) -> None:
    """Put one legend for all panels below them, in as many columns as the page takes."""
    once: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            once.setdefault(label, handle)
    once |= more or {}
    for columns in range(min(len(once), 4), 0, -1):
        legend = figure.legend(list(once.values()), list(once), loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()
