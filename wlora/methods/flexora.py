"""Flexora (Wei et al., 2024, arXiv 2408.10774): select adapters by hyper-parameters trained on held-out loss.

The WeightLoRA paper's Table 1 cites Wei et al. for its row "FlexLoRA", but describes the federated FlexLoRA of Bai et
al. (2024, arXiv 2402.11505). The row's 442K parameters match the latter, which keeps all adapters. This module
implements Wei et al.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wlora.adapters.layer import LowRankAdapter
from wlora.errors import wrong_value
from wlora.methods.base import AdapterMethod, Event, Steps
from wlora.methods.parameter_groups import ParameterGroup
from wlora.methods.training_data import Phase, TrainingData


class Flexora(AdapterMethod):
    """h = W x + s·γ_i·B A x with γ = n·softmax(α), whose mean is 1.

    Adapters with α_i > 0 at the end of stage one are kept.

    Stage one alternates between one step on A and B with fixed γ, and one Adam step on α with the held-out loss in
    evaluation mode. Stage two trains the kept adapters from scratch as LoRA. As in the authors' code, the held-out loss
    is differentiated directly through γ, without unrolling. Differences from the authors' code: there γ multiplies
    dropout, A and B, so that γ³ acts; here γ acts once. There is one α per adapter instead of one per layer, to be
    comparable with WeightLoRA. The held-out rows are taken from the training rows.

    Args:
        stage_share: share of the run in stage one.
        lr_alpha: Adam's learning rate for α.
        held_out: rows of the held-out batch (8 batches of 8 in the authors' code).
    """

    omega = 1.0

    def __init__(
        self, *, rank: int, alpha: float, dropout: float, stage_share: float, lr_alpha: float, held_out: int
    ) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout)
        self.stage_share, self.lr_alpha, self.held_out = stage_share, lr_alpha, held_out

    def plan(self, steps: Steps) -> None:
        """Determine the end of stage one.

        Raises:
            ConfigError: stage one does not leave steps for stage two.
        """
        self.stage_steps = max(1, int(steps.total * self.stage_share))
        if self.stage_steps >= steps.total:
            raise wrong_value(
                "method.stage_share", self.stage_share, f"a share that leaves steps of the run's {steps.total}"
            )

    def make_adapter(self, d_in: int, d_out: int, device: torch.device) -> LowRankAdapter:
        """Build an adapter with a fixed ω, which holds γ = 1."""
        adapter = super().make_adapter(d_in, d_out, device)
        adapter.fix_omega()
        return adapter

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return A and B only; α has its own optimiser."""
        return super().groups(lr)[:1]

    def phases(self, data: TrainingData, steps: int) -> list[Phase]:
        """Hold one batch out of the training rows, and create α and its optimiser."""
        self._data = data
        self._batch, rows = data.hold_out(self.held_out, self.generator)
        self._alpha = nn.Parameter(torch.zeros(len(self.adapters), device=next(iter(self.adapters.values())).A.device))
        self._adam = torch.optim.Adam([self._alpha], lr=self.lr_alpha)
        return [Phase(rows, steps)]

    def gamma(self) -> Tensor:
        """Return γ = n·softmax(α), shape [n]."""
        return len(self._alpha) * torch.softmax(self._alpha, dim=0)

    def final_count(self) -> None:
        """Return None: the number is known only at the end of the run."""

    def after_step(self, step: int) -> list[Event]:
        """Update α during stage one; select at its end."""
        if step > self.stage_steps:
            return []
        self._step_alpha()
        return [self._select(step)] if step == self.stage_steps else []

    def last_change(self) -> int:
        """Return the end of stage one."""
        return self.stage_steps

    def _step_alpha(self) -> None:
        """Take one Adam step on α from the gradient of the held-out loss with respect to γ."""
        omegas = [a.omega for a in self.adapters.values() if a.omega is not None]
        gradient = torch.stack(self._data.gradients(self._batch, omegas))
        self._alpha.grad = None
        self.gamma().backward(gradient)  # type: ignore[no-untyped-call]
        self._adam.step()
        for omega, value in zip(omegas, self.gamma().detach(), strict=True):
            omega.data.copy_(value)

    @torch.no_grad()
    def _select(self, step: int) -> Event:
        """Disconnect adapters with α ≤ 0 and re-initialise the others, without γ."""
        alpha = dict(zip(self.adapters, self._alpha.tolist(), strict=True))
        for name, value in alpha.items():
            if value <= 0:
                self.adapters.disconnect(name)
        for adapter in self.adapters.values():
            fresh = self.make_adapter(adapter.A.shape[1], adapter.B.shape[0], adapter.A.device)
            adapter.A, adapter.B, adapter.omega = fresh.A, fresh.B, None
        return Event(step, "cut", {"kept": list(self.adapters), "alpha": alpha})
