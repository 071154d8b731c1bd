"""WeightLoRA (paper §3.3): train a weight ω per adapter, keep the K adapters with the largest ω, disconnect the rest."""

from __future__ import annotations

from torch import Tensor

from wlora.adapters.layer import Adapter
from wlora.errors import ConfigError, wrong_value
from wlora.methods.base import AdapterMethod, Event, Steps, bound_sum
from wlora.methods.parameter_groups import ParameterGroup
from wlora.methods.selection import project, top_k

# First step with a nonzero gradient of ω when there is a warm-up: the first update has learning rate 0, so B = 0 for
# two steps. With a shorter T the selection would have no information, so T may exceed an epoch of one or two steps.
INFORMED_STEPS = 3


class WLoRA(AdapterMethod):
    """StoIHT on ω for T steps. Then ω is fixed and every adapter outside the top K leaves the model.

    Before step T an ω that was set to zero still receives its gradient, so its adapter can return.

    Args:
        k: adapters to keep; fewer are kept if fewer have ω > 0.
        lr_omega: learning rate of ω (not given in the paper; 5.0 in the published code).
        select_steps: T, at most one epoch (paper §3.3). None means a tenth of the run, at most one epoch, at least 3
            steps.
        project_every: steps between projections to the top K.
        omega_scheduled: whether the run's learning-rate schedule applies to ω.
        omega_clipped: whether gradient clipping includes ω.
    """

    omega = 1.0
    startable = True
    packable = True

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
        """Determine T.

        Raises:
            ConfigError: the configured T exceeds the first epoch or the run; the run is too short for a selection.
        """
        if self.select_steps is None:
            self.select_steps = self.default_select_steps(steps)
            if self.select_steps >= steps.total:
                raise ConfigError(
                    f"the run has {steps.total} optimiser steps: allowed is at least {self.select_steps + 1}, "
                    f"as a selection takes {self.select_steps}\n"
                    "way out: more epochs (task.epochs), or train.max_steps"
                )
        longest, reason = self.longest_select_steps(steps)
        if self.select_steps > longest:
            allowed = f"1 to {longest}, as the run has {steps.total} optimiser steps{reason}"
            raise wrong_value("method.select_steps", self.select_steps, allowed)

    def default_select_steps(self, steps: Steps) -> int:
        """Return the default T."""
        return max(INFORMED_STEPS, min(steps.per_epoch, steps.total // 10))

    def longest_select_steps(self, steps: Steps) -> tuple[int, str]:
        """Return the largest allowed T, and the reason as the end of an error message."""
        longest = min(steps.total - 1, max(steps.per_epoch, INFORMED_STEPS))
        return longest, f", {steps.per_epoch} of them in an epoch, and T is at most one epoch"

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return A and B for AdamW, and ω for SGD."""
        omegas = [a.omega for a in self.adapters.values() if a.omega is not None]
        scheduled, clipped = self.omega_scheduled, self.omega_clipped
        return [*super().groups(lr), ParameterGroup(omegas, self.lr_omega, rule="sgd", scheduled=scheduled, clipped=clipped)]

    def after_step(self, step: int) -> list[Event]:
        """Project ω; at step T fix ω and remove the adapters that were not selected."""
        assert self.select_steps is not None
        if step > self.select_steps:
            return []
        self._project(step)
        if step < self.select_steps:
            return []
        return [self.cut(step, self.choose(self.k))]

    def settled(self, step: int) -> bool:
        """Return whether the cut at T, the last change, is done."""
        return self.select_steps is not None and step >= self.select_steps

    def last_change(self) -> int:
        """Return T, the step of the cut."""
        return self.select_steps or 0

    def mask(self, omega: Tensor) -> Tensor:
        """Return which adapters a projection keeps, as a boolean tensor of shape [n], given all ω."""
        return top_k(omega, self.k)

    def choose(self, k: int) -> list[str]:
        """Return the names of the k adapters with the largest ω, without those with ω ≤ 0.

        Raises:
            ConfigError: no ω has received a gradient yet (`check_informed`).
        """
        omega = self.omegas()
        self.check_informed(omega, k)
        ranked = sorted(omega, key=lambda name: -omega[name])
        return [name for name in ranked[:k] if omega[name] > 0]

    def cut(self, step: int, survivors: list[str], *, final: bool = True) -> Event:
        """Keep only the survivors. The event lists every ω."""
        omega = self.omegas()
        self.keep(survivors, final=final)
        return Event(step, "cut", {"kept": list(self.adapters), "omega": omega, "lowest_layer": self.adapters.lowest_layer})

    def check_informed(self, omega: dict[str, float], k: int) -> None:
        """Check that the choice of k adapters by ω has information: at least one ω has received a gradient.

        Raises:
            ConfigError: T is too short for the configured warm-up.
        """
        if k < len(omega) and len(set(omega.values())) == 1:
            raise wrong_value(
                "method.select_steps",
                self.select_steps,
                "a longer one: no omega has received a gradient when the adapters are chosen. During a warm-up the first "
                f"gradient comes at step {INFORMED_STEPS}",
            )

    def keep(self, survivors: list[str], *, final: bool = True) -> None:
        """Disconnect all adapters except the survivors; `final` also fixes the survivors' ω."""
        for name in self.adapters:
            if name not in survivors:
                self.adapters.disconnect(name)
        if final:
            for adapter in self.adapters.values():
                adapter.fix_omega()

    def final_count(self) -> tuple[int, int]:
        """Return the bounds for K adapters."""
        return bound_sum((adapter.count() for adapter in self.adapters.values()), self.k)

    def omegas(self) -> dict[str, float]:
        """Return ω of every connected adapter."""
        return {name: float(a.omega.detach()) for name, a in self.adapters.items() if a.omega is not None}

    def kept(self) -> dict[str, Adapter]:
        """Return the active adapters: all connected ones (`compat=paper`), or those with ω ≠ 0 (`compat=release`)."""
        return {name: a for name, a in self.adapters.items() if a.omega is None or float(a.omega.detach()) != 0}

    def _project(self, step: int) -> None:
        if step % self.project_every == 0:
            project(self.adapters.values(), self.mask)
