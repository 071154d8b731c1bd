"""Memory of the activations that a micro-batch saves for its backward pass, and a model and batch to measure it with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wlora.config.schema import Config
from wlora.models.architectures import read_architecture
from wlora.models.loading import build_unloaded
from wlora.tasks.base import build_task

# Smaller than every supported vocabulary.
TOKENS = 100


def build_example(config: Config, device: str) -> PreTrainedModel:
    """Build the configured model with all parameters frozen.

    Pretrained weights are not loaded: memory and time do not depend on them.

    Args:
        config: the configuration.
        device: device of the random weights; on `meta` there are no weights.
    """
    architecture = {"vocab_size": TOKENS, **read_architecture(config.model)}
    task = build_task(config.task)
    model = build_unloaded(config.model, architecture, head=task.head, num_labels=task.num_labels, device=device)
    model.config.pad_token_id = 0  # not a token of `make_batch`
    return model


def make_batch(model: PreTrainedModel, config: Config) -> dict[str, Tensor]:
    """Return the largest batch: `task.batch_size` rows of `task.max_length` random tokens."""
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
    if head == "token_classification":
        return {**batch, "labels": torch.zeros_like(ids)}
    if config.task.kind == "multi_label":
        model.config.problem_type = "multi_label_classification"
        return {**batch, "labels": zeros.float()[:, None].expand(-1, len(config.task.labels))}
    return {**batch, "labels": zeros if config.task.labels else zeros.float()}


def activation_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Return the memory in bytes that a micro-batch takes temporarily.

    On a GPU this is the measured peak of a forward and a backward pass, which leaves gradients behind. On other devices
    it is `saved_bytes`.
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
    """Return the bytes that autograd saves for the backward pass. Each storage counts once; parameters do not count.

    On the meta device, which allocates no memory, these are the bytes that another device would need.
    """
    owned = {_identity(tensor) for tensor in [*model.parameters(), *batch.values()]}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> None:
        if _identity(tensor) not in owned:
            # Keeping the storage alive prevents another one from getting the same address.
            kept[_identity(tensor)] = tensor.untyped_storage()
        # There is no backward pass. Returning the tensor here would create a reference cycle with its autograd node,
        # and all this memory would stay allocated until the next garbage collection.

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        model(**batch)
    return sum(storage.nbytes() for storage in kept.values())


def _identity(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
