"""MELoRA (Ren et al., ACL 2024): several mini-adapters per linear module, one per block of inputs and outputs."""

from __future__ import annotations

import torch

from wlora.adapters.layer import LowRankAdapter
from wlora.adapters.variants import BlockDiagonalAdapter
from wlora.errors import ConfigError
from wlora.methods.base import AdapterMethod


class MELoRA(AdapterMethod):
    """`minis` mini-adapters of rank `rank`/`minis` each, with s = alpha / (rank of a mini-adapter).

    The equivalent rank is `rank`, with as many parameters as one adapter of rank `rank`/`minis`. Four minis of rank 2
    give the 110K parameters of the paper's Table 1. The paper does not state the number of minis; any number of minis
    of rank 2 has the same parameter count. Adapters are never removed or extended.

    Args:
        rank: equivalent rank, a multiple of `minis`.
        minis: number of blocks; must divide input and output width of every adapted linear module.
    """

    def __init__(self, *, rank: int, alpha: float, dropout: float, minis: int) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout)
        if rank % minis:
            raise ConfigError(f"method.minis={minis}: allowed is a divisor of rank={rank}, which the minis share equally")
        self.minis = minis

    def make_adapter(self, d_in: int, d_out: int, device: torch.device) -> LowRankAdapter:
        """Build the mini-adapters of one linear module with a weight of shape [d_out, d_in].

        Raises:
            ConfigError: `minis` does not divide a width, or a mini-adapter would not be low-rank.
        """
        if d_in % self.minis or d_out % self.minis:
            raise ConfigError(f"method.minis={self.minis}: allowed is a divisor of {d_in} and {d_out}, the adapted widths")
        mini = self.rank // self.minis
        if mini > min(d_in, d_out) // self.minis:
            raise ConfigError(f"rank={self.rank}: allowed is up to {min(d_in, d_out)}, the width of the adapted linear")
        return BlockDiagonalAdapter(
            d_in, d_out, blocks=self.minis, rank=mini, scale=self.alpha / mini, dropout=self.dropout, device=device
        )
