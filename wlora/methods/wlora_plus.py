"""WeightLoRA+ (the paper, §3.4): select as WeightLoRA, then spend the freed budget on higher ranks."""

from __future__ import annotations

from typing import Literal

from torch import nn

from wlora.adapters.layer import Extension, LowRankAdapter
from wlora.errors import wrong_value
from wlora.methods.base import Event, Setting, Steps
from wlora.methods.selection import project, top_k
from wlora.methods.wlora import WLoRA
from wlora.training.optimizers import ParameterGroup

HALVINGS = 2
RELEASE_SELECT_STEPS = 20


class WLoRAPlus(WLoRA):
    """Cut and extend the survivors' ranks without changing the function, so that the number of parameters stays.

    Schedule `halvings` (the release's): at T/2 and at T keep the better half and double its ranks, n → n/2 → n/4 at
    ranks r → 2r → 4r. Schedule `single` (the paper's text): at T keep the top K at rank r·n/K. The scale s stays that
    of the old rank unless `rescale`. `compat=release` extends before it selects, skips the A and B updates of that
    step, draws uniform rows, and never disconnects.

    Args:
        k: adapters to keep with `schedule=single`; not read with `halvings`.
        schedule: `halvings` or `single`.
        extension: `qr` or `gaussian` (`LowRankAdapter.extend`).
        rescale: set s to alpha / rank after the growth.
    """

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
        schedule: Literal["halvings", "single"],
        extension: Extension,
        rescale: bool,
    ) -> None:
        super().__init__(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            k=k,
            lr_omega=lr_omega,
            select_steps=select_steps,
            project_every=project_every,
        )
        self.schedule, self.extension, self.rescale = schedule, extension, rescale

    def plan(self, steps: Steps) -> None:
        """Fix T, and with it the steps of the cuts."""
        if self.release and self.select_steps is None:
            self.select_steps = min(RELEASE_SELECT_STEPS, steps.total // 2)
        super().plan(steps)
        assert self.select_steps is not None
        rounds = HALVINGS if self.schedule == "halvings" else 1
        if self.select_steps < rounds:
            raise wrong_value("method.select_steps", self.select_steps, f"at least {rounds} with method.schedule=halvings")
        self._cut_steps = [self.select_steps * (index + 1) // rounds for index in range(rounds)]

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach an adapter to every target; all of them are chosen at first."""
        super().attach(model, setting)
        self._n = len(self.adapters)
        self._budget = self.adapters.count()
        self._chosen = list(self.adapters)

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return what still trains: in the release the unchosen stay in the model but leave the optimiser."""
        chosen = [self.adapters[name] for name in self._chosen]
        matrices, omegas = super().groups(lr)
        matrices.parameters = [p for a in chosen for p in (a.A, a.B)]
        omegas.parameters = [a.omega for a in chosen if a.omega is not None]
        return [matrices, omegas]

    def before_step(self, step: int) -> list[Event]:
        """In the release, extend all chosen adapters in place of updating their A and B."""
        if not self.release or step not in self._cut_steps:
            return []
        return [self._extend(step, self._chosen, factor=2)]

    def after_step(self, step: int) -> list[Event]:
        """Select, then extend the survivors."""
        if self.schedule == "single" and not self.release:
            self._project_during_warm_up(step)
        if step not in self._cut_steps:
            return []
        final = step == self._cut_steps[-1]
        if self.release:
            return [self._select_in_place(step, final)]
        k = self.k if self.schedule == "single" else len(self._chosen) // 2
        event = self.cut(step, self.choose(max(1, k)), final=final)
        self._chosen = list(self.adapters)
        return [event, self._extend(step, self._chosen, factor=2 if self.schedule == "halvings" else None)]

    def _project_during_warm_up(self, step: int) -> None:
        if step <= self._cut_steps[-1]:
            self._project(step)

    def _extend(self, step: int, names: list[str], factor: int | None) -> Event:
        """Grow adapters by a factor, or (None) to the common rank that brings them back to the first budget."""
        per_rank = sum(a.count() // a.rank for a in (self.adapters[name] for name in names))
        for name in names:
            adapter = self.adapters[name]
            rank = adapter.rank * factor if factor else self._budget // per_rank
            adapter.extend(
                max(adapter.rank, min(rank, *_widths(adapter))),
                how="uniform" if self.release else self.extension,
                generator=self.generator,
            )
            if self.rescale:
                adapter.scale = self.alpha / adapter.rank
        return Event(step, "extend", {"ranks": {name: self.adapters[name].rank for name in names}})

    def _select_in_place(self, step: int, final: bool) -> Event:
        """Halve the chosen as the release does: ω of the others becomes 0, nothing leaves the model."""
        chosen = [self.adapters[name] for name in self._chosen]
        project(chosen, lambda omega: top_k(omega, len(chosen) // 2))
        omega = self.omegas()
        self._chosen = [name for name in self._chosen if omega[name] > 0]
        if final:
            for adapter in self.adapters.values():
                adapter.fix_omega()
        return Event(step, "select", {"kept": list(self._chosen), "omega": omega})


def _widths(adapter: LowRankAdapter) -> tuple[int, int]:
    return adapter.A.shape[1], adapter.B.shape[0]
