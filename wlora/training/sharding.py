"""Shard the frozen base with FSDP (`torch.distributed.fsdp`) over the processes of a run, for models that fill a GPU.

Only the base is sharded: every process holds a part of each layer and gathers the layer when it is computed. Adapters
and head are small and not sharded, so FSDP ignores them. Their gradients are averaged here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from wlora.distributed import gather, mean, several
from wlora.errors import ConfigError
from wlora.methods.base import Method
from wlora.models.discovery import layout_of


def shard_base(model: PreTrainedModel, device: torch.device) -> None:
    """Shard the frozen parameters over all processes, layer by layer, in place.

    Args:
        model: the model with its adapters, ready for training. From here on all processes must call it together.
        device: this process's device; its parts are moved there.

    Raises:
        ConfigError: there is only one process.
    """
    from torch.distributed.fsdp import fully_shard

    if not several():
        raise ConfigError("train.fsdp=true: allowed with several processes: accelerate launch --multi_gpu --num_processes N")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    whole = {p for p in model.parameters() if p.requires_grad}
    for stack in layout_of(model).stacks:
        for layer in model.get_submodule(stack.prefix).children():
            fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of unsharded parameters over all processes, in one transfer."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    averaged = mean(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = torch.split(averaged, [gradient.numel() for gradient in gradients])  # type: ignore[no-untyped-call]
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def check_same_adapters(method: Method, step: int) -> None:
    """Assert that all processes have the same adapters. Otherwise different parameters would be averaged unnoticed."""
    found = gather({name: adapter.rank for name, adapter in method.attached().items()})
    if any(ranks != found[0] for ranks in found):
        raise AssertionError(f"the processes have different adapters after step {step}: {found}")
