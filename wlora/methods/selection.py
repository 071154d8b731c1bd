"""Stochastic iterative hard thresholding (StoIHT, Nguyen et al., 2014) on ω: a gradient step, then the top-K projection."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from wlora.adapters.layer import LowRankAdapter

# If the gradient norm of ω is not larger, the gradients hold no information: B = 0 at the first step, so every ∂L/∂ω =
# 0.
MIN_GRADIENT_NORM = 1e-10


def top_k(omega: Tensor, k: int) -> Tensor:
    """Return the boolean mask of the k largest entries of each vector, by signed value. Ties go to the lower index.

    This module reads no values back from the device, so a GPU does not have to synchronise.

    Args:
        omega: shape [..., n].
    """
    order = torch.argsort(omega, dim=-1, descending=True, stable=True)
    return torch.zeros_like(omega, dtype=torch.bool).scatter(-1, order[..., :k], True)


def widest(device: torch.device) -> torch.dtype:
    """Return the most precise dtype of a device: float64, which Apple's GPU does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def top_k_above(
    omega: Tensor, layers: Sequence[int], k: int, *, depth_cost: float | Tensor, num_layers: int
) -> tuple[Tensor, Tensor]:
    """Choose the adapters and the depth of the cut together, by exact search over the depth.

    Maximises Σω over the kept adapters − depth_cost × (num_layers − lowest kept layer). The backward pass runs through
    all layers from the lowest kept adapter upwards. If any ω is positive, at least one adapter is kept.

    Args:
        omega: shape [n].
        layers: the layer of each adapter, counted from 0.
        k: maximum number of adapters to keep.
        depth_cost: cost of one layer in units of ω.
        num_layers: number of layers of the model.

    Returns:
        The boolean mask of the kept adapters, shape [n], and the objective (float64). With depth_cost = 0 the kept
            adapters are those with the k largest positive ω.
    """
    layer_of = torch.tensor(layers).to(omega.device, non_blocking=True)
    lowest = torch.tensor(sorted(set(layers))).to(omega.device, non_blocking=True).unsqueeze(1)
    allowed = omega.masked_fill(layer_of < lowest, -math.inf)  # [depths, n]
    masks = top_k(allowed, k) & (allowed > 0)
    values = torch.where(masks, omega.to(widest(omega.device)), 0.0).sum(1) - depth_cost * (num_layers - lowest.squeeze(1))
    values = values.masked_fill(~masks.any(1), -math.inf)
    best = values.argmax()  # the first of equal values, hence the deepest cut
    return masks.index_select(0, best.view(1)).squeeze(0), values.max()


@torch.no_grad()
def project(adapters: Collection[LowRankAdapter], choose: Callable[[Tensor], Tensor]) -> None:
    """Set ω to zero where `choose`, given all ω, returns False (paper §3.3).

    Nothing changes while no ω has received a gradient.
    """
    omegas: list[Tensor] = [adapter.omega for adapter in adapters if adapter.omega is not None]
    gradients = [omega.grad for omega in omegas if omega.grad is not None]
    if not gradients:
        return
    uninformed = torch.stack(gradients).norm() <= MIN_GRADIENT_NORM
    kept = choose(torch.stack(omegas)) | uninformed
    torch._foreach_mul_(omegas, list(kept.to(omegas[0].dtype).unbind()))
