"""The two kinds of failure a user meets, each told in one or two lines.

Nothing here imports a heavy package: both are raised before torch is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

_SHOWN = 300


class ConfigError(Exception):
    """The request cannot be run as it stands: a wrong key, value, file or folder. Exit code 2."""

    exit_code = 2


class RunFault(Exception):
    """The request was fine and the run failed underway: a full disk, a diverged loss. Exit code 1.

    Attributes:
        everywhere: whether all processes of the run fail alike, and may go on to the next together.
    """

    exit_code = 1
    everywhere = False


class TakenOver(RunFault):
    """Another process runs the run now, since this one gave no sign of life: nothing of it may be written any more."""


def wrong_value(key: str, value: object, allowed: str) -> ConfigError:
    """Build the standard message for a bad value: the key, the value and what is allowed."""
    return ConfigError(f"{key}={shorten(value)}: allowed is {allowed}")


def shorten(value: object) -> str:
    """Return a value as one line of bounded length."""
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory is exhausted: Python's, a GPU's, or the CPU's, of which torch has no class."""
    words = ("can't allocate memory", "std::bad_alloc")
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return told or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def as_fault(error: Exception) -> RunFault | None:
    """Return what the file system or the memory has refused as a failure that is told in a line; None for a bug."""
    if ran_out_of_memory(error):
        return RunFault(f"out of memory ({shorten(error)})" if str(error) else "out of memory")
    if not isinstance(error, OSError):
        return None
    if error.filename is None:
        return RunFault(f"{type(error).__name__}: {shorten(error)}")
    return RunFault(f"{shorten(error.filename)}: {error.strerror}")


def unknown_name(
    given: str, name: str, names: Iterable[str], *, say: Callable[[str], str] = lambda near: near
) -> ConfigError:
    """Build the standard message for an unknown name, with the nearest known one.

    Args:
        given: what the user wrote, as it is shown.
        name: the unknown name.
        names: the known ones.
        say: how the nearest name is shown.
    """
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; did you mean {say(near[0])}?" if near else ""
    return ConfigError(f"{given} is unknown{hint}\nallowed: {', '.join(known)}")
