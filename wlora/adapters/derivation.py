"""Parameters derived from others by pruning, extension or rescaling, and the optimiser state that they inherit.

Adapters change their structure without access to the optimiser, and the optimiser is rebuilt without knowledge of
adapters. Therefore a new parameter stores how to convert the moments of the old one.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Carry = Callable[[str, Tensor], Tensor]
"""Returns optimiser state for the new parameter.

Arguments: its name in the optimiser (`exp_avg`, …), and the old parameter's state.
"""

_ATTRIBUTE = "_wlora_origin"


def derive(parent: nn.Parameter, value: Tensor, carry: Carry) -> nn.Parameter:
    """Return a new parameter that is derived from `parent` and requires a gradient if `parent` does."""
    derived = nn.Parameter(value.detach().clone(), parent.requires_grad)
    setattr(derived, _ATTRIBUTE, (parent, carry))
    return derived


def take_origin(parameter: nn.Parameter) -> tuple[nn.Parameter, Carry] | None:
    """Return the parameter that this one was derived from, and remove that information.

    None if the parameter was not derived, or if its origin was already taken.
    """
    origin: tuple[nn.Parameter, Carry] | None = getattr(parameter, _ATTRIBUTE, None)
    if origin is not None:
        delattr(parameter, _ATTRIBUTE)
    return origin
