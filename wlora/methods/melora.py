"""MELoRA (Ren et al., ACL 2024): several mini adapters on equal blocks of input and output in place of one."""

from __future__ import annotations

import torch

from wlora.adapters.layer import LowRankAdapter
from wlora.adapters.variants import BlockDiagonalAdapter
from wlora.errors import ConfigError
from wlora.methods.base import AdapterMethod


class MELoRA(AdapterMethod):
    """`minis` adapters of rank `rank`/`minis` each, s = alpha / mini rank; nothing is cut or grown.

    The equivalent rank is `rank` at the parameters of rank `rank`/`minis`, which is the paper's 110K for four minis of
    rank 2 (Table 1 does not give their number; any number of minis of rank 2 has that count).

    Args:
        rank: equivalent rank, a multiple of `minis`.
        minis: number of blocks; it divides the widths of every adapted linear.
    """

    def __init__(self, *, rank: int, alpha: float, dropout: float, minis: int) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout)
        if rank % minis:
            raise ConfigError(f"method.minis={minis}: allowed is a divisor of rank={rank}, which the minis share equally")
        self.minis = minis

    def make_adapter(self, d_in: int, d_out: int, device: torch.device) -> LowRankAdapter:
        """Build the minis of one d_out×d_in linear."""
        if d_in % self.minis or d_out % self.minis:
            raise ConfigError(f"method.minis={self.minis}: allowed is a divisor of {d_in} and {d_out}, the adapted widths")
        mini = self.rank // self.minis
        if mini > min(d_in, d_out) // self.minis:
            raise ConfigError(f"rank={self.rank}: allowed is up to {min(d_in, d_out)}, the width of the adapted linear")
        return BlockDiagonalAdapter(
            d_in, d_out, blocks=self.minis, rank=mini, scale=self.alpha / mini, dropout=self.dropout, device=device
        )
