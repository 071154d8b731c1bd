"""Base class of AdaLoRA and Dynamic LoRA: gated components, scored over all adapters and pruned to a mean rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from wlora.adapters.layer import LowRankAdapter
from wlora.errors import ConfigError
from wlora.methods.base import AdapterMethod, Event, Setting, bound_sum
from wlora.methods.parameter_groups import ParameterGroup


class ComponentPruning(AdapterMethod):
    """Starts with `initial_rank` components per adapter, each with a trained gate, and ends with a mean of `rank`.

    Masking sets gates to zero; a masked gate still trains and may become nonzero again. `prune` removes components from
    the model permanently.

    Args:
        rank: mean rank per adapter at the end.
        initial_rank: rank at the start; None means ⌈1.5·rank⌉.

    Attributes:
        end: step of the final pruning; set by `plan`.

    Raises:
        ConfigError: the initial rank is below the final one.
    """

    end: int

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
        """Build an adapter with zero gates; `draw` initialises A and B."""
        adapter = super().make_adapter(d_in, d_out, device)
        self.draw(adapter)
        adapter.gates = nn.Parameter(torch.zeros(self.rank, device=device, dtype=adapter.A.dtype))
        return adapter

    def draw(self, adapter: LowRankAdapter) -> None:
        """Initialise A and B; neither may be zero."""
        raise NotImplementedError

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return A, B and the gates."""
        gates = [a.gates for a in self.adapters.values() if a.gates is not None]
        return [*super().groups(lr), ParameterGroup(gates, lr)]

    def scores(self) -> dict[str, Tensor]:
        """Return the importance of every component, as a tensor of shape [rank] per adapter."""
        raise NotImplementedError

    def keep_mask(self, budget: int) -> dict[str, Tensor]:
        """Return per adapter which components are among the `budget` most important ones of all adapters."""
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

    def last_change(self) -> int:
        """Return the step of the final pruning."""
        return self.end

    def final_count(self) -> tuple[int, int]:
        """Return the bounds for as many components as the final budget."""
        return bound_sum((a.count() // a.rank for a in self.adapters.values() for _ in range(a.rank)), self.last_budget)

    def prune(self, step: int) -> Event:
        """Permanently remove all components outside the final budget. An adapter without components is disconnected."""
        keep = self.keep_mask(self.last_budget)
        for name, mask in keep.items():
            if mask.any():
                self.adapters[name].prune(mask)
            else:
                self.adapters.disconnect(name)
        return Event(step, "prune", {"ranks": {name: int(mask.sum()) for name, mask in keep.items()}})
