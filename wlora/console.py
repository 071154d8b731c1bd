"""Output for the user. An output error never ends a run. This module does not import torch."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from wlora.distributed import first_time, is_main
from wlora.errors import ConfigError, RunFault, as_fault


def protect_output() -> None:
    """Replace stdout and stderr by streams that ignore output errors.

    Every entry point and every launcher process calls this function first. The replaced streams also protect the output of
    libraries: Hydra's help, progress bars, warnings and tracebacks.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Output):
            # If a process was started with a closed stream, the stream is None.
            setattr(sys, name, _Output(stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")))
    # Its import, by PEFT, reports that a package for faster 4-bit products on CPUs is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Context manager: print expected errors of the block in one or two lines and exit with their exit code.

    Expected errors are ConfigError, RunFault, and errors of memory or the file system (`as_fault`). Others are re-raised.
    """
    told: ConfigError | RunFault | None
    try:
        yield
        return
    except (ConfigError, RunFault) as error:
        told = error
    except Exception as error:
        told = as_fault(error)
        if told is None:
            raise
    print(f"error: {told}", file=sys.stderr)
    sys.exit(told.exit_code)


class _Output:
    """A text stream that replaces unencodable characters by `?` and ignores errors such as a closed pipe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: Any = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, act: Callable[..., object], *values: str) -> None:
        try:
            act(*values)
        except (OSError, ValueError):
            # A closed pipe or a full disk. Redirect to /dev/null, or Python reports an error when it flushes at exit.
            with contextlib.suppress(OSError, ValueError):  # the stream has no descriptor, or no descriptor is free
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def put(text: str, stream: TextIO | None = None) -> None:
    """Print text and newline in a single write, so that lines of several processes on one stream are not mixed."""
    stream = stream or sys.stdout
    stream.write(f"{text}\n")
    stream.flush()


def tell(text: str) -> None:
    """Print text for the user once per command, on the main process only. Unlike `say` it does not import torch."""
    if is_main() and first_time(text):
        put(text)


def say(text: str) -> None:
    """Print text for the user, on the main process only."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        put(text)


def notice(text: str) -> None:
    """Print a notice for the user once per command, even if several runs of a sweep emit it."""
    if first_time(text):
        say(f"notice: {text}")
