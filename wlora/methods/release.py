"""`compat=release`: what the paper's published code does differently, as one subclass per method concerned."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from wlora.adapters.layer import LowRankAdapter
from wlora.methods.base import Event, Method, Setting, Steps
from wlora.methods.full import FullFineTuning
from wlora.methods.parameter_groups import ParameterGroup
from wlora.methods.rlora import RLoRA
from wlora.methods.selection import project, top_k
from wlora.methods.wlora import WLoRA
from wlora.methods.wlora_plus import WLoRAPlus

PLUS_SELECT_STEPS = 20
# The name filter, as misspelt as it is there; it holds for "full" fine-tuning, too: 30.7 % of DeBERTaV3-base train.
NAME_FILTER = ("attention.self", "output.dense", "intermediate.dence")


class ReleaseWLoRA(WLoRA):
    """Nothing is ever fixed or disconnected, ω may be negative and still act, and schedule and clipping include ω.

    A starts within ±1/√rank, dropout is ignored, and the optimiser is the release's own AdamW.
    """

    release_adamw = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.omega_scheduled = self.omega_clipped = True

    def longest_select_steps(self, steps: Steps) -> tuple[int, str]:
        """Return the longest T: the release knows no bound but the run."""
        return steps.total - 1, ""

    def make_adapter(self, d_in: int, d_out: int, device: torch.device) -> LowRankAdapter:
        """Build an adapter with ω = 1 and the release's start."""
        adapter = super().make_adapter(d_in, d_out, device)
        # Kaiming on the transposed tensor takes the rank for the fan-in: 1/√r in place of 1/√d_in.
        nn.init.uniform_(adapter.A, -1 / math.sqrt(self.rank), 1 / math.sqrt(self.rank))
        adapter.dropout, adapter.positive = 0.0, False
        return adapter

    def after_step(self, step: int) -> list[Event]:
        """Project, to the end of the run."""
        self._project(step)
        return []

    def settled(self, step: int) -> bool:
        """ω changes to the end."""
        return False


class ReleaseWLoRAPlus(ReleaseWLoRA, WLoRAPlus):
    """Projects at its two cuts alone, extends before it selects, and never disconnects.

    The step of an extension leaves A and B as they are; new rows of A are uniform.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.extension = "uniform"

    def default_select_steps(self, steps: Steps) -> int:
        """Return T where none is given."""
        return min(PLUS_SELECT_STEPS, steps.total // 2)

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach an adapter to every target; all of them are chosen at first."""
        super().attach(model, setting)
        self._chosen = list(self.adapters)

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return the chosen alone: the others stay in the model but leave the optimiser."""
        chosen = [self.adapters[name] for name in self._chosen]
        matrices, omegas = super().groups(lr)
        matrices.parameters = [p for a in chosen for p in (a.A, a.B)]
        omegas.parameters = [a.omega for a in chosen if a.omega is not None]
        return [matrices, omegas]

    def before_step(self, step: int) -> list[Event]:
        """Double the ranks of all chosen adapters in place of updating their A and B."""
        if step not in self._cut_steps:
            return []
        return [self._extend(step, {name: 2 * self.adapters[name].rank for name in self._chosen})]

    def after_step(self, step: int) -> list[Event]:
        """At a cut, halve the chosen: ω of the others becomes 0, nothing leaves the model."""
        if step not in self._cut_steps:
            return []
        chosen = [self.adapters[name] for name in self._chosen]
        project(chosen, lambda omega: top_k(omega, len(chosen) // 2))
        omega = self.omegas()
        self._chosen = [name for name in self._chosen if omega[name] > 0]
        if step == self._cut_steps[-1]:
            for adapter in self.adapters.values():
                adapter.fix_omega()
        return [Event(step, "select", {"kept": list(self._chosen), "omega": omega})]


class ReleaseRLoRA(ReleaseWLoRA, RLoRA):
    """Draws before the first step, among other modules than those with adapters, and trains with torch's AdamW."""

    release_adamw = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "draw": "at_start"})

    def drawable(self, setting: Setting) -> list[str]:
        """Return the names that the drawn indices stand for.

        The indices are below n, but count over all wrapped linears (methods note §3): the upper layers are never drawn, and
        a drawn module without a trainable adapter is lost.
        """
        return [target.name for target in setting.universe]


class ReleaseFullFineTuning(FullFineTuning):
    """Trains only the parameters whose names pass the filter (methods note §1.3)."""

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Let a part of the body train; the filter's names are BERT's and DeBERTa's, and the script for BART has none."""
        super().attach(model, setting)
        passing = {p for name, p in model.named_parameters() if any(part in name for part in NAME_FILTER)}
        if chosen := [p for p in self.base_parameters if p in passing]:
            for p in self.base_parameters:
                p.requires_grad_(p in passing)
            self.base_parameters = chosen


RELEASES: dict[type[Method], type[Method]] = {
    WLoRA: ReleaseWLoRA,
    WLoRAPlus: ReleaseWLoRAPlus,
    RLoRA: ReleaseRLoRA,
    FullFineTuning: ReleaseFullFineTuning,
}
"""The methods that the published code has, as it has them; other methods are the same in both modes."""
