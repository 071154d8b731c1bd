"""Groups of parameters that a method gives to the optimisers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass
class ParameterGroup:
    """Parameters with the same update rule and learning rate.

    Attributes:
        parameters: the tensors; those that do not require a gradient are ignored.
        lr: peak learning rate.
        rule: `adamw`, or `sgd` without momentum and weight decay.
        scheduled: whether the run's learning-rate schedule applies.
        start: completed optimiser steps when the group's own schedule begins, including its own warm-up.
        clipped: whether global-norm clipping includes these gradients.
    """

    parameters: list[nn.Parameter]
    lr: float
    rule: Literal["adamw", "sgd"] = "adamw"
    scheduled: bool = True
    clipped: bool = True
    start: int = 0
