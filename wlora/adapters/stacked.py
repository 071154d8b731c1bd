"""The adapters of several runs on the same module, multiplied as one: the forward pass of packed training.

Runs of a pack share the frozen base. Their rows lie one after another in the batch, and the products of a run's adapter are
those of its own rows: h = W x + s · ω · B diag(g) A x for each run, with all A and all B stacked to batched matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wlora.adapters.layer import LowRankAdapter, positive_part

Drop = Callable[[Tensor, float, Tensor | None], Tensor]
"""Dropout of (rows, probability, indices of the runs that they belong to, None for all)."""


class _Shape(NamedTuple):
    """What the adapters of one batched product have in common."""

    rank: int
    dropout: float
    gated: bool
    weighted: bool
    positive: bool


def add_adapters(out: Tensor, x: Tensor, adapters: Sequence[LowRankAdapter | None], drop: Drop) -> Tensor:
    """Add to the base's output what each run's adapter returns for the rows of that run.

    Args:
        out: the base's output [rows, ..., d_out], or [1, ..., d_out] if all runs share the input.
        x: the base's input [rows, ..., d_in]; the same number of rows for each run.
        adapters: one per run, None where the run has none on this module.
        drop: the dropout on the adapters' input.

    Returns:
        Shape [rows, ..., d_out] in the dtype of `out`; of a shared input one row per run.
    """
    runs = len(adapters)
    if all(adapter is None for adapter in adapters):
        return out
    if len(out) == 1 < runs:
        out = out.expand(runs, *out.shape[1:])
    summed = out.reshape(runs, -1, out.shape[-1])
    for shape, members in _group(adapters).items():
        chosen = [adapter for index in members if (adapter := adapters[index]) is not None]
        index = None if len(members) == runs else _constant(tuple(members), torch.int64, out.device)
        rows = drop(_rows_of(x, index, runs), shape.dropout if chosen[0].training else 0.0, index)
        found = _multiply(rows, chosen, shape).to(out.dtype)
        summed = (
            summed + found if index is None else summed.index_add(0, index, found.expand(len(members), *found.shape[1:]))
        )
    return summed.reshape(out.shape)


def apply_linears(x: Tensor, linears: Sequence[nn.Linear]) -> Tensor:
    """Apply each run's own linear module to the rows of that run; x has shape [rows, ..., d_in]."""
    blocks = x.reshape(len(linears), -1, x.shape[-1])
    weights = torch.stack([linear.weight for linear in linears]).transpose(1, 2)
    if linears[0].bias is None:
        found = torch.bmm(blocks, weights)
    else:
        found = torch.baddbmm(torch.stack([linear.bias for linear in linears]).unsqueeze(1), blocks, weights)
    return found.view(*x.shape[:-1], -1)


def _group(adapters: Sequence[LowRankAdapter | None]) -> dict[_Shape, list[int]]:
    """Return the indices of the adapters that can be multiplied together."""
    groups: dict[_Shape, list[int]] = {}
    for index, a in enumerate(adapters):
        if a is not None:
            shape = _Shape(a.rank, a.dropout, a.gates is not None, a.omega is not None, a.positive)
            groups.setdefault(shape, []).append(index)
    return groups


def _rows_of(x: Tensor, index: Tensor | None, runs: int) -> Tensor:
    """Return the rows of the runs with the given indices; a shared input is returned as it is."""
    if index is None or len(x) == 1 < runs:
        return x
    return x.view(runs, -1, *x.shape[1:]).index_select(0, index).flatten(0, 1)


def _multiply(rows: Tensor, adapters: Sequence[LowRankAdapter], shape: _Shape) -> Tensor:
    """Return s·ω·B diag(g) A x of every adapter for its rows, [adapters, rows · tokens, d_out]."""
    A = torch.stack([adapter.A for adapter in adapters])
    B = torch.stack([adapter.B for adapter in adapters])
    rows = rows.to(A.dtype)
    if len(rows) == 1 < len(adapters):
        components = rows.reshape(-1, rows.shape[-1]) @ A.transpose(1, 2)
    else:
        components = torch.bmm(rows.reshape(len(adapters), -1, rows.shape[-1]), A.transpose(1, 2))
    weighting = _constant(tuple(adapter.scale for adapter in adapters), A.dtype, A.device).view(-1, 1, 1)
    if shape.weighted:
        omega = torch.stack([adapter.omega for adapter in adapters if adapter.omega is not None])
        weighting = weighting * (positive_part(omega) if shape.positive else omega).view(-1, 1, 1)
    if shape.gated:
        weighting = weighting * torch.stack([a.gates for a in adapters if a.gates is not None]).unsqueeze(1)
    return torch.bmm(components * weighting, B.transpose(1, 2))


@functools.lru_cache(maxsize=4096)
@torch.inference_mode(False)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of fixed numbers; cached, because a copy to a GPU takes longer than a small product."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
