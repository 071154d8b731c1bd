"""WeightLoRA+ (paper §3.4): select as WeightLoRA, then use the freed parameter budget for higher ranks."""

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
    """WeightLoRA whose cut also extends the survivors' ranks, so that the number of parameters stays constant.

    For modules of equal shape the new rank is r·n/K. Schedule `single` (the paper's text): T steps of WeightLoRA, then
    one cut to the top K and one extension. Schedule `halvings` (after the published code): n → n/2 adapters at T/2 and
    n/2 → n/4 at T, each with an extension. Both schedules project ω to the final number of adapters at every step.
    Without this, idle adapters, whose ω never moved from 1, could outrank the active ones at the second cut.

    Args:
        k: adapters to keep with `schedule=single`; `halvings` keeps n/4, rounded up.
        schedule: `single` or `halvings`.
        extension: `gaussian` or `qr` (`LowRankAdapter.extend`).
        rescale: after the extension, set s to alpha / rank and adjust B so that the function does not change. Otherwise
            s stays the same.
        keep_moments: with `gaussian`, keep the Adam moments of the old components.
        settings: arguments of `WLoRA`.
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
        """Determine T and the steps of the cuts.

        Raises:
            ConfigError: the configured T does not fit the run (`WLoRA.plan`), or is below the number of cuts.
        """
        rounds = HALVINGS if self.schedule == "halvings" else 1
        super().plan(steps)
        assert self.select_steps is not None
        if self.select_steps < rounds:
            raise wrong_value("method.select_steps", self.select_steps, f"at least {rounds} with method.schedule=halvings")
        self._cut_steps = [self.select_steps * (index + 1) // rounds for index in range(rounds)]

    def default_select_steps(self, steps: Steps) -> int:
        """Return the default T. With two cuts, ω must have received a gradient before the first cut, too."""
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
        """Project ω; at the cuts select the survivors and extend them."""
        if step > self._cut_steps[-1]:
            return []
        if step not in self._cut_steps:
            self._project(step)
            return []
        before = self.omegas()  # only at the cuts, because reading ω waits for the GPU
        self._project(step)
        final = step == self._cut_steps[-1]
        if final:
            survivors = self.choose(self.k)
        else:
            # After the active adapters come the inactive ones, in the order of ω before the projection set it to 0.
            after = self.omegas()
            self.check_informed(after, self._sizes[0])
            ranked = sorted(before, key=lambda name: (-after[name], -before[name]))
            survivors = ranked[: self._sizes[0]]
        event = self.cut(step, survivors, final=final)
        return [event, self._extend(step, self._spread(event.details["omega"]))]

    def _spread(self, omega: dict[str, float]) -> dict[str, int]:
        """Return the survivors' new ranks: as equal as possible, within the initial parameter budget.

        Components are assigned one by one to the adapter with the lowest rank, and among equal ranks to the one with
        the largest ω. This ends when no further component fits the budget. The rest is less than one component of the
        largest shape, unless every adapter has full rank.
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
        """Return the bounds: the budget, or K adapters of full rank if that is less.

        If shapes differ, up to one component of the largest shape may remain unused.
        """
        costs = {adapter.count() // adapter.rank for adapter in self.adapters.values()}
        widest = (min(a.A.shape[1], a.B.shape[0]) * a.count() // a.rank for a in self.adapters.values())
        least, most = bound_sum(widest, self.k)
        return min(least, self._budget - (max(costs) - 1 if len(costs) > 1 else 0)), min(most, self._budget)

    def _extend(self, step: int, ranks: dict[str, int]) -> Event:
        """Extend adapters to the given ranks."""
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
