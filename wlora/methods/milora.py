"""MiLoRA (Wang et al., 2024, arXiv 2406.09044): LoRA initialised from the smallest singular components of the base."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wlora.adapters.layer import LowRankAdapter
from wlora.adapters.peft_format import Factors
from wlora.errors import ConfigError
from wlora.methods.base import AdapterMethod, Setting
from wlora.models.linears import base_weight


class MiLoRA(AdapterMethod):
    """With W = U S Vᵀ and its r smallest triplets: B = U√(S/s), A = √(S/s)Vᵀ; the frozen base becomes W − s·B A.

    Initially the model computes the same function as the base, up to rounding (float32). The base module is changed
    permanently: disconnecting an adapter does not restore the pretrained weight.
    """

    plain_base = True

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach an adapter to every target and subtract the adapter's product from the base weight.

        Raises:
            ConfigError: a base weight is not a floating-point matrix (quantised base).
        """
        super().attach(model, setting)
        for name, adapter in self.adapters.items():
            _split(name, model.get_submodule(name).get_submodule("base"), adapter)
        # Initial factors: an export relative to the pretrained weight has to subtract their product again.
        self._start = {name: (a.A.detach().clone(), a.B.detach().clone()) for name, a in self.adapters.items()}

    def factors(self) -> dict[str, Factors]:
        """Return s·(B A − B₀A₀), relative to the pretrained weight; its rank is twice the adapter's."""
        found = {}
        for name, (A, B, scale) in super().factors().items():
            first_A, first_B = (first.to(A.device) for first in self._start[name])
            found[name] = Factors(torch.cat([A, first_A]), torch.cat([B, -first_B], dim=1), scale)
        return found


@torch.no_grad()
def _split(name: str, base: nn.Module, adapter: LowRankAdapter) -> None:
    """Move the smallest singular components of a base weight into its adapter."""
    U, S, Vh = decompose_base(name, base, method="milora")
    root = (S[-adapter.rank :] / adapter.scale).sqrt()
    adapter.A.copy_(root[:, None] * Vh[-adapter.rank :])
    adapter.B.copy_(U[:, -adapter.rank :] * root)
    weight = base_weight(base)
    assert weight is not None
    weight.sub_(adapter.delta_weight().to(weight.dtype))


@torch.no_grad()
def decompose_base(name: str, base: nn.Module, *, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, Vᵀ of a base weight in float32, in decreasing order of singular values.

    Raises:
        ConfigError: the weight is not a floating-point matrix.
    """
    weight = base_weight(base)
    if weight is None:
        raise ConfigError(
            f"method={method}: the weight of {name} cannot be decomposed: allowed is a base model that is not quantised"
        )
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return U, S, Vh
