"""What a method asks the optimisers for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn


@dataclass
class ParameterGroup:
    """Parameters that are updated alike.

    Attributes:
        parameters: the tensors; those that do not require a gradient are left out.
        lr: peak learning rate.
        rule: `adamw`, or `sgd` without momentum or decay.
        scheduled: whether the run's learning-rate schedule applies.
        start: optimiser steps before the group's schedule begins, with a warm-up of its own.
        clipped: whether the gradients count in, and are scaled by, global-norm clipping.
    """

    parameters: list[nn.Parameter]
    lr: float
    rule: Literal["adamw", "sgd"] = "adamw"
    scheduled: bool = True
    clipped: bool = True
    start: int = 0
