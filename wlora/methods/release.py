"""`compat=release`: subclasses that reproduce how the paper's published code differs from the paper."""

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
# The misspelt name filter of the published code. It also applies to "full" fine-tuning: 30.7 % of DeBERTaV3-base train.
NAME_FILTER = ("attention.self", "output.dense", "intermediate.dence")


class ReleaseWLoRA(WLoRA):
    """WeightLoRA as published: ω is never fixed and no adapter is disconnected.

    A negative ω may still act. The learning-rate schedule and gradient clipping include ω. A is initialised within
    ±1/√rank, dropout is ignored, and the optimiser is the AdamW of the published code.
    """

    release_adamw = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.omega_scheduled = self.omega_clipped = True

    def longest_select_steps(self, steps: Steps) -> tuple[int, str]:
        """Return the largest allowed T: the published code limits T only by the run's length."""
        return steps.total - 1, ""

    def make_adapter(self, d_in: int, d_out: int, device: torch.device) -> LowRankAdapter:
        """Build an adapter with ω = 1 and the published initialisation."""
        adapter = super().make_adapter(d_in, d_out, device)
        # The published code applies Kaiming initialisation to the transposed A, so its fan-in is the rank: 1/√r instead
        # of 1/√d_in.
        nn.init.uniform_(adapter.A, -1 / math.sqrt(self.rank), 1 / math.sqrt(self.rank))
        adapter.dropout, adapter.positive = 0.0, False
        return adapter

    def after_step(self, step: int) -> list[Event]:
        """Project ω in every step, until the end of the run."""
        self._project(step)
        return []

    def settled(self, step: int) -> bool:
        """Return False: ω changes until the end of the run."""
        return False

    def last_change(self) -> int:
        """Return 0: nothing is cut. ω is part of what is kept of an evaluation."""
        return 0


class ReleaseWLoRAPlus(ReleaseWLoRA, WLoRAPlus):
    """WeightLoRA+ as published: it projects only at its two cuts, extends before it selects, and never disconnects.

    In the step of an extension, A and B are not updated. The new rows of A are uniform.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.extension = "uniform"

    def default_select_steps(self, steps: Steps) -> int:
        """Return the default T."""
        return min(PLUS_SELECT_STEPS, steps.total // 2)

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach an adapter to every target. Initially all adapters are chosen."""
        super().attach(model, setting)
        self._chosen = list(self.adapters)

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return only the chosen adapters. The others stay in the model but leave the optimiser."""
        chosen = [self.adapters[name] for name in self._chosen]
        matrices, omegas = super().groups(lr)
        matrices.parameters = [p for a in chosen for p in (a.A, a.B)]
        omegas.parameters = [a.omega for a in chosen if a.omega is not None]
        return [matrices, omegas]

    def before_step(self, step: int) -> list[Event]:
        """Double the ranks of all chosen adapters instead of updating their A and B."""
        if step not in self._cut_steps:
            return []
        return [self._extend(step, {name: 2 * self.adapters[name].rank for name in self._chosen})]

    def last_change(self) -> int:
        """Return the step of the second cut."""
        return self._cut_steps[-1]

    def after_step(self, step: int) -> list[Event]:
        """At a cut, halve the set of chosen adapters. ω of the others becomes 0; they stay in the model."""
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
    """RLoRA as published: the draw happens before the first step, and the optimiser is torch's AdamW."""

    release_adamw = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "draw": "at_start"})

    def drawable(self, setting: Setting) -> list[str]:
        """Return the names that the drawn indices refer to.

        The published code draws indices below n (the number of trainable adapters) but applies them to the list of all
        wrapped linear modules. Therefore the upper layers are never drawn, and a drawn module without a trainable
        adapter has no effect.
        """
        return [target.name for target in setting.universe]


class ReleaseFullFineTuning(FullFineTuning):
    """Trains only the parameters whose names pass `NAME_FILTER`."""

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Make a part of the body trainable.

        The filter's names exist in BERT and DeBERTa. The published script for BART has no filter; there all parameters
        train.
        """
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
"""The published variant of each method that the published code changes. Other methods are the same in both modes."""
