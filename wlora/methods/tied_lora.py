"""Tied-LoRA (Renduchintala et al., 2023, arXiv 2311.09578): low-rank matrices shared by all layers, plus scaling vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wlora.adapters.layer import LowRankAdapter
from wlora.adapters.variants import TiedAdapter
from wlora.methods.base import AdapterMethod, Setting
from wlora.methods.parameter_groups import ParameterGroup


class TiedLoRA(AdapterMethod):
    """h = W x + s·Λ_v B Λ_u A x: the paper's variant that trains A, B, u and v.

    A is random, B = 0, u = v = 1 at the start. The paper adapts one fused qkv matrix per layer. Here its parts are tied
    in the same way: one A for all modules with the same input width, one B per kind of module (the corresponding rows
    of the fused B), one u per layer and input width, and one v per module. On q, k, v of DeBERTaV3-base this gives the
    fused count 4dr + L(r + 3d), with width d, rank r and L layers.
    """

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach adapters and share their parameters."""
        super().attach(model, setting)
        shared: dict[tuple[Any, ...], nn.Parameter] = {}
        for name, adapter in self.adapters.items():
            target, width = self.adapters.target(name), adapter.A.shape[1]
            assert adapter.gates is not None
            adapter.A = shared.setdefault(("A", width), adapter.A)
            adapter.B = shared.setdefault(("B", target.kind, adapter.B.shape), adapter.B)
            adapter.gates = shared.setdefault(("u", target.layer, width), adapter.gates)

    def make_adapter(self, d_in: int, d_out: int, device: torch.device) -> LowRankAdapter:
        """Build an adapter with u = v = 1."""
        self.check_rank(d_in, d_out)
        return TiedAdapter(d_in, d_out, rank=self.rank, scale=self.alpha / self.rank, dropout=self.dropout, device=device)

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return A, B, u and v."""
        return [ParameterGroup([p for adapter in self.adapters.values() for p in adapter.counted()], lr)]
