"""NoRA (Lin et al., 2024, arXiv 2408.10280): a small trained adapter inside a frozen one from the base's SVD.

Other methods are called NoRA as well. The paper scales W by activations before the SVD. This scaling could not be
verified, so a plain SVD is used here.
"""

from __future__ import annotations

import torch
from torch import nn

from wlora.adapters.layer import LowRankAdapter
from wlora.adapters.variants import FramedAdapter
from wlora.errors import ConfigError
from wlora.methods.base import AdapterMethod, Setting
from wlora.methods.milora import decompose_base


class NoRA(AdapterMethod):
    """h = W x + s·B_out (B A) A_out x. B_out = U Σ and A_out = Vᵀ are frozen.

    U Σ Vᵀ are the `outer_rank` largest singular triplets of W. A is initialised as in LoRA, B is zero; `rank` is the
    inner rank. The method trains 2·outer_rank·rank elements per matrix.

    Args:
        outer_rank: rank of the frozen outer factors, at least `rank`.
    """

    plain_base = True

    def __init__(self, *, rank: int, alpha: float, dropout: float, outer_rank: int) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout)
        if outer_rank < rank:
            raise ConfigError(f"method.outer_rank={outer_rank}: allowed is at least rank={rank}, the inner rank")
        self.outer_rank = outer_rank

    def make_adapter(self, d_in: int, d_out: int, device: torch.device) -> LowRankAdapter:
        """Build the inner adapter with outer factors that are not yet filled."""
        if self.outer_rank > min(d_in, d_out):
            raise ConfigError(f"method.outer_rank={self.outer_rank}: allowed is up to {min(d_in, d_out)}, the adapted width")
        scale = self.alpha / self.rank
        return FramedAdapter(
            d_in, d_out, frame=self.outer_rank, rank=self.rank, scale=scale, dropout=self.dropout, device=device
        )

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach an adapter to every target and fill its outer factors from the SVD of the base weight."""
        super().attach(model, setting)
        for name, adapter in self.adapters.items():
            assert isinstance(adapter, FramedAdapter)
            U, S, Vh = decompose_base(name, model.get_submodule(name).get_submodule("base"), method="nora")
            adapter.outer_A.copy_(Vh[: self.outer_rank])
            adapter.outer_B.copy_(U[:, : self.outer_rank] * S[: self.outer_rank])
