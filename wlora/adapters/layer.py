"""The adapter layer that most methods use: gated low-rank components, added to a frozen linear module.

    h = W x + s · ω · B diag(g) A x        A: r×d_in   B: d_out×r   g: r gates   ω: scalar gate   s: constant

The methods (`wlora.methods`) decide when gates change. This module only computes with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wlora.adapters.derivation import derive
from wlora.models.fast_dropout import SHARED_INPUT

Extension = Literal["qr", "gaussian", "uniform"]


class Adapter(Protocol):
    """The interface of an adapter for parameter counts, records and console output, also for adapters from PEFT."""

    @property
    def rank(self) -> int:
        """Number of components."""
        ...

    @property
    def omega(self) -> Tensor | None:
        """The adapter's scalar gate; None without one."""
        ...

    def counted(self) -> list[nn.Parameter]:
        """Return the parameters that are counted as the adapter's size."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return all parameters of the adapter."""
        ...


class LowRankAdapter(nn.Module):
    """The trainable part of one adapted linear module.

    `A` is r×d_in with LoRA's Kaiming-uniform initialisation (bound 1/√d_in). `B` is d_out×r and zero, so the initial
    function is that of the base. `omega` (0-dim) and `gates` (r) exist only if a method needs them; `requires_grad`
    says whether they train.

    Attributes:
        fast: whether to multiply in the dtype of the input, and to share dropout masks with the other adapters that read
            it (`train.fast_step`).

    Args:
        d_in: width of the input.
        d_out: width of the output.
        rank: number of components, at least 1.
        scale: the constant s, usually alpha / rank.
        dropout: dropout probability on the adapter's input.
        omega: initial value of the adapter's scalar gate, or None for no gate.
        positive: if true, an adapter with ω ≤ 0 contributes nothing in the forward pass (paper §3.3); the gradient of ω
            is still s·⟨∂L/∂h, B A x⟩, so the adapter may return. If false, ω multiplies without a threshold.
    """

    fast = False

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
        """Return s·ω·B diag(g) A x for x of shape [..., d_in]. No d_out×d_in matrix is built.

        The result has the adapter's dtype; if the adapter is `fast`, that of x.
        """
        dtype = x.dtype if self.fast else self.A.dtype
        components = F.linear(self.drop(x).to(dtype), self.A.to(dtype))
        outer = (self.B * self._weighting()).to(dtype).T
        # With a tall matrix, as B is, a CPU takes three times as long for both products of the backward pass.
        return components @ (outer.contiguous() if outer.device.type == "cpu" else outer)

    def drop(self, x: Tensor) -> Tensor:
        """Return the adapter's input with elements dropped, in training."""
        if self.fast and self.training:
            return SHARED_INPUT.drop(x, self.dropout)
        return F.dropout(x, self.dropout, self.training)

    def _weighting(self) -> Tensor | float:
        """Return the factor of every component: a number, or a tensor of shape [] or [r]."""
        return self._gating(self.scale)

    def _gating(self, weighting: Tensor | float) -> Tensor | float:
        """Return a number multiplied by ω and the gates."""
        if self.omega is not None:
            weighting = weighting * (positive_part(self.omega) if self.positive else self.omega)
        if self.gates is not None:
            weighting = weighting * self.gates
        return weighting

    @torch.no_grad()
    def factors(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return A [r, d_in] and B [d_out, r] of a plain LoRA adapter with the same ΔW; r ≥ `rank`.

        B includes the gates and `scale`. With the default scale 1, ΔW = s·B A.
        """
        return self.A.detach(), self.B * self._gating(scale)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return ΔW as a d_out×d_in matrix. For merging and tests; never used in training."""
        A, B = self.factors(self.scale)
        return B @ A

    @torch.no_grad()
    def start_from(self, A: Tensor, B: Tensor, scale: float) -> None:
        """Copy another adapter's matrices and scale, with its rank. Parameters become new objects.

        Raises:
            ValueError: the other adapter's widths differ from this one's.
        """
        d_in, d_out = self.A.shape[1], self.B.shape[0]
        if (A.shape[1], B.shape[0]) != (d_in, d_out):
            raise ValueError(f"maps {A.shape[1]} to {B.shape[0]}, the module {d_in} to {d_out}")
        self.A, self.B = (nn.Parameter(m.to(device=self.A.device, dtype=self.A.dtype, copy=True)) for m in (A, B))
        self.scale = scale

    @torch.no_grad()
    def prune(self, keep: Tensor) -> None:
        """Keep only the components with the given indices or boolean mask.

        Parameters become new objects, derived from the old ones, so that the optimiser prunes their moments as well.
        """
        self.A = derive(self.A, self.A[keep], lambda _, moment: moment[keep])
        self.B = derive(self.B, self.B[:, keep], lambda _, moment: moment[:, keep])
        if self.gates is not None:
            self.gates = derive(self.gates, self.gates[keep], lambda _, moment: moment[keep])

    @torch.no_grad()
    def extend(self, rank: int, *, how: Extension, generator: torch.Generator, keep_moments: bool = False) -> None:
        """Extend to `rank` components without changing the function (paper §3.4). Parameters become new objects.

        New columns of B are zero. `gaussian` appends rows from N(0, 1/d_in) to A. `qr` factors Aᵀ = QR, sets A to Qᵀ
        and B to B Rᵀ, and appends rows from N(0, 1/d_in) projected onto the complement of Q's span. `uniform` is `qr`
        with rows from U[0, 1), as in the published code.

        Args:
            rank: the new number of components.
            how: `gaussian`, `qr` or `uniform`.
            generator: source of the random rows, on the CPU.
            keep_moments: with `gaussian`, keep the optimiser moments of the old components. `qr` and `uniform` change
                the basis of A and B, so the old second moments do not apply there.

        Raises:
            ValueError: `rank` is below the current rank or above the input width.
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
        """Set s without changing the function: a new B is the old one times s_old / s_new."""
        factor = self.scale / scale
        # When B is multiplied by a factor, its gradient is divided by that factor.
        powers = {"exp_avg": 1, "exp_avg_sq": 2}
        self.B = derive(self.B, self.B * factor, lambda name, moment: moment / factor ** powers.get(name, 0))
        self.scale = scale

    @torch.no_grad()
    def fix_omega(self) -> None:
        """Stop training ω; its value becomes a constant factor."""
        if self.omega is not None:
            self.omega.requires_grad_(False)
            self.omega.grad = None

    def counted(self) -> list[nn.Parameter]:
        """Return the counted parameters, A and B. As in the paper's tables, ω and g do not count."""
        return [self.A, self.B]

    def count(self) -> int:
        """Return the number of counted elements."""
        return sum(p.numel() for p in self.counted())


def quicken_adapters(model: nn.Module) -> None:
    """Make every adapter of a model `fast`."""
    for module in model.modules():
        if isinstance(module, LowRankAdapter):
            module.fast = True
    # Gradient checkpointing computes the topmost layer again from the same tensor, and must then draw its mask again.
    model.register_forward_hook(_forget_input)


def _forget_input(*_: Any) -> None:
    SHARED_INPUT.forget()


class AdaptedLinear(nn.Module):
    """A linear module and its adapter. The forward pass adds their outputs."""

    adapts = True  # read by modules that do not import this package, such as the search for frozen layers

    def __init__(self, base: nn.Module, adapter: LowRankAdapter) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter

    @property
    def weight(self) -> Any:
        """The weight of the base module. T5 reads its dtype before it calls the module."""
        return self.base.weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) + adapter(x) in the base's output dtype, for x of shape [..., d_in]."""
        out: Tensor = self.base(x, *args, **kwargs)
        summed: Tensor = out + self.adapter(x).to(out.dtype)
        return summed


def _extend_moment(name: str, moment: Tensor, count: int, *, dim: int) -> Tensor:
    """Return Adam's moment of a matrix that has `count` new components along dimension `dim`.

    New first moments are 0. New second moments are the mean over the old components. The step count, and therefore the
    bias correction, is shared with the old components, so that with second moments of 0 the first steps would be up to
    6 times the learning rate.
    """
    fresh = moment.mean(dim, keepdim=True) if name == "exp_avg_sq" else torch.zeros_like(moment.narrow(dim, 0, 1))
    return torch.cat([moment, fresh.repeat_interleave(count, dim)], dim)


def positive_part(omega: Tensor) -> Tensor:
    """Return max(ω, 0) with a gradient of 1 everywhere with respect to ω (straight-through estimator)."""
    return omega - omega.detach().clamp(max=0)
