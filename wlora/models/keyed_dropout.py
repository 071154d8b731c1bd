"""Dropout masks that are computed by a hash of their position, instead of being drawn from a stream of random numbers.

Whether an element is dropped depends on a hash of the run's key in this step, the name of the dropout module, the row, and
the position in the row. Therefore the masks of a run do not depend on the other runs of its pack, on padding, on the device,
or on interruptions.

The hash is two rounds of xor-shift and multiplication, as in MurmurHash3's finaliser (Appleby, 2011, public domain).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Odd constants: those of MurmurHash3 (as signed numbers) for mixing, and multiples of the golden ratio for positions.
_MIX = (-2048144789, -1028477387)
_STRIDES = (-1640531527, 1540483477, 668265263, 374761393)

_FIRST = ContextVar("first", default=0)


@contextmanager
def starting_at(first: int) -> Iterator[None]:
    """Within this block, the inputs of dropout are parts of larger tensors. They start at index `first` of dimension 1."""
    before = _FIRST.set(first)
    try:
        yield
    finally:
        _FIRST.reset(before)


def make_key(*parts: int | str) -> int:
    """Return 32 bits of a hash as a signed number."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


class KeyedDropout(TorchFunctionMode):
    """Within this context, every dropout of a model uses keyed masks. The batch contains the rows of one or several runs.

    The first dimension of a tensor is `members · rows` (rows of all members), `members` (one per member) or 1 (shared).

    Args:
        keys: the key of each member in this step (`make_key`).
        rows: rows of each member.
        device: device of the masks.
    """

    def __init__(self, keys: Sequence[int], rows: int, device: torch.device) -> None:
        super().__init__()
        self.members, self.rows, self.device = len(keys), rows, device
        self._alike = len(set(keys)) == 1
        # [members or 1, rows]: hashed, so that rows of different members do not have neighbouring numbers.
        key = torch.tensor(keys[:1] if self._alike else list(keys), dtype=torch.int32).to(device, non_blocking=True)
        self._rows = _mix(key.unsqueeze(1) + _numbers(rows, device) * _STRIDES[0])
        self._count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace dropout and attention with dropout; call everything else."""
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p", 0.0) > 0:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def drop(self, x: Tensor, p: float, place: str, members: Tensor | None = None) -> Tensor:
        """Return x with each element set to 0 with probability p and the others divided by 1 − p.

        Args:
            x: shape [members · rows, ...], [members, ...] or [1, ...]. For a shared input, the result is shared as well if
                all keys are equal; otherwise it has one entry per member.
            p: the probability, below 1.
            place: name of the dropout module in the model.
            members: indices of the members in x; None for all.
        """
        if p == 0:
            return x
        keys = self._rows if members is None or self._alike else self._rows.index_select(0, members)
        count = self.members if members is None else len(members)
        if x.shape[0] == 1 < count * self.rows:
            keys, blocks = keys[:, :1], x.unsqueeze(0)
        else:
            blocks = x.view(count, -1, *x.shape[1:])
            keys = keys[:, : blocks.shape[1]]
        dropped = self._hash(keys, place, x.shape[1:]) < _threshold(p)
        return (blocks.masked_fill(dropped, 0) * (1 / (1 - p))).flatten(0, 1)

    @torch.no_grad()
    def _hash(self, keys: Tensor, place: str, shape: torch.Size) -> Tensor:
        """Return a hash for each element, int32 [members or 1, rows, *shape]."""
        keys = (keys * (make_key(place) | 1)).view(*keys.shape, *[1] * len(shape))
        return _mix(keys + _positions(shape, _FIRST.get(), self.device))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        self._count += 1
        return self.drop(input, p, f"base/{self._count}")

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Compute attention with its weights written out, as torch's reference implementation does."""
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        scores = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -math.inf)
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -math.inf) if hidden else scores + attn_mask
        return self._dropout(scores.softmax(-1), dropout_p) @ value


def _mix(hashed: Tensor) -> Tensor:
    """Mix the bits of int32 numbers in place; the highest bits of the result are the best mixed."""
    for shift, factor in zip((16, 15), _MIX, strict=True):
        hashed.bitwise_xor_(hashed >> shift).mul_(factor)
    return hashed


def _threshold(p: float) -> int:
    """Return the number below which a share p of all int32 numbers lies."""
    return min(2**31 - 1, round(p * 2**32) - 2**31)


def _numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _positions(shape: torch.Size, first: int, device: torch.device) -> Tensor:
    """Return a number for each position in a row, int32 of the given shape, that does not depend on the shape."""
    found = torch.zeros((), dtype=torch.int32, device=device)
    for axis, (count, stride) in enumerate(zip(shape, _STRIDES[1:], strict=False)):
        along = (_numbers(count, device) + (first if axis == 0 else 0)) * stride
        found = found.unsqueeze(-1) + along
    return found
