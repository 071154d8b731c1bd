"""WeightLoRA whose cut also weighs how deep the backward pass must go (beyond the paper)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from wlora.methods.base import Event, Setting
from wlora.methods.selection import top_k_above
from wlora.methods.wlora import WLoRA


class WLoRADepth(WLoRA):
    """Keeps at most K adapters with the largest Σω − depth_cost × (layers from the lowest kept one up).

    A step costs as many layers as the backward pass must run through, which the lowest kept adapter decides; the paper's
    rule, depth_cost = 0, does not see that. The best set is found by exact search over the depth.

    Args:
        depth_cost: what one layer costs, in units of ω, or with `rule=once` of the spread of ω.
        rule: `projected`: every projection until T and the cut at T follow the objective. An ω set to 0 must then grow by a
            whole 1 to return, so the first gradient nearly decides. `once`: nothing is projected, and the cut at T alone
            decides, by what all ω have gathered; a layer costs depth_cost standard deviations of ω, whatever lr_omega and
            the size of the gradients.
        settings: of `WLoRA`.
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
        """Return the best set at the present ω."""
        return self._search(omega)[0]

    def choose(self, k: int) -> list[str]:
        """Return the names of the best set."""
        omega = self.omegas()
        self.check_informed(omega, k)
        mask, objective = self._search(torch.tensor(list(omega.values())))
        self._objective = float(objective)
        return [name for name, kept in zip(omega, mask.tolist(), strict=True) if kept]

    def cut(self, step: int, survivors: list[str], *, final: bool = True) -> Event:
        """Cut, and note the objective, how many layers are left to differentiate, and what a step should cost then."""
        event = super().cut(step, survivors, final=final)
        lowest = self.adapters.lowest_layer
        layers = 0 if lowest is None else self.num_layers - lowest
        # Layers passed forward and backward, of those of a step with every adapter: the prefix stored, or computed anew.
        cost = {"stored": layers / self.num_layers, "recomputed": (self.num_layers + layers) / (2 * self.num_layers)}
        event.details.update(objective=self._objective, layers_to_differentiate=layers, predicted_cost=cost)
        return event

    def final_count(self) -> tuple[int, int]:
        """Return what one to K adapters have."""
        return min(adapter.count() for adapter in self.adapters.values()), super().final_count()[1]

    def _project(self, step: int) -> None:
        if self.rule == "projected":
            super()._project(step)

    def _search(self, omega: Tensor) -> tuple[Tensor, Tensor]:
        layers = [self.adapters.target(name).layer for name in self.adapters]
        unit = float(omega.std(correction=0)) if self.rule == "once" else 1.0  # then asked at the cut alone
        return top_k_above(omega, layers, self.k, depth_cost=self.depth_cost * unit, num_layers=self.num_layers)
