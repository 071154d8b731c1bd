"""The precision of a run, reported with its reason.

The frozen base may use low precision; trained parameters stay float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from wlora.adapters.layer import LowRankAdapter
from wlora.models.heads import head_modules

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A precision: its name (`fp32`, `bf16`, `fp16`) and the reason for the choice.

    `emulated` is for processors without bfloat16 products, where a bfloat16 product takes several times as long as a
    float32 product. Linear modules then multiply bfloat16 values in float32 and round the result, as hardware with
    bfloat16 products does.
    """

    name: str
    reason: str
    emulated: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen base's weights and activations."""
        return _DTYPES[self.name]


def has_accelerator() -> bool:
    """Tell whether there is a training device other than the CPU: a GPU by Nvidia, AMD, Intel or Apple (`mps`)."""
    return any(kind.is_available() for kind in (torch.cuda, torch.backends.mps, torch.xpu))


def choose_precision(requested: str, device: torch.device) -> Precision:
    """Choose the precision for a device. `auto` chooses low precision if the hardware has fast products for it."""
    if requested == "bf16" and device.type == "cpu" and not _cpu_multiplies_bf16():
        return Precision(requested, "asked for; this processor multiplies it in float32", emulated=True)
    if requested != "auto":
        return Precision(requested, "asked for")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        if major >= 8:
            return Precision("bf16", f"{name} multiplies bfloat16 fast")
        if major == 7:
            return Precision("fp16", f"{name} (compute capability {major}.{minor}) multiplies float16 fast, not bfloat16")
        return Precision("fp32", f"{name} multiplies neither fast")
    if device.type == "cpu" and _cpu_multiplies_bf16():
        return Precision("bf16", "this processor multiplies bfloat16 fast")
    return Precision("fp32", f"this {device.type} does not multiply low precision fast")


def _cpu_multiplies_bf16() -> bool:
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def lower_base(model: nn.Module, precision: Precision) -> None:
    """Cast the frozen base to the chosen dtype. Adapters and head stay float32.

    The head's inputs are cast to float32, so logits and loss are float32. Layer norms and softmax accumulate in float32
    inside torch's kernels, independent of the dtype of their input. Buffers (rotary frequencies) keep their dtype.
    """
    if precision.name == "fp32":
        return
    spared: set[int] = set()
    for module in [*head_modules(model).values(), *(m for m in model.modules() if isinstance(m, LowRankAdapter))]:
        spared.update(id(p) for p in module.parameters())
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad and id(parameter) not in spared:
            parameter.data = parameter.data.to(precision.dtype)
    if precision.emulated:
        for module in model.modules():
            if type(module) in (nn.Linear, Conv1D) and module.weight.dtype == precision.dtype:
                module.float()  # the weights were rounded before, so they are still bfloat16 values
                module.register_forward_pre_hook(_cast_up, with_kwargs=True)
                module.register_forward_hook(lambda _module, _args, out: out.to(precision.dtype))
    raise_head(model)


def raise_head(model: nn.Module) -> None:
    """Keep a model's head in float32, whatever the dtype of the base, so that small updates of it are not rounded away."""
    for module in head_modules(model).values():
        module.float()
        module.register_forward_pre_hook(_cast_up, with_kwargs=True)


def _cast_up(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def up(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(up(value) for value in args), {key: up(value) for key, value in kwargs.items()}
