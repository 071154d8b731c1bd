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
    """Return the boolean mask of the k largest entries of each vector, by signed value; ties go to the lower index.

    Nothing is read from the device, here or below.

    Args:
        omega: [..., n].
    """
    order = torch.argsort(omega, dim=-1, descending=True, stable=True)
    return torch.zeros_like(omega, dtype=torch.bool).scatter(-1, order[..., :k], True)


def top_k_above(
    omega: Tensor, layers: Sequence[int], k: int, *, depth_cost: float | Tensor, num_layers: int
) -> tuple[Tensor, Tensor]:
    """Choose adapters and the depth of the cut together, by exact search over the depth.

    Maximises Σω over the kept minus depth_cost × (num_layers − lowest kept layer): the layers from the lowest kept one up
    are those through which the backward pass runs. At least one adapter is kept if any ω is positive.

    Args:
        omega: [n].
        layers: the layer of each adapter, counted from 0.
        k: adapters to keep at most.

    Returns:
        The boolean mask of the kept, [n], and the objective (float64). With depth_cost = 0 these are the k largest positive
        ω.
    """
    layer_of = torch.tensor(layers).to(omega.device, non_blocking=True)
    lowest = torch.tensor(sorted(set(layers))).to(omega.device, non_blocking=True).unsqueeze(1)
    allowed = omega.masked_fill(layer_of < lowest, -math.inf)  # [depths, n]
    masks = top_k(allowed, k) & (allowed > 0)
    values = torch.where(masks, omega.double(), 0.0).sum(1) - depth_cost * (num_layers - lowest.squeeze(1))
    values = values.masked_fill(~masks.any(1), -math.inf)
    best = values.argmax()  # the first of equal ones: the deepest
    return masks.index_select(0, best.view(1)).squeeze(0), values.max()


@torch.no_grad()
def project(adapters: Collection[LowRankAdapter], choose: Callable[[Tensor], Tensor]) -> None:
    """Set ω to zero where `choose`, given all ω, returns False (paper §3.3), unless no ω has received a gradient yet."""
    omegas: list[Tensor] = [adapter.omega for adapter in adapters if adapter.omega is not None]
    gradients = [omega.grad for omega in omegas if omega.grad is not None]
    if not gradients:
        return
    uninformed = torch.stack(gradients).norm() <= MIN_GRADIENT_NORM
    for omega, kept in zip(omegas, choose(torch.stack(omegas)) | uninformed, strict=True):
        omega.mul_(kept)
