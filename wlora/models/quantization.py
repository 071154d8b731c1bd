"""Quantised base models: linear modules stored in 4 or 8 bits by bitsandbytes, and their element counts.

Adapters do not change: they call a quantised module like any other. Head and output embeddings are not quantised.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from wlora.models.heads import LM_HEAD, head_modules
from wlora.models.linears import widths


def loading_options(
    quantization: str, *, unpacked: Iterable[str], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantise the weights while loading.

    Args:
        quantization: `nf4` (Dettmers et al., 2023), `int8` (Dettmers et al., 2022), or `none` (no arguments).
        unpacked: names of modules that stay as they are: `unpacked_modules`.
        device: the device that the model runs on; quantised weights are created there.
        dtype: for nf4, the dtype of matrix products; int8 uses float16 around its integer products.
    """
    if quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    # bitsandbytes would log at every product that int8 converts its input to float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    config = BitsAndBytesConfig(
        load_in_4bit=quantization == "nf4",
        load_in_8bit=quantization == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[rf"(.*\.)?{re.escape(name)}" for name in unpacked],  # patterns for whole names
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_differentiable(model: nn.Module) -> None:
    """Prevent bitsandbytes from repacking nf4 weights for inference, which some CPUs do in place during evaluation.

    No gradient flows through repacked weights to the layers below (bitsandbytes 0.50, CPUs with AVX512-BF16).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def unpacked_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that are never quantised: head, pooler and output embeddings."""
    return (*head_modules(model), LM_HEAD)


def packed_linears(model: nn.Module) -> list[nn.Module]:
    """Return the linear modules of a plain model that quantisation packs: those of the body."""
    unpacked = unpacked_modules(model)
    return [
        module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        if not any(name == head or name.startswith(f"{head}.") for head in unpacked)
    ]


def pack_on_meta(model: nn.Module, quantization: str) -> None:
    """Replace the weights of linear modules on the meta device by weights of the packed size, for counting."""
    for module in packed_linears(model) if quantization != "none" else ():
        assert isinstance(module.weight, torch.Tensor)
        elements = module.weight.numel()
        size = elements if quantization == "int8" else (elements + 1) // 2
        module.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)


def count_model(model: nn.Module, *, without: set[int]) -> tuple[int, int]:
    """Count a model's elements: the logical ones of its architecture, and the stored ones (nf4: two elements per byte).

    Args:
        model: the model.
        without: ids of parameters that are not counted.
    """
    stored = {id(p): p.numel() for p in model.parameters() if id(p) not in without}
    logical = dict(stored)
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in stored and not weight.is_floating_point():
            logical[id(weight)] = prod(_shape(module))
    return sum(logical.values()), sum(stored.values())


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return the shape of a quantised linear or embedding module, whose weight tensor does not have it."""
    if hasattr(module, "num_embeddings"):
        return int(module.num_embeddings), int(module.embedding_dim)  # type: ignore[arg-type]
    return widths(module)
