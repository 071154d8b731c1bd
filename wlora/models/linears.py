"""Linear modules of all kinds: torch's, quantised ones, and the transposed `Conv1D` of GPT-2."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module maps [..., d_in] to [..., d_out] with one weight matrix; an adapted one counts as well."""
    # `adapts` marks adapters of this package, and `base_layer` those of PEFT. Therefore PEFT need not be imported here.
    return isinstance(module, nn.Linear | Conv1D) or getattr(module, "adapts", False) or hasattr(module, "base_layer")


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a linear module stores its weight as [d_in, d_out]."""
    return isinstance(module, Conv1D)


def widths(module: nn.Module) -> tuple[int, int]:
    """Return the widths of input and output of a linear module."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def base_weight(module: nn.Module) -> Tensor | None:
    """Return the weight of a linear module as a matrix [d_out, d_in] that shares the module's memory.

    None if it is not a floating-point matrix, as in a quantised module.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        return None
    return weight.T if isinstance(module, Conv1D) else weight
