"""Figures about single adapters: how often each is kept (`adapters`), and its product with the gradient (`dot_products`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch

from wlora.analysis.figures.canvas import COLOURS, COLUMN, PAGE, fit, new_figure, nothing, page_width, tasks_and_labels
from wlora.analysis.study import Run, require_one_setting
from wlora.analysis.tables.settings import TITLES, chosen_runs
from wlora.analysis.targets import selects, short_kind, targets_of

# An adapter is starred if at least this share of the runs keeps it.
STARRED = 0.5
STARS = 5


def adapters(runs: Sequence[Run]) -> Figure:
    """Draw how often each adapter is kept over seeds, by layer and module, with its mean ω and rank.

    There is one panel per task and selecting method. A cell is dark if every run keeps the adapter. Its text is the mean ω
    of the runs that keep it and, for methods that increase ranks, the mean rank.
    """
    chosen = {key: group for key, group in chosen_runs(runs).items() if selects(group[0])}
    if not chosen:
        raise nothing("adapters", "no successful run of a method that selects adapters, as wlora does")
    tasks, labels = tasks_and_labels(chosen)
    layers = max(target.layer for group in chosen.values() for target in targets_of(group[0])) + 1
    width = page_width(len(tasks), each=1.9)
    # The colour bar takes a seventh of the width.
    titles = {(label, task): fit(f"{TITLES.get(task, task)}, {label}", 6 / 7 * width / len(tasks)) for label, task in chosen}
    lines = max(title.count("\n") for title in titles.values())
    figure, axes = new_figure(len(labels), len(tasks), width=width, height=0.45 + 0.17 * layers + 0.11 * lines)
    for line, label in zip(axes, labels, strict=True):
        for axis, task in zip(line, tasks, strict=True):
            if (label, task) in chosen:
                image = _draw_kept(axis, chosen[label, task])
                axis.set_title(titles[label, task], fontsize=7)
            else:
                axis.set_axis_off()
    panels = [axis for line in axes for axis in line]
    # The colour bar is at most as tall as two rows of panels.
    height = min(0.8, 2 / len(axes))
    figure.colorbar(image, ax=panels, label="share of runs that keep the adapter", shrink=height, aspect=15)
    return figure


def _draw_kept(axis: Axes, runs: Sequence[Run]) -> AxesImage:
    targets = targets_of(runs[0])
    kinds = list(dict.fromkeys(target.kind for target in targets))
    place = {target.name: (target.layer, kinds.index(target.kind)) for target in targets}
    shape = (max(target.layer for target in targets) + 1, len(kinds))
    kept, omega, rank = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for run in runs:
        for adapter in run.record.adapters:
            if adapter["name"] not in place:
                raise nothing("adapters", f"record {run.record.run_id} has an adapter on {adapter['name']}, no target of it")
            where = place[adapter["name"]]
            kept[where] += 1
            omega[where] += adapter["omega"] if adapter["omega"] is not None else 1.0
            rank[where] += adapter["rank"]
    image = axis.imshow(kept / len(runs), cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    grown = any(adapter["rank"] != run.rank for run in runs for adapter in run.record.adapters)
    narrow = len(kinds) > 4
    for layer, kind in zip(*np.nonzero(kept), strict=True):
        count = kept[layer, kind]
        text = f"{omega[layer, kind] / count:.2f}" + (f"\nr={rank[layer, kind] / count:.0f}" if grown else "")
        size, colour = 3.5 if narrow else 4 if grown else 5, "white" if count / len(runs) > 0.6 else "black"
        axis.text(kind, layer, text, ha="center", va="center", fontsize=size, color=colour)
    axis.set_xticks(range(len(kinds)), [short_kind(kind) for kind in kinds], rotation=90 if narrow else 0)
    axis.set_yticks(range(0, shape[0], 1 if shape[0] <= 12 else 4))
    axis.set_ylabel("layer")
    return image


def dot_products(runs: Sequence[Run]) -> Figure:
    """Draw Figure 2: |⟨∇_W f, AB⟩| of every adapter trained alone, mean over seeds; those that WLoRA keeps are starred.

    An adapter is starred if at least half of the reported `wlora` runs of the same model, task and targets keep it. If some
    of these runs have K = 5, the paper's number of stars, only they count.
    """
    single = [run for run in runs if run.method == "single" and run.status == "success"]
    if not single:
        raise nothing("dot_products", "no successful run of method=single; scripts/figure2.sh makes them")
    require_one_setting(single, "figure dot_products", part="task.")
    require_one_setting(single, "figure dot_products", ignore=["method.index"])
    products: dict[str, list[float]] = {}
    for run in single:
        for event in run.record.events:
            if event["kind"] == "dot_product" and {"adapter", "value"} <= event.keys():
                products.setdefault(event["adapter"], []).append(abs(event["value"]))
    targets = targets_of(single[0])
    if not products.keys() & {target.name for target in targets}:
        raise nothing("dot_products", f"record {single[0].record.run_id} has no product of any of its targets")
    kinds = list(dict.fromkeys(target.kind for target in targets))
    starred = _starred(runs, single[0])
    figure, ((axis,),) = new_figure(1, 1, width=PAGE if len(targets) > 20 else COLUMN, height=1.9)
    largest = max(float(np.mean(values)) for values in products.values())
    for position, target in enumerate(targets):
        values = products.get(target.name)
        if values is None:
            continue
        mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        colour = COLOURS[kinds.index(target.kind) % len(COLOURS)]
        axis.bar(position, mean, yerr=spread or None, color=colour, width=0.8, error_kw={"linewidth": 0.6})
        if target.name in starred:
            axis.annotate("★", (position, mean + spread + 0.02 * largest), ha="center", fontsize=6, fontfamily="DejaVu Sans")
    per_layer = len(kinds)
    layers = range(len(targets) // per_layer)
    axis.set_xticks([(layer + 0.5) * per_layer - 0.5 for layer in layers], [str(layer) for layer in layers])
    axis.set_xlabel("layer (★: kept by WLoRA)" if starred else "layer")
    axis.set_ylabel(r"$|\langle \nabla_W f, AB \rangle|$")
    seeds = max(len(values) for values in products.values())
    note = f"mean over {seeds} seeds" if seeds > 1 else "one seed"
    axis.set_title(f"{single[0].model}, {TITLES.get(single[0].task, single[0].task)}, {note}")
    axis.legend(handles=[Patch(color=COLOURS[i % len(COLOURS)], label=short_kind(kind)) for i, kind in enumerate(kinds)])
    return figure


def _starred(runs: Iterable[Run], like: Run) -> set[str]:
    groups = [
        group
        for group in chosen_runs(runs).values()
        if (group[0].method, group[0].model, group[0].task) == ("wlora", like.model, like.task)
        and group[0].setting["method.targets"] == like.setting["method.targets"]
    ]
    mine = [run for group in ([group for group in groups if group[0].k == STARS] or groups) for run in group]
    kept = Counter(adapter["name"] for run in mine for adapter in run.record.adapters)
    return {name for name, count in kept.items() if count >= STARRED * len(mine)}
