"""WeightLoRA+ (the paper, §3.4): select as WeightLoRA, then spend the freed budget on higher ranks."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import nn

from wlora.adapters.layer import Extension
from wlora.errors import wrong_value
from wlora.methods.base import Event, Setting, Steps, bound_sum
from wlora.methods.wlora import INFORMED_STEPS, WLoRA

HALVINGS = 2


class WLoRAPlus(WLoRA):
    """WeightLoRA, whose cut also extends the survivors' ranks so that the number of parameters stays (equal shapes: r·n/K).

    Schedule `single` (the paper's text): T steps of WeightLoRA, then one cut to the top K and one growth. Schedule
    `halvings` (after the release): n → n/2 adapters at T/2, → n/4 at T, each with a growth. Both project ω to the final
    number at every step, so that the adapters that act at one cut are not overtaken at the next by idle ones, whose ω
    has never moved from 1.

    Args:
        k: adapters to keep with `schedule=single`; `halvings` keeps n/4, rounded up.
        schedule: `single` or `halvings`.
        extension: `gaussian` or `qr` (`LowRankAdapter.extend`).
        rescale: set s to alpha / rank after the growth, and B so that the function stays; else s stays.
        keep_moments: with `gaussian`, let the old components keep their Adam moments.
        settings: of `WLoRA`.
    """

    def __init__(
        self,
        *,
        schedule: Literal["single", "halvings"],
        extension: Extension,
        rescale: bool,
        keep_moments: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.schedule, self.extension, self.rescale, self.keep_moments = schedule, extension, rescale, keep_moments

    def plan(self, steps: Steps) -> None:
        """Fix T, and with it the steps of the cuts.

        Raises:
            ConfigError: an explicit T that does not fit (`WLoRA.plan`), or is below the number of cuts.
        """
        rounds = HALVINGS if self.schedule == "halvings" else 1
        super().plan(steps)
        assert self.select_steps is not None
        if self.select_steps < rounds:
            raise wrong_value("method.select_steps", self.select_steps, f"at least {rounds} with method.schedule=halvings")
        self._cut_steps = [self.select_steps * (index + 1) // rounds for index in range(rounds)]

    def default_select_steps(self, steps: Steps) -> int:
        """Return T where none is given; with two cuts the first one, too, needs an ω that has had a gradient."""
        least = INFORMED_STEPS * HALVINGS if self.schedule == "halvings" else INFORMED_STEPS
        return max(least, super().default_select_steps(steps))

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach an adapter to every target."""
        super().attach(model, setting)
        self._budget = self.adapters.count()
        n = len(self.adapters)
        if self.schedule == "halvings":
            self.k = math.ceil(n / 4)
        self._sizes = [math.ceil(n / 2), self.k] if self.schedule == "halvings" else [self.k]

    def after_step(self, step: int) -> list[Event]:
        """Project, and at the cuts select and extend the survivors."""
        if step > self._cut_steps[-1]:
            return []
        if step not in self._cut_steps:
            self._project(step)
            return []
        before = self.omegas()  # at the cuts alone: every ω is waited for on a GPU
        self._project(step)
        final = step == self._cut_steps[-1]
        if final:
            survivors = self.choose(self.k)
        else:
            # Beside those that act, the first of the others by ω as it was before the projection set it to 0.
            after = self.omegas()
            self.check_informed(after, self._sizes[0])
            ranked = sorted(before, key=lambda name: (-after[name], -before[name]))
            survivors = ranked[: self._sizes[0]]
        event = self.cut(step, survivors, final=final)
        return [event, self._extend(step, self._spread(event.details["omega"]))]

    def _spread(self, omega: dict[str, float]) -> dict[str, int]:
        """Return ranks for the survivors that together spend the parameters of the start, as equal as they can be.

        Components are handed out one by one, to the adapter of the lowest rank and among these to the largest ω, until none
        fits: what is left is less than one component of the largest shape, unless all are as wide as their linear.
        """
        survivors = sorted(self.adapters, key=lambda name: -omega[name])
        ranks = {name: self.adapters[name].rank for name in survivors}
        cost = {name: self.adapters[name].count() // ranks[name] for name in survivors}
        widest = {name: min(self.adapters[name].A.shape[1], self.adapters[name].B.shape[0]) for name in survivors}
        left = self._budget - self.adapters.count()
        while able := [name for name in survivors if ranks[name] < widest[name] and cost[name] <= left]:
            lowest = min(able, key=lambda name: ranks[name])
            ranks[lowest] += 1
            left -= cost[lowest]
        return ranks

    def final_count(self) -> tuple[int, int]:
        """Return the budget, or what K adapters as wide as their linears have, less one component where shapes differ."""
        costs = {adapter.count() // adapter.rank for adapter in self.adapters.values()}
        widest = (min(a.A.shape[1], a.B.shape[0]) * a.count() // a.rank for a in self.adapters.values())
        least, most = bound_sum(widest, self.k)
        return min(least, self._budget - (max(costs) - 1 if len(costs) > 1 else 0)), min(most, self._budget)

    def _extend(self, step: int, ranks: dict[str, int]) -> Event:
        """Grow adapters to the given ranks."""
        for name, rank in ranks.items():
            adapter = self.adapters[name]
            adapter.extend(
                min(rank, adapter.A.shape[1], adapter.B.shape[0]),
                how=self.extension,
                generator=self.generator,
                keep_moments=self.keep_moments,
            )
            if self.rescale:
                adapter.rescale(self.alpha / adapter.rank)
        return Event(step, "extend", {"ranks": {name: self.adapters[name].rank for name in ranks}})
