"""What a micro-batch keeps in memory between its forward and its backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def activation_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Return the memory that a micro-batch takes beyond what stays: measured on a GPU, on others `saved_bytes`.

    On a GPU that is the peak over a forward and a backward pass; gradients are left behind.
    """
    device = next(iter(batch.values())).device
    if device.type != "cuda":
        return saved_bytes(model, batch)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model(**batch).loss.backward()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Return the bytes that autograd saves for the backward pass: each storage once, parameters not at all.

    On the meta device, which holds no memory, they are the bytes that there would be.
    """
    owned = {_identity(tensor) for tensor in [*model.parameters(), *batch.values()]}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> None:
        if _identity(tensor) not in owned:
            # Holding the storage keeps another from being put in its place.
            kept[_identity(tensor)] = tensor.untyped_storage()
        # There is no backward pass. A tensor given back here would hold the step that made it, which holds the tensor: all
        # of this memory would stay taken until the next garbage collection.

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        model(**batch)
    return sum(storage.nbytes() for storage in kept.values())


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
