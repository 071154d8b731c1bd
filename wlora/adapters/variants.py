"""Adapters with the same interface and a different update: blocks, frozen outer factors, shared or growing matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wlora.adapters.layer import LowRankAdapter


class BlockDiagonalAdapter(LowRankAdapter):
    """Mini-adapters on equal blocks: block k of the output depends only on block k of the input (MELoRA).

    The equivalent ΔW is block-diagonal with rank at most blocks·rank. Each mini-adapter is initialised as in LoRA, with
    fan-in d_in/blocks. The zeros are not stored: A is (blocks·rank)×(d_in/blocks), B is (d_out/blocks)×(blocks·rank).
    So for any number of blocks the parameter count is that of one adapter of rank `rank`.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        blocks: number of mini-adapters; must divide both widths.
        rank: components of each mini-adapter.
        settings: further arguments of `LowRankAdapter`.
    """

    def __init__(self, d_in: int, d_out: int, *, blocks: int, rank: int, **settings: Any) -> None:
        super().__init__(d_in // blocks, d_out // blocks, rank=blocks * rank, **settings)
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        """Return the concatenated outputs of the mini-adapters, for x of shape [..., d_in]."""
        dropped = self.drop(x).to(self.A.dtype)
        parts = dropped.reshape(*x.shape[:-1], self.blocks, -1)
        A, B = self._minis()
        components = torch.einsum("...kd,krd->...kr", parts, A) * self._weighting()
        return torch.einsum("...kr,okr->...ko", components, B).flatten(-2)

    @torch.no_grad()
    def factors(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return the mini-adapters as one dense adapter of rank blocks·rank."""
        A, B = self._minis()
        dense_A: Tensor = torch.block_diag(*A)  # type: ignore[no-untyped-call]
        dense_B: Tensor = torch.block_diag(*B.transpose(0, 1))  # type: ignore[no-untyped-call]
        return dense_A.detach(), dense_B * self._gating(scale)

    def _minis(self) -> tuple[Tensor, Tensor]:
        """Return A as [blocks, rank, d_in/blocks] and B as [d_out/blocks, blocks, rank]."""
        return self.A.view(self.blocks, -1, self.A.shape[1]), self.B.view(self.B.shape[0], self.blocks, -1)


