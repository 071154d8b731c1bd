"""What AdaLoRA and Dynamic LoRA share: gated components, scored over all adapters, pruned from 1.5·rank to a mean rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wlora.adapters.layer import LowRankAdapter
from wlora.errors import ConfigError
from wlora.methods.base import AdapterMethod, Event, Setting, bound_sum
from wlora.methods.parameter_groups import ParameterGroup


class ComponentPruning(AdapterMethod):
    """Starts at `initial_rank` with a trained gate per component and ends at a mean of `rank` components per adapter.

    Masking sets gates to zero, and a masked gate may grow again; `prune` then takes components out of the model.

    Args:
        rank: mean rank per adapter at the end.
        initial_rank: rank at the start; None means ⌈1.5·rank⌉.

    Raises:
        ConfigError: the initial rank is below the final one.
    """

    def __init__(self, *, rank: int, alpha: float, dropout: float, initial_rank: int | None) -> None:
        initial = math.ceil(1.5 * rank) if initial_rank is None else initial_rank
        if initial < rank:
            raise ConfigError(f"method.initial_rank={initial}: allowed is at least rank={rank}, where the pruning ends")
        super().__init__(rank=initial, alpha=alpha, dropout=dropout)
        self.target_rank = rank

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach adapters of the initial rank."""
        super().attach(model, setting)
        self.first_budget = len(self.adapters) * self.rank
        self.last_budget = len(self.adapters) * self.target_rank

    def make_adapter(self, d_in: int, d_out: int, device: torch.device) -> LowRankAdapter:
        """Build an adapter with gates of zero; A and B are drawn by `draw`."""
        adapter = super().make_adapter(d_in, d_out, device)
        self.draw(adapter)
        adapter.gates = nn.Parameter(torch.zeros(self.rank, device=device, dtype=adapter.A.dtype))
        return adapter

    def draw(self, adapter: LowRankAdapter) -> None:
        """Initialise A and B, neither of them zero."""
        raise NotImplementedError

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return A, B and the gates."""
        gates = [a.gates for a in self.adapters.values() if a.gates is not None]
        return [*super().groups(lr), ParameterGroup(gates, lr)]

    def scores(self) -> dict[str, Tensor]:
        """Return the importance of every component, of shape [rank] per adapter."""
        raise NotImplementedError

    def keep_mask(self, budget: int) -> dict[str, Tensor]:
        """Return per adapter which components are among the `budget` most important of all."""
        scores = self.scores()
        everything = torch.cat(list(scores.values()))
        kept = torch.zeros_like(everything, dtype=torch.bool)
        kept[torch.argsort(everything, descending=True, stable=True)[:budget]] = True
        return dict(zip(scores, torch.split(kept, [len(score) for score in scores.values()]), strict=True))

    def mask(self, budget: int) -> None:
        """Set the gates of all but the `budget` most important components to zero."""
        for name, keep in self.keep_mask(budget).items():
            gates = self.adapters[name].gates
            assert gates is not None
            gates.data.mul_(keep)

    def final_count(self) -> tuple[int, int]:
        """Return what the last budget's components have."""
        return bound_sum((a.count() // a.rank for a in self.adapters.values() for _ in range(a.rank)), self.last_budget)

    def prune(self, step: int) -> Event:
        """Take all but the last budget's components out; an adapter left with none is disconnected."""
        keep = self.keep_mask(self.last_budget)
        for name, mask in keep.items():
            if mask.any():
                self.adapters[name].prune(mask)
            else:
                self.adapters.disconnect(name)
        return Event(step, "prune", {"ranks": {name: int(mask.sum()) for name, mask in keep.items()}})
