"""What a micro-batch keeps in memory between its forward and its backward pass, and an example to measure it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wlora.config.schema import Config
from wlora.models.architectures import read_architecture
from wlora.models.loading import build_unloaded
from wlora.tasks.base import build_task

# Any vocabulary has as many.
TOKENS = 100


def build_example(config: Config, device: str) -> PreTrainedModel:
    """Build the configured model without its weights, on which memory and time do not depend, all parameters frozen.

    Args:
        device: where random weights take their place; on `meta` there are none.
    """
    architecture = {"vocab_size": TOKENS, **read_architecture(config.model)}
    task = build_task(config.task)
    model = build_unloaded(config.model, architecture, head=task.head, num_labels=task.num_labels, device=device)
    model.config.pad_token_id = 0  # no token of `make_batch`
    return model


def make_batch(model: PreTrainedModel, config: Config) -> dict[str, Tensor]:
    """Return a full batch of `task.batch_size` rows of `task.max_length` random tokens: what takes the most memory."""
    rows, length = config.task.batch_size, config.task.max_length
    device = next(model.parameters()).device
    ids = torch.randint(5, TOKENS, (rows, length), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    zeros = torch.zeros(rows, dtype=torch.int64, device=device)
    head = build_task(config.task).head
    if head == "question_answering":
        return {**batch, "start_positions": zeros, "end_positions": zeros}
    if head == "seq2seq":
        return {**batch, "labels": ids[:, : config.task.max_target_length or length].contiguous()}
    return {**batch, "labels": zeros if config.task.labels else zeros.float()}


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
