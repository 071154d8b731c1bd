"""Dynamic LoRA (Mao et al., 2024, "DoRA", arXiv 2405.17357): rank-one components, pruned by their share of ‖ΔW‖.

DoRA by Liu et al. (weight decomposition) is `method=dora`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wlora.adapters.layer import LowRankAdapter
from wlora.errors import wrong_value
from wlora.methods.base import Event, Steps
from wlora.methods.pruning import ComponentPruning

SMOOTHING = 0.9
TINY = 1e-8


class DynamicLoRA(ComponentPruning):
    """h = W x + s · B diag(c) A x with trained c.

    The number of pruned components grows with p³, p the pruning progress.

    A component's contribution is ‖c_j b_j a_jᵀ‖_F / ‖B diag(c) A‖_F within its own matrix, smoothed over steps. Pruning
    runs from 15 % to 50 % of the steps by default. It is slow at first and fast at the end (AdaLoRA: fast at first,
    slow at the end). Plain fine-tuning follows. Intervals count optimiser steps. The authors' code counts
    micro-batches, but does not accumulate gradients.

    Args:
        start_share: share of the run at which pruning begins.
        end_share: share of the run at which pruning ends.
        every: steps between masks; None means a tenth of the pruning window, at least 1 (100 in the authors' code).
        regularization: weight β of the penalty on the variance of a component's entries; active until pruning ends.
    """

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        initial_rank: int | None,
        start_share: float,
        end_share: float,
        every: int | None,
        regularization: float,
    ) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout, initial_rank=initial_rank)
        if start_share >= end_share:
            raise wrong_value("method.start_share", start_share, f"below method.end_share={end_share}")
        self.start_share, self.end_share, self.every = start_share, end_share, every
        self.regularization = regularization
        self._smoothed: dict[str, Tensor] = {}
        self._pruned = False

    def plan(self, steps: Steps) -> None:
        """Determine the pruning window and the interval between masks.

        Raises:
            ConfigError: the interval is longer than the pruning window.
        """
        self.start, self.end = int(steps.total * self.start_share), max(1, int(steps.total * self.end_share))
        self.interval = max(1, (self.end - self.start) // 10) if self.every is None else self.every
        if self.interval > self.end - self.start:
            raise wrong_value(
                "method.every", self.interval, f"1 to {self.end - self.start}, the steps of the pruning window"
            )

    def draw(self, adapter: LowRankAdapter) -> None:
        """Draw A and B Kaiming-uniform with a = 0: bounds √(6/d_in) and √(6/rank)."""
        nn.init.kaiming_uniform_(adapter.A, a=0)
        nn.init.kaiming_uniform_(adapter.B, a=0)

    def extra_loss(self) -> Tensor | None:
        """Return β·R, R = Σ [Var(a_j) + Var(b_j)] / (2·initial number of components), until pruning ends; then None."""
        if self._pruned:
            return None
        total = torch.stack([a.A.var(dim=1).sum() + a.B.var(dim=0).sum() for a in self.adapters.values()]).sum()
        return self.regularization * total / (2 * self.first_budget)

    def budget(self, step: int) -> int:
        """Return the number of components, over all adapters, that may be active after a step."""
        progress = min(1.0, max(0.0, (step - self.start) / (self.end - self.start)))
        return self.first_budget - int((self.first_budget - self.last_budget) * progress**3)

    def after_step(self, step: int) -> list[Event]:
        """Update the contributions. Mask at every interval within the window, and prune permanently at its end."""
        if step > self.end:
            return []
        self.update_scores()
        if step == self.end:
            self._pruned = True
            return [self.prune(step)]
        if step > self.start and (step - self.start) % self.interval == 0:
            self.mask(self.budget(step))
        return []

    @torch.no_grad()
    def update_scores(self) -> None:
        """Update the smoothed contributions with the current ones."""
        for name, adapter in self.adapters.items():
            present = contributions(adapter)
            before = self._smoothed.get(name, torch.zeros_like(present))
            self._smoothed[name] = SMOOTHING * before + (1 - SMOOTHING) * present

    def scores(self) -> dict[str, Tensor]:
        """Return the smoothed contributions."""
        return {name: self._smoothed[name] for name in self.adapters}


@torch.no_grad()
def contributions(adapter: LowRankAdapter) -> Tensor:
    """Return every component's share of the Frobenius norm of B diag(c) A, shape [rank].

    Computed from Gram matrices; the d_out×d_in product is not built.
    """
    assert adapter.gates is not None
    gram = (adapter.gates[:, None] * (adapter.B.T @ adapter.B) * adapter.gates) * (adapter.A @ adapter.A.T)
    return gram.diagonal().clamp(min=0).sqrt() / (gram.sum().clamp(min=0).sqrt() + TINY)
