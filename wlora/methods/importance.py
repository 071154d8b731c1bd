"""Importance scores of AdaLoRA and IncreLoRA: sensitivity × uncertainty (Zhang et al., 2303.10512, eqs. 8–10)."""

from __future__ import annotations

import torch
from torch import Tensor


class Importance:
    """Moving averages per element: of |θ·∂L/∂θ| (sensitivity), and of its distance from that average (uncertainty).

    Args:
        beta1: decay of the sensitivity.
        beta2: decay of the uncertainty.
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, key: str, value: Tensor) -> None:
        """Add one step's |θ·∂L/∂θ|, a tensor of any shape, to the averages."""
        # If float16 gradients overflow, they are infinite. An infinite value would stay in the averages permanently.
        value = value.nan_to_num(0.0, 0.0, 0.0)
        if key not in self.sensitivity:
            self.sensitivity[key], self.uncertainty[key] = torch.zeros_like(value), torch.zeros_like(value)
        average = self.sensitivity[key].mul_(self.beta1).add_(value, alpha=1 - self.beta1)
        self.uncertainty[key].mul_(self.beta2).add_((value - average).abs(), alpha=1 - self.beta2)

    def clear(self) -> None:
        """Discard all averages."""
        self.sensitivity.clear()
        self.uncertainty.clear()

    def score(self, key: str) -> Tensor:
        """Return sensitivity × uncertainty, with the tensor's shape."""
        return self.sensitivity[key] * self.uncertainty[key]


def orthogonality(matrices: list[Tensor]) -> Tensor:
    """Return the mean over matrices of ‖M Mᵀ − I‖_F, M of shape [r, d]. As in AdaLoRA's code, the norm is not squared."""
    penalties = [(m @ m.T - torch.eye(m.shape[0], dtype=m.dtype, device=m.device)).norm() for m in matrices]
    return torch.stack(penalties).mean()
