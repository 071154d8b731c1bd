"""A base whose linears are packed into 4 or 8 bits by bitsandbytes, and how many elements that takes.

The layer on top does not change: it calls the packed linear as it calls any. Head and output embeddings stay as they are.
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
    """Return what `from_pretrained` needs in order to pack the weights as it reads them.

    Args:
        quantization: `nf4` (Dettmers et al., 2023) or `int8` (Dettmers et al., 2022); for `none` nothing is needed.
        device: where the model is to run: packed weights are made there.
        dtype: what nf4 is unpacked to for a product; int8 multiplies in float16 around its integers.
    """
    if quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    # It would tell at every product that int8 rounds its input to float16.
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
    """Keep bitsandbytes from repacking nf4 weights for inference, which it does in place at an evaluation on some CPUs.

    From the repacked weights no gradient flows back to the layers below (bitsandbytes 0.50, CPUs with AVX512-BF16).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def packed_linears(model: nn.Module) -> list[nn.Linear]:
    """Return the linears of a plain model that quantisation packs: those of the body."""
    named = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    return [module for name, module in named if not set(name.split(".")) & set(_UNPACKED)]


def pack_on_meta(model: nn.Module, quantization: str) -> None:
    """Give the linears of a model on the meta device the shape of packed ones, for counting."""
    for module in packed_linears(model) if quantization != "none" else ():
        elements = module.weight.numel()
        size = elements if quantization == "int8" else (elements + 1) // 2
        module.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)


def count_model(model: nn.Module, *, without: set[int]) -> tuple[int, int]:
    """Count a model's elements: as its architecture has them, and as they lie in memory (nf4: two to an element).

    Args:
        without: ids of parameters that do not count.
    """
    stored = {id(p): p.numel() for p in model.parameters() if id(p) not in without}
    logical = dict(stored)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and id(weight) in stored and not weight.is_floating_point():
            logical[id(weight)] = prod(_shape(module))
    return sum(logical.values()), sum(stored.values())


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return the shape of a packed linear or embedding, whose weight no longer tells it."""
    names = ("out_features", "in_features") if hasattr(module, "in_features") else ("num_embeddings", "embedding_dim")
    return int(getattr(module, names[0])), int(getattr(module, names[1]))
