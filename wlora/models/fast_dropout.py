"""Dropout for CPUs that draws 16 random bits per element instead of a Bernoulli number, which takes most of dropout's time.

Probabilities are rounded to multiples of 1/65536. The bits come from torch's generator, so seeds, checkpoints and
recomputed activations work as with torch's dropout; the masks are other ones. `train.fast_step` switches this on.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEVELS = 2**16


def drop(x: Tensor, p: float) -> Tensor:
    """Return x with each element set to 0 with probability p and the others divided by 1 − p; not on a CPU, torch's."""
    if x.device.type != "cpu" or not 0 < p < 1:
        return F.dropout(x, p)
    with torch.no_grad():
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
        # In place the comparison gives numbers, 0 or 1, which torch converts and multiplies faster than booleans.
        kept = bits.view(torch.int16)[: x.numel()].view(x.shape).ge_(min(round(p * _LEVELS), _LEVELS - 1) - _LEVELS // 2)
        mask = kept.to(x.dtype).mul_(1 / (1 - p))
    return x * mask


class SharedInput:
    """What dropout has left of the last input, for modules that read the same tensor one after another.

    So query, key and value drop the same elements of their input. Each of them alone has the same distribution of masks as
    with masks of its own.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], float, Tensor] | None = None

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Return `drop(x, p)`; the same result as last time if this is the same tensor."""
        if self._last is not None and self._last[0]() is x and self._last[1] == p:
            return self._last[2]
        dropped = drop(x, p)
        # With its input the result is forgotten, so that no memory is kept for longer than the pass.
        self._last = weakref.ref(x, self._forget), p, dropped
        return dropped

    def forget(self) -> None:
        """Forget the last input: the next module drops other elements, even of the same tensor."""
        self._last = None

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last[0] is gone:
            self._last = None


SHARED_INPUT = SharedInput()


class FastDropout(nn.Dropout):
    """`nn.Dropout` by `drop`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with elements dropped, in training."""
        return drop(input, self.p) if self.training else input


def quicken_dropout(model: nn.Module, fast: bool = True) -> None:
    """Let every dropout module of a model draw its masks by `drop`, or (`fast=False`) by torch again."""
    for module in model.modules():
        if type(module) in (nn.Dropout, FastDropout) and not module.inplace:
            module.__class__ = FastDropout if fast else nn.Dropout
