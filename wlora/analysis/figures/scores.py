"""Figures of scores: against rate (`rates`), K, T and ω (`selection`), and over training (`curves`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from wlora.analysis.figures.canvas import (
    COLUMN,
    PAGE,
    add_legend,
    count_axis,
    error_bars,
    leave_out,
    mean_score,
    metric_name,
    new_figure,
    nothing,
    page_width,
    side_by_side,
    style_of,
    tasks_and_labels,
)
from wlora.analysis.series import smooth
from wlora.analysis.statistics import Summary
from wlora.analysis.study import Run
from wlora.analysis.study_reader import read_curve
from wlora.analysis.tables.layouts import LABELS, row_of
from wlora.analysis.tables.settings import TITLES, chosen_runs, runs_by_setting, tasks_of
from wlora.analysis.tuning import Choice, choose_point
from wlora.storage.records import RecordStore

# Kinds of events that a learning curve marks.
MARKED = ("cut", "select", "extend", "grow", "prune", "share", "allocate")
# Settings in one panel besides LoRA. The lines of more could not be told apart.
LINES = 8
# The mark of a chosen rate.
STAR: dict[str, Any] = {
    "marker": "*",
    "markersize": 6,
    "linestyle": "none",
    "markeredgewidth": 0.4,
    "markeredgecolor": "black",
}
# The last bar of the histogram of ω counts all values from this one on: at a high learning rate a single ω may be 50.
LARGEST_OMEGA = 2.0


def curves(runs: Sequence[Run], store: RecordStore) -> Figure:
    """Draw loss (smoothed) and primary metric over the steps, mean and range over seeds; dotted: cuts and growths."""
    chosen = chosen_runs(runs)
    bands = {key: _read_bands(group, store) for key, group in chosen.items()}
    if not any(bands.values()):
        raise nothing("curves", f"no learning curve of a successful run in {store.folder}")
    tasks, labels = tasks_and_labels(chosen)
    styles, rows = style_of(labels), _rows(chosen)
    figure, axes = new_figure(2 * len(rows), len(tasks), width=page_width(len(tasks)), height=1.8)
    for row, shown in enumerate(rows):
        for column, task in enumerate(tasks):
            upper, lower = axes[2 * row][column], axes[2 * row + 1][column]
            here = {label: found for label in shown if (found := bands.get((label, task))) is not None}
            if not here:
                leave_out(upper)
                leave_out(lower)
                continue
            for label, found in here.items():
                _draw_curves(upper, lower, found, label, styles[label], chosen[label, task])
            upper.set_title(TITLES.get(task, task))
            upper.set_ylabel("training loss, smoothed")
            lower.set_ylabel(metric_name(chosen, task))
            if not any(metric.shape[1] > 1 for _, metric in here.values()):
                leave_out(lower, "a single evaluation,\nwhich the tables show")
            for axis in (upper, lower):
                axis.set_xlim(left=0)
            lower.set_xlabel("optimiser step")
    changes = Line2D([], [], color="0.3", linewidth=0.5, linestyle=":")
    add_legend(figure, [axis for line in axes for axis in line], {"adapters cut or grown": changes})
    return figure


def _draw_curves(
    upper: Axes,
    lower: Axes,
    bands: tuple[np.ndarray, np.ndarray],
    label: str,
    style: dict[str, Any],
    group: Sequence[Run],
) -> None:
    """Draw loss and metric of a setting, and the steps at which its runs cut or grow adapters, at most four of them."""
    losses, metric = bands
    line = {key: style[key] for key in ("color", "linestyle")}
    _draw_band(upper, losses, label, line)
    if metric.shape[1] > 1:
        _draw_band(lower, metric, label, line, marker=style["marker"])
    moments = sorted({event["step"] for run in group for event in run.record.events if event["kind"] in MARKED})
    for moment in moments if len(moments) <= 4 else (moments[0], moments[-1]):
        for axis in (upper, lower):
            axis.axvline(moment, color=style["color"], linewidth=0.5, linestyle=":")


def _read_bands(group: Sequence[Run], store: RecordStore) -> tuple[np.ndarray, np.ndarray] | None:
    """Return smoothed loss and primary metric of the runs of a setting; None if none has a curve.

    Curves are read one setting at a time, because those of a large study do not fit in memory.
    """
    metric, losses, scores = group[0].record.primary_metric, [], []
    for run in group:
        curve = read_curve(store, run)
        losses.append(smooth([(p["step"], p["loss"]) for p in curve if "loss" in p]))
        scores.append([(p["step"], p["metrics"][metric]) for p in curve if metric in p.get("metrics", {})])
    return (_band(losses), _band(scores)) if any(losses) or any(scores) else None


def _band(series: Sequence[Sequence[tuple[int, float]]]) -> np.ndarray:
    """Return an array of shape [4, steps]: the steps that all curves have, and the mean, lowest and highest value there."""
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
    """Draw score against learning rate, one line per setting, with intervals over seeds. Stars mark the chosen rates.

    A line shows the reported seeds if they have run at all of its rates; otherwise it shows the tuning seed.
    """
    found = {key: (choice, group) for key, group in runs_by_setting(runs).items() if (choice := _compared(group))}
    if not found:
        raise nothing(
            "rates", "no setting with successful runs at several learning rates, as -m lr=3e-4,1e-3,3e-3 makes them"
        )
    groups = {key: group for key, (_, group) in found.items()}
    tasks, labels = tasks_and_labels(groups)
    styles, rows = style_of(labels), _rows(groups)
    wide = len(tasks) > 1 or len(labels) > 6
    figure, axes = new_figure(len(rows), len(tasks), width=PAGE if wide else COLUMN, height=2.2)
    for shown, line in zip(rows, axes, strict=True):
        for axis, task in zip(line, tasks, strict=True):
            here = {label: found[label, task] for label in shown if (label, task) in found}
            if not here:
                leave_out(axis)
                continue
            _draw_rates(axis, here, task, styles, upright=wide)
            axis.set_title(TITLES.get(task, task))
            axis.set_xlabel("learning rate")
            axis.set_ylabel(metric_name(groups, task))
    chosen = Line2D([], [], color="0.8", **STAR)
    add_legend(figure, [axis for line in axes for axis in line], {"chosen, over the reported seeds": chosen})
    return figure


def _draw_rates(
    axis: Axes,
    found: dict[str, tuple[Choice, list[Run]]],
    task: str,
    styles: dict[str, dict[str, Any]],
    *,
    upright: bool,
) -> None:
    """Draw the settings of one panel, whose rates stand upright below it if there are many and the panel is narrow."""
    stars = side_by_side([choice.point.lr for choice, _ in found.values()], ratio=1.05, widest=1.2)
    for (label, (choice, group)), place in zip(found.items(), stars, strict=True):
        by_rate = _along_rates(choice, group).items()
        points = [(rate, mean_score(kept, f"{label} {task} {rate}")) for rate, kept in by_rate]
        _draw_line(axis, points, label, styles[label])
        reported = [run for run in choice.reported(group) if run.status == "success"]
        if reported:
            score, style = mean_score(reported, f"{label} {task}"), {**STAR, "color": styles[label]["color"]}
            axis.errorbar([place], [score.mean], yerr=error_bars(score), elinewidth=0.6, zorder=5, **style)
    every = sorted({run.point.lr for _, group in found.values() for run in group})
    names = [np.format_float_scientific(rate, trim="-", exp_digits=1) for rate in every]
    axis.set_xscale("log")
    axis.set_xticks(every, names, rotation=90 if upright and len(every) > 4 else 0)
    axis.minorticks_off()


def _rows(groups: dict[tuple[str, str], list[Run]]) -> list[list[str]]:
    """Divide the settings into rows of panels, so that no panel has more than LoRA and `LINES` others.

    Each model and targets have their own rows, and each row shows their LoRA. Methods without targets, such as full
    fine-tuning, go to the targets with most settings.
    """
    first = {label: group[0] for (label, _), group in groups.items()}
    if len(first) <= LINES + 1:
        return [list(first)]
    sizes = [size for size, _ in Counter(map(_size, filter(_has_targets, first.values()))).most_common()]
    by_size: dict[tuple[str, str], list[str]] = {size: [] for size in sizes}
    for label, run in first.items():
        home = _size(run) if _has_targets(run) or not sizes else sizes[0]
        by_size.setdefault(home, []).append(label)
    rows = []
    for labels in by_size.values():
        reference = [label for label in labels if first[label].method == "lora"][:1]
        others = [label for label in labels if label not in reference]
        for part in np.array_split(others, max(1, -(-len(others) // LINES))):
            rows.append([*reference, *map(str, part)])
    return rows


def _compared(group: Sequence[Run]) -> Choice | None:
    """Return the choice of a setting that has succeeded at several rates."""
    several = len({run.point.lr for run in group if run.status == "success"}) > 1
    return choose_point(group) if several else None


def _along_rates(choice: Choice, group: Sequence[Run]) -> dict[float, list[Run]]:
    """Return the successful runs at each rate: of the reported seeds if they have run at all rates, else of the tuning seed.

    If there are several points with the same rate, only the best point counts.
    """
    by_rate: dict[float, list[Run]] = {}
    for rate in sorted({run.point.lr for run in group}):
        at_rate = [run for run in group if run.point.lr == rate]
        best = choose_point(at_rate)
        by_rate[rate] = [run for run in at_rate if best and run.point == best.point]
    seeds = {run.seed for run in choice.reported(group)}
    seeds = {seed for seed in seeds if all(seed in {run.seed for run in at_rate} for at_rate in by_rate.values() if at_rate)}
    shown = {
        rate: [run for run in at_rate if run.seed in seeds or (not seeds and run.config_seed == choice.seed)]
        for rate, at_rate in by_rate.items()
    }
    succeeded = {rate: [run for run in kept if run.status == "success"] for rate, kept in shown.items()}
    return {rate: kept for rate, kept in succeeded.items() if kept}


def selection(runs: Sequence[Run]) -> Figure:
    """Draw score against K (at the default T) and against T, with LoRA as a line, and the histogram of ω at the cut.

    Only the model and targets with most runs are drawn, because K counts among the adapters of these. If several settings
    have the same method, K and T, the one with most runs is drawn. The row of panels for T is drawn only if there are
    several values of T.
    """
    chosen = chosen_runs(runs)
    selecting = [run for group in chosen.values() for run in group if run.k is not None]
    if not selecting:
        raise nothing("selection", "no successful run of a method that reads k; scripts/k_curve.sh makes them")
    ((size, _),) = Counter(map(_size, selecting)).most_common(1)
    chosen = {key: group for key, group in chosen.items() if _size(group[0]) == size}
    selecting = [run for run in selecting if _size(run) == size]
    tasks = tasks_of(selecting)
    by_t = {task: _several_t([group for (_, where), group in chosen.items() if where == task]) for task in tasks}
    rows = 3 if any(by_t.values()) else 2
    figure, axes = new_figure(rows, len(tasks), width=page_width(len(tasks)), height=1.7)
    styles = style_of(list(dict.fromkeys(name for run in selecting for name in (LABELS[run.method], _row(run)))))
    for column, task in enumerate(tasks):
        mine = [group for (_, where), group in chosen.items() if where == task]
        by_k, *by_steps, histogram = (line[column] for line in axes)
        default_steps = [group for group in mine if group[0].setting.get("method.select_steps") is None]
        shown = _largest(
            [group for group in default_steps or mine if group[0].k is not None], lambda run: (run.method, run.k)
        )
        _draw_against(by_k, shown, lambda run: run.k, lambda run: LABELS[run.method], styles)
        by_k.set_title(TITLES.get(task, task))
        by_k.set_xlabel("K, adapters kept")
        for axis in by_steps:
            _draw_against(axis, by_t[task], _cut_step, _row, styles)
            axis.set_xlabel("T, steps of selection")
        for axis in (by_k, *by_steps):
            _draw_lora(axis, [group for group in mine if group[0].method == "lora"], task)
            axis.set_ylabel(metric_name(chosen, task))
            count_axis(axis)
        for axis in by_steps:
            if not by_t[task]:
                leave_out(axis, "a single T")
        _draw_omegas(histogram, [w for group in mine for run in group for w in _omegas(run)])
    add_legend(figure, [axis for line in axes[:-1] for axis in line])
    return figure


def _has_targets(run: Run) -> bool:
    return bool(run.setting.get("method.targets"))


def _size(run: Run) -> tuple[str, str]:
    """Return model and targets, on which the number of adapters depends."""
    return run.model, str(run.setting.get("method.targets"))


def _draw_omegas(axis: Axes, omegas: Sequence[float]) -> None:
    """Draw the histogram of ω, with the largest values in the last bar."""
    axis.hist([min(w, LARGEST_OMEGA) for w in omegas], bins=40, color="0.4")
    beyond = max(omegas, default=0) > LARGEST_OMEGA
    axis.set_xlabel("ω at WLoRA's cut, all adapters" + (f"\n(last bar: {LARGEST_OMEGA:g} and above)" if beyond else ""))
    axis.set_ylabel("adapters")


def _several_t(groups: Sequence[Sequence[Run]]) -> list[Sequence[Run]]:
    """Return the groups of `wlora` whose K has run at several T, one per K and T."""
    mine = _largest([group for group in groups if group[0].method == "wlora"], lambda run: (run.k, _cut_step(run)))
    counts = Counter(group[0].k for group in mine)
    return [group for group in mine if counts[group[0].k] > 1]


def _draw_lora(axis: Axes, groups: Sequence[Sequence[Run]], task: str) -> None:
    """Draw the mean score of each LoRA setting as a horizontal line, if it is inside the panel."""
    for group in groups:
        mean = mean_score(group, f"lora {task}").mean
        axis.axhline(mean, color="black", linewidth=0.8, linestyle="--", label=LABELS["lora"])
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, mean - 0.06 * (high - low)), max(high, mean + 0.06 * (high - low)))


def _largest(groups: Sequence[Sequence[Run]], key: Callable[[Run], object]) -> list[Sequence[Run]]:
    """Keep one group per key, the one with most runs. The others differ in a setting that the axis does not show."""
    kept: dict[object, Sequence[Run]] = {}
    for group in groups:
        if len(group) > len(kept.get(key(group[0]), ())):
            kept[key(group[0])] = group
    return list(kept.values())


def _row(run: Run) -> str:
    return row_of(run).label


def _draw_against(
    axis: Axes,
    groups: Sequence[Sequence[Run]],
    quantity: Callable[[Run], int | None],
    label: Callable[[Run], str],
    styles: dict[str, dict[str, Any]],
) -> None:
    """Draw scores with intervals against a number that is equal within each group. There is one line per label."""
    lines: dict[str, list[tuple[float, Summary]]] = {}
    for group in groups:
        value = quantity(group[0])
        if value is not None:
            name = label(group[0])
            lines.setdefault(name, []).append((value, mean_score(group, f"{name} {value}")))
    for name, points in lines.items():
        _draw_line(axis, sorted(points, key=lambda point: point[0]), name, styles[name])


def _draw_line(axis: Axes, points: Sequence[tuple[float, Summary]], label: str, style: dict[str, Any]) -> None:
    """Draw a line through means, with intervals where all points have one."""
    bars = [bar for _, score in points if (bar := error_bars(score)) is not None]
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
