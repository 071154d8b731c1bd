"""WeightLoRA whose selection also considers the depth of the backward pass (not in the paper)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from wlora.methods.base import Event, Setting
from wlora.methods.selection import top_k_above
from wlora.methods.wlora import WLoRA


class WLoRADepth(WLoRA):
    """Keeps at most K adapters, maximising Σω − depth_cost × (number of layers from the lowest kept adapter upwards).

    The backward pass runs down to the lowest kept adapter, so its layer determines the cost of a step. The paper's rule
    (depth_cost = 0) ignores this. An exact search over the depth finds the best set.

    Args:
        depth_cost: cost of one layer, in units of ω; with `rule=once` in standard deviations of ω.
        rule: `projected`: every projection until T and the cut at T use this objective. An ω that was set to 0 must
            then grow by 1 to return, so the first gradient nearly decides the selection. `once`: there are no
            projections, and only the cut at T selects, by the accumulated ω. Measuring depth_cost in standard
            deviations of ω makes it independent of lr_omega and the size of the gradients.
        settings: arguments of `WLoRA`.
    """

    released = False

    def __init__(self, *, depth_cost: float, rule: Literal["projected", "once"], **settings: Any) -> None:
        super().__init__(**settings)
        self.depth_cost, self.rule = depth_cost, rule

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach an adapter to every target."""
        super().attach(model, setting)
        self.num_layers = 1 + max(target.layer for target in [*setting.targets, *setting.universe])

    def mask(self, omega: Tensor) -> Tensor:
        """Return the best set for the current ω, as a boolean tensor of shape [n]."""
        return self._search(omega)[0]

    def choose(self, k: int) -> list[str]:
        """Return the names of the best set."""
        omega = self.omegas()
        self.check_informed(omega, k)
        mask, objective = self._search(torch.tensor(list(omega.values())))
        self._objective = float(objective)
        return [name for name, kept in zip(omega, mask.tolist(), strict=True) if kept]

    def cut(self, step: int, survivors: list[str], *, final: bool = True) -> Event:
        """Cut. The event also has the objective, the number of layers to differentiate and the predicted cost of a step."""
        event = super().cut(step, survivors, final=final)
        lowest = self.adapters.lowest_layer
        layers = 0 if lowest is None else self.num_layers - lowest
        # Predicted cost relative to a step with all adapters, counting layers in forward and backward passes. The
        # activations below the lowest adapter are either read from the prefix cache ("stored") or recomputed
        # ("recomputed").
        cost = {"stored": layers / self.num_layers, "recomputed": (self.num_layers + layers) / (2 * self.num_layers)}
        event.details.update(objective=self._objective, layers_to_differentiate=layers, predicted_cost=cost)
        return event

    def final_count(self) -> tuple[int, int]:
        """Return the bounds for one to K adapters."""
        return min(adapter.count() for adapter in self.adapters.values()), super().final_count()[1]

    def _project(self, step: int) -> None:
        if self.rule == "projected":
            super()._project(step)

    def _search(self, omega: Tensor) -> tuple[Tensor, Tensor]:
        layers = [self.adapters.target(name).layer for name in self.adapters]
        unit = float(omega.std(correction=0)) if self.rule == "once" else 1.0  # read back only at the cut
        return top_k_above(omega, layers, self.k, depth_cost=self.depth_cost * unit, num_layers=self.num_layers)
