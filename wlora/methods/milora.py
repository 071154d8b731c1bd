"""MiLoRA (Wang et al., 2024, arXiv 2406.09044): LoRA that starts from the base's smallest singular components."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wlora.adapters.layer import LowRankAdapter
from wlora.adapters.peft_format import Factors
from wlora.errors import ConfigError
from wlora.methods.base import AdapterMethod, Setting


class MiLoRA(AdapterMethod):
    """With W = U S Vᵀ and its r smallest triplets: B = U√(S/s), A = √(S/s)Vᵀ, and the frozen base becomes W − s·B A.

    The start is exact up to rounding (float32). The base module is changed for good: disconnecting such an adapter
    does not bring the pretrained weight back.
    """

    plain_base = True

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach an adapter to every target and take its part out of the base.

        Raises:
            ConfigError: a base weight that is not a plain floating-point matrix (a quantised base).
        """
        super().attach(model, setting)
        for name, adapter in self.adapters.items():
            _split(name, model.get_submodule(name).get_submodule("base"), adapter)
        # What the base has lost, which beside the pretrained weight has to be taken off again.
        self._start = {name: (a.A.detach().clone(), a.B.detach().clone()) for name, a in self.adapters.items()}

    def factors(self) -> dict[str, Factors]:
        """Return s·(B A − B₀A₀), of twice the rank."""
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
    base.weight.sub_(adapter.delta_weight().to(base.weight.dtype))  # type: ignore[operator, union-attr, arg-type]


@torch.no_grad()
def decompose_base(name: str, base: nn.Module, *, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, Vᵀ of a base weight in float32, by decreasing singular value.

    Raises:
        ConfigError: a base without a plain floating-point matrix.
    """
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        raise ConfigError(
            f"method={method}: {name} has no plain weight to decompose: allowed is a base without quantisation"
        )
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    return U, S, Vh
