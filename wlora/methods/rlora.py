"""RLoRA (the paper, §4.4 and Table 6): as WeightLoRA, but the K survivors are drawn at random. The ablation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from wlora.methods.base import Event, Setting, Steps
from wlora.methods.wlora import WLoRA
from wlora.training.optimizers import ParameterGroup


class RLoRA(WLoRA):
    """ω stays 1; the survivors come from the run's stream of random choices, one draw per seed.

    Not PEFT's RandLora, which is another method.

    Args:
        draw: `at_cut` trains all adapters for T steps and then cuts, which differs from WLoRA by the choice alone;
            `at_start` cuts before the first step, as the release does (always so in `compat=release`).
    """

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        k: int,
        select_steps: int | None,
        draw: Literal["at_cut", "at_start"],
    ) -> None:
        super().__init__(
            rank=rank, alpha=alpha, dropout=dropout, k=k, lr_omega=0.0, select_steps=select_steps, project_every=1
        )
        self.draw = draw

    @property
    def release_adamw(self) -> bool:
        """The release trains RLoRA with torch's AdamW."""
        return False

    def plan(self, steps: Steps) -> None:
        """Fix T, which only a draw at the cut needs."""
        if self.draw == "at_cut" and not self.release:
            super().plan(steps)

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach all adapters and draw the survivors."""
        super().attach(model, setting)
        for adapter in self.adapters.values():
            adapter.fix_omega()
        names = [target.name for target in setting.targets]
        if self.release:
            # The release draws indices below n but counts them over all wrapped linears (methods note §3), so the
            # upper layers are never drawn and a drawn module without a trainable adapter is lost.
            names = [target.name for target in setting.universe]
        drawn = torch.randperm(len(setting.targets), generator=setting.generator)[: self.k].tolist()
        self._survivors = [names[index] for index in drawn]
        if self.release or self.draw == "at_start":
            self.cut(0, self._survivors)
            self.select_steps = 0

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return A and B; ω does not train."""
        return super().groups(lr)[:1]

    def after_step(self, step: int) -> list[Event]:
        """Cut at step T."""
        return [self.cut(step, self._survivors)] if step == self.select_steps else []
