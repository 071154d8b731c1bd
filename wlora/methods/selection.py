"""StoIHT on the adapters' weights ω (Nguyen et al., 2014): a gradient step, then the top-K projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from wlora.adapters.layer import LowRankAdapter

# Below this norm of the gradient there is nothing to choose by: at the first step B = 0, so every ∂L/∂ω is 0.
MIN_GRADIENT_NORM = 1e-10


def top_k(omega: Tensor, k: int) -> Tensor:
    """Return the boolean mask of the k largest entries of a vector, by signed value; ties go to the lower index."""
    order = torch.argsort(omega, descending=True, stable=True)
    mask = torch.zeros_like(omega, dtype=torch.bool)
    mask[order[:k]] = True
    return mask


def top_k_above(omega: Tensor, layers: Sequence[int], k: int, *, depth_cost: float, num_layers: int) -> tuple[Tensor, float]:
    """Choose adapters and the depth of the cut together, by exact search over the depth.

    Maximises Σω over the kept minus depth_cost × (num_layers − lowest kept layer): the layers from the lowest kept one up
    are those through which the backward pass runs. At least one adapter is kept if any ω is positive.

    Args:
        omega: [n].
        layers: the layer of each adapter, counted from 0.
        k: adapters to keep at most.

    Returns:
        The boolean mask of the kept, [n], and the objective. With depth_cost = 0 these are the k largest positive ω.
    """
    best, objective = torch.zeros_like(omega, dtype=torch.bool), -math.inf
    layer_of = torch.tensor(layers, device=omega.device)
    for depth in sorted(set(layers)):
        allowed = omega.masked_fill(layer_of < depth, -math.inf)
        mask = top_k(allowed, k) & (allowed > 0)
        value = float(omega[mask].sum()) - depth_cost * (num_layers - depth)
        if mask.any() and value > objective:
            best, objective = mask, value
    return best, objective


@torch.no_grad()
def project(adapters: Collection[LowRankAdapter], choose: Callable[[Tensor], Tensor]) -> None:
    """Set ω to zero where `choose`, given all ω, returns False (paper §3.3), unless no ω has received a gradient yet."""
    omegas: list[Tensor] = [adapter.omega for adapter in adapters if adapter.omega is not None]
    gradients = [omega.grad for omega in omegas if omega.grad is not None]
    if not gradients or torch.stack(gradients).norm() <= MIN_GRADIENT_NORM:
        return
    mask = choose(torch.stack(omegas))
    for omega, kept in zip(omegas, mask, strict=True):
        omega.mul_(kept)
