"""Quantised base models: linear modules stored in 4 or 8 bits by bitsandbytes, and their element counts.

Adapters do not change: they call a quantised module like any other. Head and output embeddings are not quantised.
"""

from __future__ import annotations

import logging
from math import prod
from typing import Any

import torch
from torch import nn

HEAD_MODULES = ("pooler", "classifier", "classification_head", "score", "qa_outputs")
_UNPACKED = (*HEAD_MODULES, "lm_head")


def loading_options(quantization: str, *, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantise the weights while loading.

    Args:
        quantization: `nf4` (Dettmers et al., 2023), `int8` (Dettmers et al., 2022), or `none` (no arguments).
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
        llm_int8_skip_modules=[rf"(.*\.)?{name}" for name in _UNPACKED],  # patterns for whole names
    )
    return {"quantization_config": config, "device_map": {"": device}}


def keep_differentiable(model: nn.Module) -> None:
    """Prevent bitsandbytes from repacking nf4 weights for inference, which some CPUs do in place during evaluation.

    No gradient flows through repacked weights to the layers below (bitsandbytes 0.50, CPUs with AVX512-BF16).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def packed_linears(model: nn.Module) -> list[nn.Linear]:
    """Return the linear modules of a plain model that quantisation packs: those of the body."""
    named = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    return [module for name, module in named if not set(name.split(".")) & set(_UNPACKED)]


def pack_on_meta(model: nn.Module, quantization: str) -> None:
    """Replace the weights of linear modules on the meta device by weights of the packed size, for counting."""
    for module in packed_linears(model) if quantization != "none" else ():
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
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and id(weight) in stored and not weight.is_floating_point():
            logical[id(weight)] = prod(_shape(module))
    return sum(logical.values()), sum(stored.values())


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return the shape of a quantised linear or embedding module, whose weight tensor does not have it."""
    names = ("out_features", "in_features") if hasattr(module, "in_features") else ("num_embeddings", "embedding_dim")
    return int(getattr(module, names[0])), int(getattr(module, names[1]))
