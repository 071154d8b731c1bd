"""StoIHT on the adapters' weights ω (Nguyen et al., 2014): a gradient step, then the top-K projection."""

from __future__ import annotations

from collections.abc import Collection

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


@torch.no_grad()
def project(adapters: Collection[LowRankAdapter], k: int) -> None:
    """Set all but the k largest ω to zero (paper §3.3), unless no ω has received a gradient yet."""
    omegas: list[Tensor] = [adapter.omega for adapter in adapters if adapter.omega is not None]
    gradients = [omega.grad for omega in omegas if omega.grad is not None]
    if not gradients or torch.stack(gradients).norm() <= MIN_GRADIENT_NORM:
        return
    mask = top_k(torch.stack(omegas), k)
    for omega, kept in zip(omegas, mask, strict=True):
        omega.mul_(kept)