class FramedAdapter(LowRankAdapter):
    """A small adapter between two frozen matrices: ΔW = s · B_out (B A) A_out (NoRA, Lin et al., 2024).

    `A` is rank×frame and `B` frame×rank. `outer_A` (frame×d_in) and `outer_B` (d_out×frame) are buffers.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        frame: rank of the frozen outer matrices.
        settings: further arguments of `LowRankAdapter`.
    """

    outer_A: Tensor
    outer_B: Tensor

    def __init__(self, d_in: int, d_out: int, *, frame: int, **settings: Any) -> None:
        super().__init__(frame, frame, **settings)
        self.register_buffer("outer_A", self.A.new_zeros(frame, d_in))
        self.register_buffer("outer_B", self.A.new_zeros(d_out, frame))

    def forward(self, x: Tensor) -> Tensor:
        """Return s·B_out B A A_out x for x of shape [..., d_in]."""
        framed = F.linear(self.drop(x).to(self.A.dtype), self.outer_A)
        components = F.linear(framed, self.A) * self._weighting()
        return F.linear(F.linear(components, self.B), self.outer_B)

    @torch.no_grad()
    def factors(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return A A_out and B_out B, an adapter of the inner rank."""
        A, B = super().factors(scale)
        return A @ self.outer_A, self.outer_B @ B


class TiedAdapter(LowRankAdapter):
    """An adapter whose matrices are shared with other adapters: ΔW = s · Λ_v B Λ_u A (Tied-LoRA).

    u is `gates` (rank) and v is `output_scale` (d_out). Both train and are counted.
    """

    def __init__(self, d_in: int, d_out: int, **settings: Any) -> None:
        super().__init__(d_in, d_out, **settings)
        self.gates = nn.Parameter(torch.ones_like(self.A[:, 0]))
        self.output_scale = nn.Parameter(torch.ones_like(self.B[:, 0]))

    def forward(self, x: Tensor) -> Tensor:
        """Return s·Λ_v B Λ_u A x for x of shape [..., d_in]."""
        return super().forward(x) * self.output_scale

    @torch.no_grad()
    def factors(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return A and Λ_v B Λ_u."""
        A, B = super().factors(scale)
        return A, self.output_scale[:, None] * B

    def counted(self) -> list[nn.Parameter]:
        """Return A, B, u and v."""
        assert self.gates is not None
        return [self.A, self.B, self.gates, self.output_scale]


class GrowingAdapter(LowRankAdapter):
    """An adapter to which groups of components are added over time: ΔW = s · Σ_p B_p diag(λ_p) A_p (IncreLoRA).

    Every group ("part") has its own parameters, so it has its own optimiser state and learning-rate schedule. The first
    part consists of this module's A, B and gates. A part whose gates do not train is a reserve: its A and B train
    behind gates that are nearly zero.

    Attributes:
        watching: whether the gradient of ΔW is recorded.
        weight_gradient: while `watching`, ∂L/∂ΔW (d_out×d_in), summed over the backward passes since it was last None.
    """

    weight_gradient: Tensor | None = None
    watching = False

    def __init__(self, d_in: int, d_out: int, *, std: float, **settings: Any) -> None:
        super().__init__(d_in, d_out, **settings)
        self.std = std
        self.gates = nn.Parameter(torch.zeros_like(self.A[:, 0]))
        self.grown = nn.ModuleList()
        nn.init.normal_(self.A, std=std)
        nn.init.normal_(self.B, std=std)

    @property
    def parts(self) -> list[LowRankAdapter]:
        """All parts, oldest first."""
        return [self, *(part for part in self.grown if isinstance(part, LowRankAdapter))]

    @property
    def reserve(self) -> LowRankAdapter | None:
        """The part whose gates do not train yet, or None."""
        last = self.parts[-1]
        return None if last.gates is None or last.gates.requires_grad else last

    @property
    def rank(self) -> int:
        """Number of active components."""
        reserve = self.reserve
        return sum(int(part.A.shape[0]) for part in self.parts if part is not reserve)

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return A [r, d_in], B [d_out, r] and the gates [r] of all parts."""
        if not self.grown:
            assert self.gates is not None
            return self.A, self.B, self.gates
        gates: list[Tensor] = [part.gates for part in self.parts if part.gates is not None]
        return torch.cat([p.A for p in self.parts]), torch.cat([p.B for p in self.parts], dim=1), torch.cat(gates)

    def forward(self, x: Tensor) -> Tensor:
        """Return s·Σ B diag(λ) A x for x of shape [..., d_in]."""
        A, B, gates = self.joined()
        dropped = self.drop(x).to(A.dtype)
        out = F.linear(F.linear(dropped, A) * (self.scale * gates), B)
        if self.watching and out.requires_grad:
            inputs = dropped.detach().flatten(0, -2)

            def watch(gradient: Tensor) -> None:  # under autocast, gradients may have lower precision than inputs
                self._watch(gradient.flatten(0, -2).T.to(inputs.dtype) @ inputs)

            out.register_hook(watch)  # type: ignore[no-untyped-call]
        return out

    @torch.no_grad()
    def factors(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return all parts as one adapter. A reserve is included, because its small gates act in the forward pass, too."""
        A, B, gates = self.joined()
        return A.detach(), B * (scale * gates)

    def counted(self) -> list[nn.Parameter]:
        """Return A and B of all parts. Those of a reserve train, so they count."""
        return [p for part in self.parts for p in (part.A, part.B)]

    @torch.no_grad()
    def add_reserve(self, rank: int, *, gate: float, generator: torch.Generator) -> None:
        """Append a part of N(0, std²) components with constant gates."""
        part = LowRankAdapter(self.A.shape[1], self.B.shape[0], rank=rank, scale=1.0, device=self.A.device)
        for matrix in (part.A, part.B):
            matrix.copy_(torch.randn(matrix.shape, generator=generator) * self.std)
        part.gates = nn.Parameter(torch.full_like(part.A[:, 0], gate), requires_grad=False)
        self.grown.append(part)

    def activate(self, count: int) -> None:
        """Make the gates of the reserve trainable; keep only its first `count` components."""
        reserve = self.reserve
        assert reserve is not None and reserve.gates is not None
        if count < reserve.rank:
            reserve.prune(torch.arange(count, device=reserve.A.device))
        reserve.gates.requires_grad_(True)

    def drop_reserve(self) -> None:
        """Remove the reserve."""
        if self.reserve is not None:
            del self.grown[len(self.grown) - 1]

    def _watch(self, gradient: Tensor) -> None:
        self.weight_gradient = gradient if self.weight_gradient is None else self.weight_gradient + gradient
