"""Adapters of the same interface whose update has another structure: blocks, a frozen frame, shared matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wlora.adapters.layer import LowRankAdapter


class BlockDiagonalAdapter(LowRankAdapter):
    """Mini adapters side by side: block k of the output sees block k of the input only (MELoRA, Ren et al., 2024).

    The equivalent ΔW is block-diagonal of rank at most blocks·rank. Each mini is drawn as LoRA is, with fan-in
    d_in/blocks. Stored without the zeros: A is (blocks·rank)×(d_in/blocks), B is (d_out/blocks)×(blocks·rank), so
    the count is that of one adapter of rank `rank` for any number of blocks.

    Args:
        blocks: number of minis; it divides both widths.
        rank: components of each mini.
    """

    def __init__(self, d_in: int, d_out: int, *, blocks: int, rank: int, **settings: Any) -> None:
        super().__init__(d_in // blocks, d_out // blocks, rank=blocks * rank, **settings)
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        """Return the minis' outputs side by side, for x of shape [..., d_in]."""
        dropped = F.dropout(x, self.dropout, self.training).to(self.A.dtype)
        parts = dropped.reshape(*x.shape[:-1], self.blocks, -1)
        A, B = self._minis()
        components = torch.einsum("...kd,krd->...kr", parts, A) * self._weighting()
        return torch.einsum("...kr,okr->...ko", components, B).flatten(-2)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the block-diagonal ΔW as a d_out×d_in matrix."""
        A, B = self._minis()
        d_out, d_in = self.blocks * B.shape[0], self.blocks * A.shape[2]
        delta = A.new_zeros(self.blocks, B.shape[0], self.blocks, A.shape[2])
        for k in range(self.blocks):
            delta[k, :, k] = self._weighting() * (B[:, k] @ A[k])
        return delta.reshape(d_out, d_in)

    def _minis(self) -> tuple[Tensor, Tensor]:
        """Return A as [blocks, rank, d_in/blocks] and B as [d_out/blocks, blocks, rank]."""
        return self.A.view(self.blocks, -1, self.A.shape[1]), self.B.view(self.B.shape[0], self.blocks, -1)


class FramedAdapter(LowRankAdapter):
    """A small adapter between two frozen matrices: ΔW = s · B_out (B A) A_out (NoRA, Lin et al., 2024).

    `A` is rank×frame and `B` frame×rank; `outer_A` (frame×d_in) and `outer_B` (d_out×frame) are buffers.

    Args:
        frame: rank R of the frozen outer matrices.
    """

    outer_A: Tensor
    outer_B: Tensor

    def __init__(self, d_in: int, d_out: int, *, frame: int, **settings: Any) -> None:
        super().__init__(frame, frame, **settings)
        self.register_buffer("outer_A", self.A.new_zeros(frame, d_in))
        self.register_buffer("outer_B", self.A.new_zeros(d_out, frame))

    def forward(self, x: Tensor) -> Tensor:
        """Return s·B_out B A A_out x for x of shape [..., d_in]."""
        framed = F.linear(F.dropout(x, self.dropout, self.training).to(self.A.dtype), self.outer_A)
        components = F.linear(framed, self.A) * self._weighting()
        return F.linear(F.linear(components, self.B), self.outer_B)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return ΔW as a d_out×d_in matrix."""
        return self.outer_B @ super().delta_weight() @ self.outer_A


class TiedAdapter(LowRankAdapter):
    """An adapter whose matrices other adapters share: ΔW = s · Λ_v B Λ_u A (Tied-LoRA, Renduchintala et al., 2023).

    u is `gates` (rank) and v is `output_scale` (d_out), both trained and, as they are all that is its own, counted.
    """

    def __init__(self, d_in: int, d_out: int, **settings: Any) -> None:
        super().__init__(d_in, d_out, **settings)
        self.gates = nn.Parameter(torch.ones_like(self.A[:, 0]))
        self.output_scale = nn.Parameter(torch.ones_like(self.B[:, 0]))

    def forward(self, x: Tensor) -> Tensor:
        """Return s·Λ_v B Λ_u A x for x of shape [..., d_in]."""
        return super().forward(x) * self.output_scale

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return ΔW as a d_out×d_in matrix."""
        return self.output_scale[:, None] * super().delta_weight()

    def counted(self) -> list[nn.Parameter]:
        """Return A, B, u and v."""
        assert self.gates is not None
        return [self.A, self.B, self.gates, self.output_scale]
