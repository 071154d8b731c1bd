"""The two kinds of errors that are shown to the user in one or two lines: wrong requests and failed runs.

This module imports no heavy packages, because both errors can be raised before torch is loaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

_SHOWN = 300


class ConfigError(Exception):
    """The request is wrong: an invalid key, value, file or folder. Exit code 2."""

    exit_code = 2


class RunFault(Exception):
    """The request was correct, but the run failed: for example a full disk or a diverged loss. Exit code 1.

    Attributes:
        everywhere: whether all processes of the run fail in the same way, so that a sweep can continue with its next run.
    """

    exit_code = 1
    everywhere = False


class TakenOver(RunFault):
    """Another process has taken over this run, because this process sent no heartbeat. This one must not write any more."""


def wrong_value(key: str, value: object, allowed: str) -> ConfigError:
    """Build the standard error for an invalid value: the key, the value and the allowed values."""
    return ConfigError(f"{key}={shorten(value)}: allowed is {allowed}")


def shorten(value: object) -> str:
    """Return a value as one line of at most 300 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means out of memory: in Python, on a GPU, or in torch on a CPU (a RuntimeError with a text)."""
    words = ("can't allocate memory", "std::bad_alloc")
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return told or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def as_fault(error: Exception) -> RunFault | None:
    """Convert out-of-memory and operating-system errors into a RunFault; return None for any other error (a bug)."""
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
    """Build the standard error for an unknown name. It suggests the most similar known name.

    Args:
        given: the user's input, as shown in the message.
        name: the unknown name.
        names: the known names.
        say: formats the suggested name.
    """
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; did you mean {say(near[0])}?" if near else ""
    return ConfigError(f"{given} is unknown{hint}\nallowed: {', '.join(known)}")
