"""RLoRA (paper §4.4 and Table 6): as WeightLoRA, but the K survivors are chosen at random. An ablation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from wlora.methods.base import Setting, Steps
from wlora.methods.parameter_groups import ParameterGroup
from wlora.methods.wlora import WLoRA


class RLoRA(WLoRA):
    """WeightLoRA whose projections and cut keep a random set, drawn once per run from its random generator.

    ω trains as in WeightLoRA, and all adapters are active until the first projection. So only the choice differs
    (§4.4). This is not PEFT's RandLora, which is a different method.

    Args:
        draw: `at_projection`: the drawn set takes effect at WeightLoRA's first projection. `at_start`: ω stays 1, and
            the others leave before the first step, as in the published code.
        settings: arguments of `WLoRA`; with `at_start` only `k` is used.
    """

    def __init__(
        self, *, draw: Literal["at_projection", "at_start"], lr_omega: float = 5.0, project_every: int = 1, **settings: Any
    ) -> None:
        super().__init__(lr_omega=lr_omega, project_every=project_every, **settings)
        self.draw = draw

    def plan(self, steps: Steps) -> None:
        """Determine T; `at_start` has none."""
        if self._draws_at_start:
            self.select_steps = 0
        else:
            super().plan(steps)

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach all adapters and draw the survivors."""
        super().attach(model, setting)
        names = self.drawable(setting)
        drawn = torch.randperm(len(setting.targets), generator=setting.generator)[: self.k].tolist()
        self._drawn = [names[index] for index in drawn]
        if self._draws_at_start:
            self.keep(self._drawn)

    def drawable(self, setting: Setting) -> list[str]:
        """Return the names to draw from, one per target."""
        return [target.name for target in setting.targets]

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return WeightLoRA's groups; with `at_start`, without ω."""
        groups = super().groups(lr)
        return groups[:1] if self._draws_at_start else groups

    def mask(self, omega: Tensor) -> Tensor:
        """Return which adapters were drawn, as a boolean tensor of shape [n]."""
        drawn = torch.tensor([name in self._drawn for name in self.adapters])
        return drawn.to(omega.device, non_blocking=True)  # without waiting for the GPU

    def choose(self, k: int) -> list[str]:
        """Return the drawn names, without those with ω ≤ 0."""
        omega = self.omegas()
        return [name for name in self._drawn if omega[name] > 0]

    @property
    def _draws_at_start(self) -> bool:
        return self.draw == "at_start"
