"""Communication between the processes of one run, for values on which all processes must agree.

The models of all processes stay equal because gradients are averaged. Every other value that influences a decision is
exchanged with the functions of this module.
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import time
from typing import TYPE_CHECKING, NoReturn, TypeVar

from wlora.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# Texts already printed by this command, so that the runs of a sweep do not repeat notices.
TOLD: set[str] = set()
# Environment variables that a launcher such as torchrun sets for each process.
_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_LAUNCH = (*_PLACE, "MASTER_ADDR", "MASTER_PORT")
# How long a failed process waits for the others to fail in the same way. They may read from slower disks.
PATIENCE_SECONDS = 10.0
_FAILURES = itertools.count()


def require_launch() -> None:
    """Reject an environment with an incomplete or invalid set of launcher variables, such as leftovers in a shell.

    Raises:
        ConfigError: names the variable that is set and the one that is missing or invalid.
    """
    there = [name for name in _PLACE if name in os.environ]
    if not there:
        return
    way_out = f"allowed are all of {', '.join(_LAUNCH)} from a launcher, or none: unset {' '.join(there)}"
    if missing := [name for name in _LAUNCH if name not in os.environ]:
        raise ConfigError(f"{there[0]}={os.environ[there[0]]} is in the environment without {missing[0]}: {way_out}")
    if wrong := [name for name in _PLACE if not os.environ[name].isdecimal()]:
        raise ConfigError(f"{wrong[0]}={os.environ[wrong[0]]} is not a non-negative integer: {way_out}")
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise ConfigError(f"RANK={os.environ['RANK']} is not below WORLD_SIZE={os.environ['WORLD_SIZE']}: {way_out}")


def is_main() -> bool:
    """Tell whether this is the main (or only) process. Does not need torch."""
    return os.environ.get("RANK", "0") == "0"


def several() -> bool:
    """Tell whether a launcher has started more than one process. Does not need torch."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def first_time(text: str) -> bool:
    """Tell whether a text has not been printed by this command before, and remember it."""
    new = text not in TOLD
    TOLD.add(text)
    return new


def from_main(value: T) -> T:
    """Return the main process's value on every process."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0] if PartialState().num_processes > 1 else value  # type: ignore[no-any-return]


def gather(value: T) -> list[T]:
    """Return the values of all processes in rank order, on every process."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    return gather_object([value]) if PartialState().num_processes > 1 else [value]  # type: ignore[no-any-return]


def leave(code: int) -> NoReturn:
    """Exit with `code`, after all runs of this process.

    A process with a process group exits without the shutdown of the interpreter. DTensor's caches keep the group and its
    threads, and such a thread may abort the process during the shutdown.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        if code == 0:  # after a failure, the other processes may not be ready for it
            torch.distributed.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def all_failed() -> bool:
    """Tell whether all processes of the run have failed at this point, so that they can continue together with the next run.

    This process waits up to `PATIENCE_SECONDS` for the others. Failures are counted in the key-value store of the process
    group. A collective operation would not work, because another process may be in the middle of one.
    """
    from accelerate import PartialState
    from torch.distributed.distributed_c10d import _get_default_store

    key, deadline = f"wlora/failures/{next(_FAILURES)}", time.monotonic() + PATIENCE_SECONDS
    try:
        PartialState()  # waits until all processes have joined the process group
        store = _get_default_store()
        count = store.add(key, 1)
        while count < int(os.environ["WORLD_SIZE"]) and time.monotonic() < deadline:
            time.sleep(0.1)
            count = store.add(key, 0)
    except (RuntimeError, ValueError):  # the process that hosts the store has ended
        return False
    return count >= int(os.environ["WORLD_SIZE"])


def lost_another(error: BaseException) -> bool:
    """Tell whether an error was caused by the end of another process of the run."""
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
    """Return the mean of a tensor over all processes. The result is bitwise identical on every process; shape unchanged."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    value = value.detach().clone()
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()
