"""WeightLoRA (the paper, §3.3): train a weight ω per adapter, keep the K largest, disconnect the rest."""

from __future__ import annotations

from torch import Tensor

from wlora.adapters.layer import Adapter
from wlora.errors import ConfigError, wrong_value
from wlora.methods.base import AdapterMethod, Event, Steps, bound_sum
from wlora.methods.parameter_groups import ParameterGroup
from wlora.methods.selection import project, top_k

# The first step within a warm-up at which ω has a gradient: the first update has rate 0, so B is 0 for two steps. A shorter
# T would choose by nothing, so it may exceed an epoch of one or two steps.
INFORMED_STEPS = 3


class WLoRA(AdapterMethod):
    """StoIHT on ω for T steps, then ω is fixed and every adapter outside the top K leaves the model.

    Until T a zeroed ω keeps receiving its gradient and may return.

    Args:
        k: adapters to keep; fewer are kept if fewer have ω > 0.
        lr_omega: learning rate of ω (the paper gives none; 5.0 in the release).
        select_steps: T, at most one epoch (paper §3.3); None means a tenth of the run, at most one epoch, at least 3 steps.
        project_every: steps between projections to the top K.
        omega_scheduled: whether the run's learning-rate schedule applies to ω.
        omega_clipped: whether ω counts in, and is scaled by, the clipping of gradients.
    """

    omega = 1.0
    startable = True

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        k: int,
        lr_omega: float,
        select_steps: int | None,
        project_every: int,
        omega_scheduled: bool = False,
        omega_clipped: bool = False,
    ) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout)
        self.k, self.lr_omega, self.project_every = k, lr_omega, project_every
        self.select_steps = select_steps
        self.omega_scheduled, self.omega_clipped = omega_scheduled, omega_clipped

    def plan(self, steps: Steps) -> None:
        """Fix T.

        Raises:
            ConfigError: an explicit T beyond the first epoch or the run; a run too short for any.
        """
        if self.select_steps is None:
            self.select_steps = self.default_select_steps(steps)
            if self.select_steps >= steps.total:
                raise ConfigError(
                    f"the run has {steps.total} optimiser steps: allowed is at least {self.select_steps + 1}, "
                    f"as a selection takes {self.select_steps}"
                )
        longest, reason = self.longest_select_steps(steps)
        if self.select_steps > longest:
            allowed = f"1 to {longest}, as the run has {steps.total} optimiser steps{reason}"
            raise wrong_value("method.select_steps", self.select_steps, allowed)

    def default_select_steps(self, steps: Steps) -> int:
        """Return T where none is given."""
        return max(INFORMED_STEPS, min(steps.per_epoch, steps.total // 10))

    def longest_select_steps(self, steps: Steps) -> tuple[int, str]:
        """Return the longest T that is allowed, and why, to go on with in a message."""
        longest = min(steps.total - 1, max(steps.per_epoch, INFORMED_STEPS))
        return longest, f", {steps.per_epoch} of them in an epoch, and T is at most one epoch"

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return A and B for AdamW, and ω for SGD."""
        omegas = [a.omega for a in self.adapters.values() if a.omega is not None]
        scheduled, clipped = self.omega_scheduled, self.omega_clipped
        return [*super().groups(lr), ParameterGroup(omegas, self.lr_omega, rule="sgd", scheduled=scheduled, clipped=clipped)]

    def after_step(self, step: int) -> list[Event]:
        """Project; at step T fix ω and cut."""
        assert self.select_steps is not None
        if step > self.select_steps:
            return []
        self._project(step)
        if step < self.select_steps:
            return []
        return [self.cut(step, self.choose(self.k))]

    def settled(self, step: int) -> bool:
        """The cut at T is the last change."""
        return self.select_steps is not None and step >= self.select_steps

    def mask(self, omega: Tensor) -> Tensor:
        """Return which adapters a projection keeps, [n] boolean, given all ω."""
        return top_k(omega, self.k)

    def choose(self, k: int) -> list[str]:
        """Return the names of the k adapters with the largest ω, those with ω ≤ 0 left out."""
        omega = self.omegas()
        self.check_informed(omega, k)
        ranked = sorted(omega, key=lambda name: -omega[name])
        return [name for name in ranked[:k] if omega[name] > 0]

    def cut(self, step: int, survivors: list[str], *, final: bool = True) -> Event:
        """Keep the survivors alone, and say what every ω was."""
        omega = self.omegas()
        self.keep(survivors, final=final)
        return Event(step, "cut", {"kept": list(self.adapters), "omega": omega, "lowest_layer": self.adapters.lowest_layer})

    def check_informed(self, omega: dict[str, float], k: int) -> None:
        """Refuse to choose k adapters by ω where no ω has had a gradient.

        Raises:
            ConfigError: T is too short for this warm-up.
        """
        if k < len(omega) and len(set(omega.values())) == 1:
            raise wrong_value(
                "method.select_steps",
                self.select_steps,
                "a longer one, as no omega has had a gradient when adapters are chosen; within a warm-up the first comes at "
                f"step {INFORMED_STEPS}",
            )

    def keep(self, survivors: list[str], *, final: bool = True) -> None:
        """Disconnect all but the survivors; `final` also fixes their ω."""
        for name in self.adapters:
            if name not in survivors:
                self.adapters.disconnect(name)
        if final:
            for adapter in self.adapters.values():
                adapter.fix_omega()

    def final_count(self) -> tuple[int, int]:
        """Return what K adapters have."""
        return bound_sum((adapter.count() for adapter in self.adapters.values()), self.k)

    def omegas(self) -> dict[str, float]:
        """Return ω of every connected adapter."""
        return {name: float(a.omega.detach()) for name, a in self.adapters.items() if a.omega is not None}

    def kept(self) -> dict[str, Adapter]:
        """Return the adapters that act: all connected ones, or in the release those with ω ≠ 0."""
        return {name: a for name, a in self.adapters.items() if a.omega is None or float(a.omega.detach()) != 0}

    def _project(self, step: int) -> None:
        if step % self.project_every == 0:
            project(self.adapters.values(), self.mask)
