"""The figure of scores against costs (`pareto`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wlora.analysis.figures.canvas import (
    add_legend,
    error_bars,
    fit,
    mean_score,
    metric_name,
    new_figure,
    nothing,
    page_width,
    side_by_side,
    style_of,
    tasks_and_labels,
)
from wlora.analysis.statistics import Summary, generator, summarize
from wlora.analysis.study import Run
from wlora.analysis.tables.settings import TITLES, chosen_runs
from wlora.analysis.targets import selects

# Training seconds are drawn only if, in no setting, one run took more than this many times as long as another.
UNSTEADY = 2


def pareto(runs: Sequence[Run]) -> Figure:
    """Draw score against cost, one point per setting, with 95 % intervals.

    Costs are trained parameters, training seconds on the machine with most of the runs if they are steady there, and, if
    all records have them, the bytes saved for the backward pass. Settings with equal numbers of parameters are drawn side
    by side.
    """
    chosen = chosen_runs(runs)
    if not chosen:
        raise nothing("pareto", "no successful run")
    tasks, labels = tasks_and_labels(chosen)
    styles = style_of(labels)
    machine = Counter(run.machine for group in chosen.values() for run in group).most_common(1)[0][0]
    costs: dict[str, _Cost] = {
        "trained parameters without the head": lambda group: Summary(float(np.mean([run.trained for run in group])))
    }
    if all(_steady(group, machine) for group in chosen.values()):
        costs[f"training seconds\n{machine}"] = lambda group: _seconds(group, machine)
    if all("saved" in run.record.memory for group in chosen.values() for run in group):
        costs["MiB saved for the backward pass"] = lambda group: Summary(
            float(np.mean([run.record.memory["saved"] for run in group])) / 2**20
        )
    width = page_width(len(tasks))
    figure, axes = new_figure(len(costs), len(tasks), width=width, height=2.2)
    for column, task in enumerate(tasks):
        groups = {label: chosen[label, task] for label in labels if (label, task) in chosen}
        for line, (title, cost) in zip(axes, costs.items(), strict=True):
            axis = line[column]
            _draw_costs(axis, groups, cost, styles, task, apart=title.startswith("trained"))
            axis.set_xlabel(fit(title, width / len(tasks)))
            axis.set_ylabel(metric_name(chosen, task))
        _count_scale(axes[0][column], max(run.trained for group in chosen.values() for run in group))
        axes[0][column].set_title(TITLES.get(task, task))
    add_legend(figure, axes[0])
    return figure


_Cost = Callable[[Sequence[Run]], Summary | None]


def _seconds(group: Sequence[Run], machine: str) -> Summary | None:
    """Summarise the training seconds of the runs on one machine. Times of different machines are not comparable."""
    values = _times(group, machine)
    return summarize(values, generator(0, f"{group[0].record.run_id} seconds")) if values else None


def _times(group: Sequence[Run], machine: str) -> list[float]:
    return [run.record.seconds["train"] for run in group if run.machine == machine]


def _steady(group: Sequence[Run], machine: str) -> bool:
    """Tell whether runs that do the same work took similar times; if not, the machine had other work to do.

    Runs that keep different adapters do different work.
    """
    values = _times(group, machine)
    return not values or selects(group[0]) or max(values) <= UNSTEADY * min(values)


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
        score = mean_score(groups[label], f"{label} {task}")
        style: dict[str, Any] = {"color": styles[label]["color"], "fmt": styles[label]["marker"], "label": label}
        style |= {"elinewidth": 0.6, "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.3}
        axis.errorbar(x, score.mean, xerr=error_bars(price), yerr=error_bars(score), **style)


def _count_scale(axis: Axes, largest: int) -> None:
    """Make an axis of parameter counts logarithmic, with a place for 0 (only the head is trained)."""
    axis.set_xscale("symlog", linthresh=1000)
    axis.set_xticks([0, *(10**power for power in range(4, len(str(largest)) + 1))])
    axis.minorticks_off()
