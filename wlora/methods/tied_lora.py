"""Tied-LoRA (Renduchintala et al., 2023, arXiv 2311.09578): matrices shared by all layers, scaling vectors of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from wlora.adapters.layer import LowRankAdapter
from wlora.adapters.variants import TiedAdapter
from wlora.methods.base import AdapterMethod, Setting
from wlora.methods.parameter_groups import ParameterGroup


class TiedLoRA(AdapterMethod):
    """h = W x + s·Λ_v B Λ_u A x: the variant of the paper that trains all four, with A drawn, B = 0 and u = v = 1.

    The original adapts one fused qkv matrix per layer. Here its parts are tied alike: one A for all modules of an input
    width, one B per kind of module (the fused B's rows), one u per layer and input width, one v per module. On q, k, v of
    DeBERTaV3-base that gives the fused count, 4dr + L(r + 3d).
    """

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach adapters and tie their parts."""
        super().attach(model, setting)
        shared: dict[tuple[Any, ...], nn.Parameter] = {}
        for name, adapter in self.adapters.items():
            target, width = self.adapters.target(name), adapter.A.shape[1]
            assert adapter.gates is not None
            adapter.A = shared.setdefault(("A", width), adapter.A)
            adapter.B = shared.setdefault(("B", target.kind, adapter.B.shape), adapter.B)
            adapter.gates = shared.setdefault(("u", target.layer, width), adapter.gates)

    def make_adapter(self, d_in: int, d_out: int, device: torch.device) -> LowRankAdapter:
        """Build an adapter with u and v of ones."""
        self.check_rank(d_in, d_out)
        return TiedAdapter(d_in, d_out, rank=self.rank, scale=self.alpha / self.rank, dropout=self.dropout, device=device)

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return A, B, u and v."""
        return [ParameterGroup([p for adapter in self.adapters.values() for p in adapter.counted()], lr)]
