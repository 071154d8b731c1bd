"""AdaLoRA (Zhang et al., 2023, arXiv 2303.10512): SVD-like components; the least important of all adapters are pruned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wlora.adapters.layer import LowRankAdapter
from wlora.errors import wrong_value
from wlora.methods.base import Event, Steps
from wlora.methods.importance import Importance, orthogonality
from wlora.methods.pruning import ComponentPruning


class AdaLoRA(ComponentPruning):
    """h = W x + s · B diag(λ) A x with trained gates λ.

    The budget of components falls from initial rank to `rank` (cubic).

    Until step T − t_f a masked λ still receives its gradient and may return. At T − t_f the masked components leave
    permanently. A and B are initialised from N(0, 0.02²), λ with 0. The scale is s = alpha / initial rank throughout.

    Args:
        start_steps: t_i, steps before pruning begins; None means a tenth of the run.
        final_steps: t_f, steps after pruning has ended; None means 0.4 of the run.
        every: steps between masks; None means a hundredth of the run, at least 1.
        beta1: decay of the sensitivity.
        beta2: decay of the uncertainty.
        orthogonal: weight γ of the orthogonality penalty on A and B.
    """

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        initial_rank: int | None,
        start_steps: int | None,
        final_steps: int | None,
        every: int | None,
        beta1: float,
        beta2: float,
        orthogonal: float,
    ) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout, initial_rank=initial_rank)
        self.start_steps, self.final_steps, self.every = start_steps, final_steps, every
        self.orthogonal = orthogonal
        self.importance = Importance(beta1, beta2)

    def plan(self, steps: Steps) -> None:
        """Determine t_i, the step T − t_f and the interval between masks.

        Raises:
            ConfigError: t_i + t_f does not leave steps for pruning.
        """
        start = steps.total // 10 if self.start_steps is None else self.start_steps
        final = steps.total * 4 // 10 if self.final_steps is None else self.final_steps
        if start + final >= steps.total:
            raise wrong_value(
                "method.start_steps + method.final_steps",
                start + final,
                f"at most {steps.total - 1}, as the run has {steps.total} optimiser steps",
            )
        self.start, self.end = start, steps.total - final
        self.interval = max(1, steps.total // 100) if self.every is None else self.every

    def make_adapter(self, d_in: int, d_out: int, device: torch.device) -> LowRankAdapter:
        """Build an adapter with the scale of the authors' code, alpha / (rank + 1e-5)."""
        adapter = super().make_adapter(d_in, d_out, device)
        adapter.scale = self.alpha / (self.rank + 1e-5)
        return adapter

    def draw(self, adapter: LowRankAdapter) -> None:
        """Draw A and B from N(0, 0.02²)."""
        nn.init.normal_(adapter.A, std=0.02)
        nn.init.normal_(adapter.B, std=0.02)

    def extra_loss(self) -> Tensor | None:
        """Return γ times the mean orthogonality penalty of A's rows and B's columns."""
        return self.orthogonal * orthogonality([m for a in self.adapters.values() for m in (a.A, a.B.T)])

    def budget(self, step: int) -> int:
        """Return the number of components, over all adapters, that may be active after a step."""
        if step <= self.start:
            return self.first_budget
        if step >= self.end:
            return self.last_budget
        left = 1 - (step - self.start) / (self.end - self.start)
        return int((self.first_budget - self.last_budget) * left**3 + self.last_budget)

    def after_step(self, step: int) -> list[Event]:
        """Update the scores. Mask components at every interval, and prune permanently at T − t_f."""
        if step > self.end:
            return []
        if step == self.end:
            if step == 1:  # in such a short run no scores exist yet
                self.update_scores()
            pruned = self.prune(step)
            self.importance.clear()  # not needed any more, and as large as the adapters of the initial rank
            return [pruned]
        self.update_scores()
        if step > self.start and step % self.interval == 0:
            self.mask(self.budget(step))
        return []

    @torch.no_grad()
    def update_scores(self) -> None:
        """Update the importance scores from this step's gradients of A, B and λ."""
        for name, adapter in self.adapters.items():
            for part, p in (("A", adapter.A), ("B", adapter.B), ("gates", adapter.gates)):
                if p is not None and p.grad is not None:
                    self.importance.update(f"{name}.{part}", (p * p.grad).abs())

    def scores(self) -> dict[str, Tensor]:
        """Return S = s(λ) + mean of s over the component's row of A + mean of s over its column of B.

        s is sensitivity × uncertainty.
        """
        return {
            name: self.importance.score(f"{name}.gates")
            + self.importance.score(f"{name}.A").mean(dim=1)
            + self.importance.score(f"{name}.B").mean(dim=0)
            for name in self.adapters
        }
