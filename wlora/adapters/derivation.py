"""Parameters that are cut, extended or rescaled from others, and how an optimiser makes its state of the others' state.

The structure of an adapter changes without knowledge of the optimiser, and the optimiser is rebuilt without knowledge of
adapters: what stays valid of the moments travels with the new parameter.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Carry = Callable[[str, Tensor], Tensor]
"""Returns a state of the new parameter, given its name in the optimiser (`exp_avg`, …) and the old parameter's."""

_ATTRIBUTE = "_wlora_origin"


def derive(parent: nn.Parameter, value: Tensor, carry: Carry) -> nn.Parameter:
    """Return a parameter made of another, which trains as the other does."""
    derived = nn.Parameter(value.detach().clone(), parent.requires_grad)
    setattr(derived, _ATTRIBUTE, (parent, carry))
    return derived


def take_origin(parameter: nn.Parameter) -> tuple[nn.Parameter, Carry] | None:
    """Return what a parameter was derived from, and forget it; None for one that was not, or whose origin was taken."""
    origin: tuple[nn.Parameter, Carry] | None = getattr(parameter, _ATTRIBUTE, None)
    if origin is not None:
        delattr(parameter, _ATTRIBUTE)
    return origin
