"""Figures of scores: against cost (`pareto`), rate (`rates`), K, T and ω (`selection`), and over training (`curves`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from wlora.analysis.figures.canvas import COLUMN, PAGE, count_axis, new_figure, nothing, side_by_side, style_of
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
# The last bar of the histogram of ω counts all values from this one on: at a high learning rate a single ω may be 50.
LARGEST_OMEGA = 2.0


def pareto(runs: Sequence[Run]) -> Figure:
    """Draw score against cost, one point per setting, with 95 % intervals.

    Costs are trained parameters, training seconds on the machine with most of the runs, and, if all records have them, the
    bytes saved for the backward pass. Settings with equal numbers of parameters are drawn side by side.
    """
    chosen = chosen_runs(runs)
    if not chosen:
        raise nothing("pareto", "no successful run")
    tasks, labels = tasks_of(run for group in chosen.values() for run in group), list(dict.fromkeys(k for k, _ in chosen))
    styles = style_of(labels)
    machine = Counter(run.machine for group in chosen.values() for run in group).most_common(1)[0][0]
    costs: dict[str, _Cost] = {
        "trained parameters without the head": lambda group: Summary(float(np.mean([_trained(run) for run in group]))),
        f"training seconds\n{machine}": lambda group: _seconds(group, machine),
    }
    if all("saved" in run.record.memory for group in chosen.values() for run in group):
        costs["MiB saved for the backward pass"] = lambda group: Summary(
            float(np.mean([run.record.memory["saved"] for run in group])) / 2**20
        )
    figure, axes = new_figure(len(costs), len(tasks), width=max(COLUMN, min(PAGE, 2.4 * len(tasks))), height=2.2)
    for column, task in enumerate(tasks):
        groups = {label: chosen[label, task] for label in labels if (label, task) in chosen}
        for line, (title, cost) in zip(axes, costs.items(), strict=True):
            axis = line[column]
            _draw_costs(axis, groups, cost, styles, task, apart=title.startswith("trained"))
            axis.set_xlabel(title)
            axis.set_ylabel(_metric(chosen, task))
        _count_scale(axes[0][column], max(_trained(run) for group in chosen.values() for run in group))
        axes[0][column].set_title(TITLES.get(task, task))
    _legend(figure, axes[0])
    return figure


_Cost = Callable[[Sequence[Run]], Summary | None]


def _seconds(group: Sequence[Run], machine: str) -> Summary | None:
    """Summarise the training seconds of the runs on one machine. Times of different machines are not comparable."""
    values = [run.record.seconds["train"] for run in group if run.machine == machine]
    return summarize(values, generator(0, f"{group[0].record.run_id} seconds")) if values else None


def _draw_costs(
    axis: Axes,
    groups: dict[str, list[Run]],
    cost: _Cost,
    styles: dict[str, dict[str, Any]],
    task: str,
    *,
    apart: bool,
) -> None:
    found = {label: price for label, group in groups.items() if (price := cost(group)) is not None}
    means = [price.mean for price in found.values()]
    for (label, price), x in zip(found.items(), side_by_side(means, ratio=1.2, widest=4.0) if apart else means, strict=True):
        score = _summary(groups[label], f"{label} {task}")
        style: dict[str, Any] = {"color": styles[label]["color"], "fmt": styles[label]["marker"], "label": label}
        style |= {"elinewidth": 0.6, "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.3}
        axis.errorbar(x, score.mean, xerr=_bars(price), yerr=_bars(score), **style)


def _count_scale(axis: Axes, largest: int) -> None:
    """Make an axis of parameter counts logarithmic, with a place for 0 (only the head is trained)."""
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
            if metric.shape[1] > 1:
                _draw_band(lower, metric, label, style, marker=styles[label]["marker"])
            events = (event for run in chosen[label, task] for event in run.record.events)
            moments = sorted({event["step"] for event in events if event["kind"] in MARKED})
            for moment in moments if len(moments) <= 4 else (moments[0], moments[-1]):
                for axis in (upper, lower):
                    axis.axvline(moment, color=style["color"], linewidth=0.5, linestyle=":")
        upper.set_title(TITLES.get(task, task))
        upper.set_ylabel("training loss, smoothed")
        lower.set_ylabel(_metric(chosen, task))
        if not any(band[1].shape[1] > 1 for (_, where), band in bands.items() if where == task and band):
            _leave_out(lower, "a single evaluation,\nwhich the tables show")
        for axis in (upper, lower):
            axis.set_xlim(left=0)
        lower.set_xlabel("optimiser step")
    changes = Line2D([], [], color="0.3", linewidth=0.5, linestyle=":")
    _legend(figure, axes[0], {"adapters cut or grown": changes})
    return figure


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
    tasks, labels = tasks_of(run for group in groups.values() for run in group), list(dict.fromkeys(k for k, _ in found))
    styles = style_of(labels)
    wide = len(tasks) > 1 or len(labels) > 6
    figure, axes = new_figure(1, len(tasks), width=PAGE if wide else COLUMN, height=2.2)
    star: dict[str, Any] = {"marker": "*", "markersize": 6, "linestyle": "none"}
    star |= {"markeredgewidth": 0.4, "markeredgecolor": "black"}
    for axis, task in zip(axes[0], tasks, strict=True):
        every = {run.point.lr for (_, where), group in groups.items() if where == task for run in group}
        here = [label for label in labels if (label, task) in found]
        stars = side_by_side([found[label, task][0].point.lr for label in here], ratio=1.05, widest=1.2)
        for label, place in zip(here, stars, strict=True):
            choice, group = found[label, task]
            lines = {rate: _summary(kept, f"{label} {task} {rate}") for rate, kept in _along_rates(choice, group).items()}
            _draw_line(axis, list(lines.items()), label, styles[label])
            reported = [run for run in choice.reported(group) if run.status == "success"]
            if reported:
                score, style = _summary(reported, f"{label} {task}"), {**star, "color": styles[label]["color"]}
                axis.errorbar([place], [score.mean], yerr=_bars(score), elinewidth=0.6, zorder=5, **style)
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
    figure, axes = new_figure(rows, len(tasks), width=max(COLUMN, min(PAGE, 2.4 * len(tasks))), height=1.7)
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
            axis.set_ylabel(_metric(chosen, task))
            count_axis(axis)
        for axis in by_steps:
            if not by_t[task]:
                _leave_out(axis, "a single T")
        _draw_omegas(histogram, [w for group in mine for run in group for w in _omegas(run)])
    _legend(figure, [axis for line in axes[:-1] for axis in line])
    return figure


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
        mean = _summary(group, f"lora {task}").mean
        axis.axhline(mean, color="black", linewidth=0.8, linestyle="--", label=LABELS["lora"])
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, mean - 0.06 * (high - low)), max(high, mean + 0.06 * (high - low)))


def _leave_out(axis: Axes, why: str) -> None:
    """Hide a panel and write the reason in its place."""
    axis.clear()
    axis.set_axis_off()
    axis.text(0.5, 0.5, why, ha="center", va="center", color="0.4", transform=axis.transAxes)


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
    """Draw one legend for all panels below them, in as many columns as fit on the page."""
    once: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            once.setdefault(label, handle)
    once |= more or {}
    for columns in range(min(len(once), 4), 0, -1):
        legend = figure.legend(list(once.values()), list(once), loc="outside lower center", ncols=columns)
        box = legend.get_window_extent()
        if columns == 1 or box.width <= figure.bbox.width:
            # Enlarge the figure by the legend's height, so that the panels keep their size.
            figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)
            return
        legend.remove()
