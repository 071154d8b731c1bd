"""The adapters of several runs on the same module, computed in batched products: the forward pass of packed training.

Runs of a pack share the frozen base. The batch contains the rows of all runs, one run after another. A run's adapter is
applied only to that run's rows: h = W x + s · ω · B diag(g) A x. All A and all B are stacked to batched matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from wlora.adapters.layer import LowRankAdapter, positive_part

Drop = Callable[[Tensor, float, Tensor | None], Tensor]
"""Dropout function. Arguments: the rows, the probability, and the indices of the rows' runs (None for all runs)."""


class Stacks:
    """Parameters of several runs, stacked for one pass, and their gradients.

    Each stack is a leaf of the graph. After the backward pass, the parameters get views of its gradient. This takes two
    operations for any number of runs. Without it, autograd would copy the gradient of every parameter.
    """

    def __init__(self) -> None:
        self._stacks: dict[tuple[int, ...], tuple[Sequence[Tensor], Tensor]] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Stack tensors of equal shape along a new first dimension. The same tensors give the same stack."""
        key = tuple(map(id, tensors))
        if key not in self._stacks:
            with torch.no_grad():
                stacked = torch.stack(list(tensors))
            self._stacks[key] = tensors, stacked.requires_grad_(any(t.requires_grad for t in tensors))
        return self._stacks[key][1]

    def divide(self) -> None:
        """Add the gradients of the stacks to those of the parameters, and remove the stacks."""
        for tensors, stacked in self._stacks.values():
            if stacked.grad is None:
                continue
            for tensor, gradient in zip(tensors, stacked.grad.unbind(), strict=True):
                if tensor.requires_grad:
                    tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
        self._stacks.clear()


def add_adapters(out: Tensor, x: Tensor, adapters: Sequence[LowRankAdapter | None], drop: Drop, stack: Stacks) -> Tensor:
    """Add the output of each run's adapter, computed on that run's rows, to the base's output.

    Args:
        out: the base's output [rows, ..., d_out], or [1, ..., d_out] if all runs share the input.
        x: the base's input [rows, ..., d_in]; the same number of rows for each run.
        adapters: one per run; None if the run has no adapter on this module. They have no gates.
        drop: the dropout on the adapters' input.
        stack: stacks the adapters' parameters.

    Returns:
        Shape [rows, ..., d_out] in the dtype of `out`; for a shared input, one row per run.
    """
    runs = len(adapters)
    groups: dict[tuple[int, float], list[int]] = {}
    for index, adapter in enumerate(adapters):
        if adapter is not None:
            groups.setdefault((adapter.rank, adapter.dropout if adapter.training else 0.0), []).append(index)
    if not groups:
        return out
    if len(out) == 1 < runs:
        out = out.expand(runs, *out.shape[1:])
    summed = out.reshape(runs, -1, out.shape[-1])
    for (_, dropout), members in groups.items():
        chosen = [adapter for index in members if (adapter := adapters[index]) is not None]
        some = None if len(members) == runs else _constant(tuple(members), torch.int64, out.device)
        rows = drop(_rows_of(x, some, runs), dropout, some)
        found = _multiply(rows, chosen, stack).to(out.dtype).expand(len(members), -1, -1)
        summed = summed + found if some is None else summed.index_add(0, some, found)
    return summed.reshape(out.shape)


def apply_linears(x: Tensor, linears: Sequence[nn.Linear], stack: Stacks) -> Tensor:
    """Apply each run's own linear module to the rows of that run; x has shape [rows, ..., d_in]."""
    blocks = x.reshape(len(linears), -1, x.shape[-1])
    weights = stack([linear.weight for linear in linears]).transpose(1, 2)
    if linears[0].bias is None:
        found = torch.bmm(blocks, weights)
    else:
        found = torch.baddbmm(stack([linear.bias for linear in linears]).unsqueeze(1), blocks, weights)
    return found.view(*x.shape[:-1], -1)


def _rows_of(x: Tensor, index: Tensor | None, runs: int) -> Tensor:
    """Return the rows of the runs with the given indices; a shared input is returned unchanged."""
    if index is None or len(x) == 1 < runs:
        return x
    return x.view(runs, -1, *x.shape[1:]).index_select(0, index).flatten(0, 1)


def _multiply(rows: Tensor, adapters: Sequence[LowRankAdapter], stack: Stacks) -> Tensor:
    """Return s·ω·B A x of every adapter for its rows, [adapters, rows · tokens, d_out]."""
    A, B = stack([adapter.A for adapter in adapters]), stack([adapter.B for adapter in adapters])
    weighting = _constant(tuple(adapter.scale for adapter in adapters), A.dtype, A.device)
    if any(adapter.omega is not None for adapter in adapters):
        one = _constant((1.0,), A.dtype, A.device).squeeze()
        weighting = weighting * positive_part(stack([one if a.omega is None else a.omega for a in adapters]))
    dtype = rows.dtype if adapters[0].fast else A.dtype
    rows, A, B = rows.to(dtype), A.to(dtype), (B * weighting.view(-1, 1, 1)).to(dtype)
    if len(rows) == 1 < len(adapters):
        components = rows.reshape(-1, rows.shape[-1]) @ A.transpose(1, 2)
    else:
        components = torch.bmm(rows.reshape(len(adapters), -1, rows.shape[-1]), A.transpose(1, 2))
    return torch.bmm(components, B.transpose(1, 2))


@functools.lru_cache(maxsize=4096)
@torch.inference_mode(False)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of fixed numbers; cached, because a copy to a GPU takes longer than a small product."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
