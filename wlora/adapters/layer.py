"""The one layer behind every method: gated low-rank components beside a frozen linear.

    h = W x + s · ω · B diag(g) A x        A: r×d_in   B: d_out×r   g: r gates   ω: one gate   s: constant

Policies (`wlora.methods.registry`) decide what the gates do; this module only knows how.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wlora.adapters.derivation import derive

Extension = Literal["qr", "gaussian", "uniform"]


class Adapter(Protocol):
    """What counts, records and the console read of an adapter, whoever made it."""

    @property
    def rank(self) -> int:
        """Number of components."""
        ...

    @property
    def omega(self) -> Tensor | None:
        """The adapter's gate, None without one."""
        ...

    def counted(self) -> list[nn.Parameter]:
        """Return the parameters that count as the adapter's."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all its parameters."""
        ...


class LowRankAdapter(nn.Module):
    """The trainable part of one adapted linear.

    `A` is r×d_in with the kaiming-uniform initialisation of LoRA (bound 1/√d_in), `B` is d_out×r and zero, so the
    function is unchanged at the start. `omega` (0-dim) and `gates` (r) are parameters that exist only where a
    policy asks for them; whether they train is their `requires_grad`.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        rank: number of components, at least 1.
        scale: the constant s, usually alpha / rank.
        dropout: probability of dropping an input element while training.
        omega: initial value of the adapter's gate, or None for an adapter without one.
        positive: if true, a gate ω ≤ 0 contributes nothing in the forward pass (paper §3.3) while its gradient is
            still s·⟨∂L/∂h, B A x⟩, so that it may return; if false ω multiplies as it is.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        omega: float | None = None,
        positive: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, d_in, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(d_out, rank, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.gates: nn.Parameter | None = None
        self.omega: nn.Parameter | None = None
        if omega is not None:
            self.omega = nn.Parameter(torch.tensor(omega, device=device, dtype=dtype))
        self.scale = scale
        self.positive = positive
        self.dropout = dropout

    @property
    def rank(self) -> int:
        """Number of components."""
        return int(self.A.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """Return s·ω·B diag(g) A x for x of shape [..., d_in], in the adapter's own dtype; no d×d product is built."""
        components = F.linear(F.dropout(x, self.dropout, self.training).to(self.A.dtype), self.A)
        return F.linear(components * self._weighting(), self.B)

    def _weighting(self) -> Tensor | float:
        """Return the factor of every component: a number, or a tensor of shape [] or [r]."""
        return self._gating(self.scale)

    def _gating(self, weighting: Tensor | float) -> Tensor | float:
        """Return a number times ω and the gates."""
        if self.omega is not None:
            weighting = weighting * (_positive_part(self.omega) if self.positive else self.omega)
        if self.gates is not None:
            weighting = weighting * self.gates
        return weighting

    @torch.no_grad()
    def factors(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return A [r, d_in] and B [d_out, r] of ΔW = s·B A, those of a plain LoRA adapter of rank r ≥ `rank`.

        The gates are folded into B, and so is `scale`, for which s may be given.
        """
        return self.A.detach(), self.B * self._gating(scale)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return ΔW as a d_out×d_in matrix, for folding and tests; never used in training."""
        A, B = self.factors(self.scale)
        return B @ A

    @torch.no_grad()
    def start_from(self, A: Tensor, B: Tensor, scale: float) -> None:
        """Take over another adapter's matrices and scale, at its rank; parameters are new objects.

        Raises:
            ValueError: its widths are not this adapter's.
        """
        d_in, d_out = self.A.shape[1], self.B.shape[0]
        if (A.shape[1], B.shape[0]) != (d_in, d_out):
            raise ValueError(f"maps {A.shape[1]} to {B.shape[0]}, the module {d_in} to {d_out}")
        self.A, self.B = (nn.Parameter(m.to(device=self.A.device, dtype=self.A.dtype, copy=True)) for m in (A, B))
        self.scale = scale

    @torch.no_grad()
    def prune(self, keep: Tensor) -> None:
        """Keep only the components whose indices (or boolean mask) are given.

        Parameters are new objects, derived from the old ones, so that the optimiser cuts their moments likewise.
        """
        self.A = derive(self.A, self.A[keep], lambda _, moment: moment[keep])
        self.B = derive(self.B, self.B[:, keep], lambda _, moment: moment[:, keep])
        if self.gates is not None:
            self.gates = derive(self.gates, self.gates[keep], lambda _, moment: moment[keep])

    @torch.no_grad()
    def extend(self, rank: int, *, how: Extension, generator: torch.Generator, keep_moments: bool = False) -> None:
        """Grow to `rank` components without changing the function (paper §3.4); parameters are new objects.

        New columns of B are zero. `gaussian` appends rows of N(0, 1/d_in) to A. `qr` factors Aᵀ = QR, sets A to Qᵀ
        and B to B Rᵀ, and appends rows of N(0, 1/d_in) projected off the span of Q. `uniform` is `qr` with rows of
        U[0, 1), as in the release.

        Args:
            keep_moments: let the optimiser keep the moments of the old components, where they stay valid: with
                `gaussian`. The other two change the basis of A and B, to which old second moments do not apply.

        Raises:
            ValueError: `rank` is below the present rank or above the input's width.
        """
        r, d_in = self.A.shape
        if not r <= rank <= d_in:
            raise ValueError(f"an adapter of rank {r} on {d_in} inputs cannot be extended to rank {rank}")
        draw = torch.rand if how == "uniform" else torch.randn
        rows = draw(rank - r, d_in, generator=generator, dtype=self.A.dtype).to(self.A.device)
        if how != "uniform":
            rows /= math.sqrt(d_in)
        A, B = self.A.detach(), self.B.detach()
        if how in ("qr", "uniform"):
            Q, R = torch.linalg.qr(A.T)
            A, B = Q.T, B @ R.T
            rows = rows - (rows @ Q) @ Q.T
        A, B = torch.cat([A, rows]), torch.cat([B, B.new_zeros(B.shape[0], rank - r)], dim=1)
        if keep_moments and how == "gaussian":
            self.A = derive(self.A, A, lambda name, moment: _extend_moment(name, moment, rank - r, dim=0))
            self.B = derive(self.B, B, lambda name, moment: _extend_moment(name, moment, rank - r, dim=1))
        else:
            self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        if self.gates is not None:
            ones = self.gates.new_ones(rank - r)
            self.gates = nn.Parameter(torch.cat([self.gates.detach(), ones]), self.gates.requires_grad)

    @torch.no_grad()
    def rescale(self, scale: float) -> None:
        """Set s without changing the function: B is multiplied by s_old / s_new; it is a new parameter."""
        factor = self.scale / scale
        # A gradient of B is divided by the factor that B is multiplied by.
        powers = {"exp_avg": 1, "exp_avg_sq": 2}
        self.B = derive(self.B, self.B * factor, lambda name, moment: moment / factor ** powers.get(name, 0))
        self.scale = scale

    @torch.no_grad()
    def fix_omega(self) -> None:
        """Stop training ω: its value stays as a constant factor."""
        if self.omega is not None:
            self.omega.requires_grad_(False)
            self.omega.grad = None

    def counted(self) -> list[nn.Parameter]:
        """Return the parameters that count as the adapter's: A and B; ω and g do not, as in the paper's tables."""
        return [self.A, self.B]

    def count(self) -> int:
        """Return the number of counted elements."""
        return sum(p.numel() for p in self.counted())


class AdaptedLinear(nn.Module):
    """A linear-like module with an adapter beside it: it only calls the base and adds the adapter's output."""

    adapts = True  # told to code below this package, such as the search for layers that never change

    def __init__(self, base: nn.Module, adapter: LowRankAdapter) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) + adapter(x) in the base's output dtype, for x of shape [..., d_in]."""
        out: Tensor = self.base(x, *args, **kwargs)
        summed: Tensor = out + self.adapter(x).to(out.dtype)
        return summed


def _extend_moment(name: str, moment: Tensor, count: int, *, dim: int) -> Tensor:
    """Return Adam's moment of a matrix that has `count` new components along a dimension.

    A first moment starts at 0. A second moment starts at the mean of the old components': the step count, and so the bias
    correction, is shared with them, and from 0 the first steps would be up to 6 times the learning rate.
    """
    fresh = moment.mean(dim, keepdim=True) if name == "exp_avg_sq" else torch.zeros_like(moment.narrow(dim, 0, 1))
    return torch.cat([moment, fresh.repeat_interleave(count, dim)], dim)


def _positive_part(omega: Tensor) -> Tensor:
    """Return max(ω, 0) whose gradient with respect to ω is 1 everywhere (straight-through)."""
    return omega - omega.detach().clamp(max=0)
