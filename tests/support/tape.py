"""A stand-in for CUDA graphs on the CPU: it records the operations of a computation and replays them on the same tensors.

As with a CUDA graph, Python runs once. What it decides, and which tensors it uses, is fixed; random numbers are drawn anew.
Recording changes nothing: neither tensors nor the state of the random generator. Reading a value is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READING = ("_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "equal")


def tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.removeprefix("aten::") in READING:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tensors(value):
                    if (storage := tensor.untyped_storage()._cdata) not in self.made:
                        self.before.setdefault(storage, (tensor, tensor.clone()))
        out = func(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in tensors((args, kwargs))}
        # Views follow what they are views of; everything else is written again in each replay.
        written = [tensor for tensor in tensors(out) if tensor.untyped_storage()._cdata not in given]
        self.made |= {tensor.untyped_storage()._cdata for tensor in written}
        self.operations.append((func, args, kwargs, written))
        return out


class Tape:
    """Records as `wlora.training.graphs.CudaRecorder` does."""

    made = 0

    def __init__(self) -> None:
        Tape.made += 1

    def run(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()

    def record(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        stream, recording = torch.get_rng_state(), _Recording()
        # transformers does not look at masks then.
        with mock.patch("torch.cuda.is_current_stream_capturing", lambda: True), recording:
            found = compute()
        torch.set_rng_state(stream)
        with torch.no_grad():
            for tensor, value in recording.before.values():
                tensor.copy_(value)

        def replay() -> Tensor:
            with torch.no_grad():
                for func, args, kwargs, written in recording.operations:
                    out = tensors(func(*args, **kwargs))
                    for tensor, value in zip(written, out if written else [], strict=True):
                        tensor.copy_(value)
            return found

        return replay
