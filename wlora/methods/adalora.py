"""AdaLoRA (Zhang et al., 2023, arXiv 2303.10512): SVD-like components, the least important ones are pruned globally."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wlora.adapters.layer import LowRankAdapter
from wlora.errors import ConfigError, wrong_value
from wlora.methods.base import AdapterMethod, Event, Setting, Steps
from wlora.methods.importance import Importance, orthogonality
from wlora.training.optimizers import ParameterGroup


class AdaLoRA(AdapterMethod):
    """h = W x + s · B diag(λ) A x with trained gates λ; the budget of components falls on a cubic from initial to `rank`.

    Until T − t_f a masked λ keeps its gradient and may return; then the masked components leave for good. A and B start
    from N(0, 0.02²), λ from 0; s = alpha / initial rank throughout.

    Args:
        rank: mean rank per adapter at the end.
        initial_rank: rank at the start; None means ⌈1.5·rank⌉.
        start_steps: t_i, steps before pruning begins; None means a tenth of the run.
        final_steps: t_f, steps after pruning has ended; None means 0.4 of the run.
        every: steps between masks; None means a hundredth of the run, at least 1.
        beta1: decay of the sensitivity.
        beta2: decay of the uncertainty.
        orthogonal: weight γ of the orthogonality of A and B in the loss.
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
        initial = math.ceil(1.5 * rank) if initial_rank is None else initial_rank
        if initial < rank:
            raise ConfigError(f"method.initial_rank={initial}: allowed is at least rank={rank}, where the pruning ends")
        super().__init__(rank=initial, alpha=alpha, dropout=dropout)
        self.target_rank = rank
        self.start_steps, self.final_steps, self.every = start_steps, final_steps, every
        self.orthogonal = orthogonal
        self.importance = Importance(beta1, beta2)

    def plan(self, steps: Steps) -> None:
        """Fix t_i, t_f and the interval."""
        self.total = steps.total
        self.start = steps.total // 10 if self.start_steps is None else self.start_steps
        self.final = steps.total * 4 // 10 if self.final_steps is None else self.final_steps
        self.interval = max(1, steps.total // 100) if self.every is None else self.every
        if self.start + self.final >= steps.total:
            raise wrong_value(
                "method.start_steps + method.final_steps",
                self.start + self.final,
                f"at most {steps.total - 1}, as the run has {steps.total} optimiser steps",
            )

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach adapters of the initial rank with gates λ = 0."""
        super().attach(model, setting)
        self._budget = (len(self.adapters) * self.rank, len(self.adapters) * self.target_rank)

    def make_adapter(self, d_in: int, d_out: int, device: torch.device) -> LowRankAdapter:
        """Build an adapter whose A and B are not zero, and whose gates are."""
        adapter = super().make_adapter(d_in, d_out, device)
        nn.init.normal_(adapter.A, std=0.02)
        nn.init.normal_(adapter.B, std=0.02)
        adapter.gates = nn.Parameter(torch.zeros(self.rank, device=device, dtype=adapter.A.dtype))
        adapter.scale = self.alpha / (self.rank + 1e-5)
        return adapter

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return A, B and λ."""
        gates = [a.gates for a in self.adapters.values() if a.gates is not None]
        return [*super().groups(lr), ParameterGroup(gates, lr)]

    def extra_loss(self) -> Tensor | None:
        """Return γ times the mean departure of A's rows and B's columns from orthonormal ones."""
        return self.orthogonal * orthogonality([m for a in self.adapters.values() for m in (a.A, a.B.T)])

    def budget(self, step: int) -> int:
        """Return the number of components over all adapters that are allowed after a step."""
        first, last = self._budget
        if step <= self.start:
            return first
        if step > self.total - self.final:
            return last
        left = 1 - (step - self.start) / (self.total - self.final - self.start)
        return int((first - last) * left**3 + last)

    def after_step(self, step: int) -> list[Event]:
        """Update the scores; mask every interval, and prune for good at T − t_f."""
        end = self.total - self.final
        if step > end:
            return []
        if step < end:
            self.update_scores()
        if step == end:
            return [self.prune(step)]
        if step > self.start and step % self.interval == 0:
            for name, keep in self.keep_mask(self.budget(step)).items():
                gates = self.adapters[name].gates
                assert gates is not None
                gates.data.mul_(keep)
        return []

    @torch.no_grad()
    def update_scores(self) -> None:
        """Take in this step's gradients of A, B and λ."""
        for name, adapter in self.adapters.items():
            for part, p in (("A", adapter.A), ("B", adapter.B), ("gates", adapter.gates)):
                if p is not None and p.grad is not None:
                    self.importance.update(f"{name}.{part}", (p * p.grad).abs())

    def keep_mask(self, budget: int) -> dict[str, Tensor]:
        """Return per adapter which components are among the `budget` most important of all: S = s(λ) + s̄(A) + s̄(B)."""
        scores = {
            name: self.importance.score(f"{name}.gates")
            + self.importance.score(f"{name}.A").mean(dim=1)
            + self.importance.score(f"{name}.B").mean(dim=0)
            for name in self.adapters
        }
        everything = torch.cat(list(scores.values()))
        kept = torch.zeros_like(everything, dtype=torch.bool)
        kept[torch.argsort(everything, descending=True, stable=True)[:budget]] = True
        return dict(zip(scores, torch.split(kept, [len(score) for score in scores.values()]), strict=True))

    def prune(self, step: int) -> Event:
        """Take all but the last budget's components out of the model; an adapter left with none is disconnected."""
        keep = self.keep_mask(self._budget[1])
        for name, mask in keep.items():
            if mask.any():
                self.adapters[name].prune(mask)
            else:
                self.adapters.disconnect(name)
        return Event(step, "prune", {"ranks": {name: int(mask.sum()) for name, mask in keep.items()}})
