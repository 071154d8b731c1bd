"""The processes of one run: what all of them must agree on.

Their models stay equal because gradients are averaged; whatever else decides something passes through here.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from typing import TYPE_CHECKING, TypeVar

from wlora.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# What this process's command has told: the runs of a sweep repeat their notices.
TOLD: set[str] = set()
# What a launcher such as torchrun sets for each process that it starts.
_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_LAUNCH = (*_PLACE, "MASTER_ADDR", "MASTER_PORT")
# How long a failure waits for the same one of the other processes: they may read from slower disks.
PATIENCE_SECONDS = 10.0
_FAILURES = itertools.count()


def require_launch() -> None:
    """Refuse an environment with a part of what launchers set, which a shell may have kept from elsewhere.

    Raises:
        ConfigError: which variable is there, and which is not or is no number.
    """
    there = [name for name in _PLACE if name in os.environ]
    if not there:
        return
    way_out = f"allowed are all of {', '.join(_LAUNCH)} from a launcher, or none: unset {' '.join(there)}"
    if missing := [name for name in _LAUNCH if name not in os.environ]:
        raise ConfigError(f"{there[0]}={os.environ[there[0]]} is in the environment without {missing[0]}: {way_out}")
    if wrong := [name for name in _PLACE if not os.environ[name].isdecimal()]:
        raise ConfigError(f"{wrong[0]}={os.environ[wrong[0]]} is no number of a process: {way_out}")
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise ConfigError(f"RANK={os.environ['RANK']} is not below WORLD_SIZE={os.environ['WORLD_SIZE']}: {way_out}")


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


def all_failed() -> bool:
    """Tell whether every process of the run has failed where this one has; they may then go on to the next run together.

    The others are waited for for `PATIENCE_SECONDS`. They do not meet in a collective operation, which one of them may be in
    the middle of, but count in the store of the process group.
    """
    from accelerate import PartialState
    from torch.distributed.distributed_c10d import _get_default_store

    key, deadline = f"wlora/failures/{next(_FAILURES)}", time.monotonic() + PATIENCE_SECONDS
    try:
        PartialState()  # which waits until all processes have got as far as this
        store = _get_default_store()
        count = store.add(key, 1)
        while count < int(os.environ["WORLD_SIZE"]) and time.monotonic() < deadline:
            time.sleep(0.1)
            count = store.add(key, 0)
    except (RuntimeError, ValueError):  # the process that holds the store has gone
        return False
    return count >= int(os.environ["WORLD_SIZE"])


def lost_another(error: BaseException) -> bool:
    """Tell whether an error only says that another process of the run has ended."""
    torch = sys.modules.get("torch")
    if torch is None or not several() or not torch.distributed.is_available():
        return False
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError)
        and "gloo" in text
        and any(sign in text for sign in ("onnection", "imed out", "peer", "roken pipe"))
    )


def mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes: the same bits everywhere, unlike what each has computed."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    value = value.detach().clone()
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()
