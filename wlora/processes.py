"""The processes of one run: what all of them must agree on.

Their models stay equal because gradients are averaged; whatever else decides something passes through here.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# What this process's command has told: the runs of a sweep repeat their notices.
TOLD: set[str] = set()


def is_main() -> bool:
    """Tell whether this is the main process, or the only one; before torch is imported, too."""
    return os.environ.get("RANK", "0") == "0"


def several() -> bool:
    """Tell whether a launcher has started more than one process; before torch is imported, too."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def first_time(text: str) -> bool:
    """Tell whether this process's command has not told a text yet, and note it."""
    new = text not in TOLD
    TOLD.add(text)
    return new


def from_main(value: T) -> T:
    """Return the main process's value on every process."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if PartialState().num_processes > 1 else value  # type: ignore[no-any-return]


def gather(value: T) -> list[T]:
    """Return the values of all processes, the main one's first, on every process."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    return gather_object([value]) if PartialState().num_processes > 1 else [value]  # type: ignore[no-any-return]


def mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes: the same bits everywhere, unlike what each has computed."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    value = value.detach().clone()
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()
