"""The streams that carry what a user reads. Nothing printed can end a run. Imports no torch by itself."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from wlora.distributed import first_time
from wlora.errors import ConfigError, RunFault, as_fault


def protect_output() -> None:
    """Make sure that nothing printed can end a run. Every entry point and every process of a launcher calls this first.

    It covers what libraries print, too: Hydra's help, the progress bar, warnings and tracebacks.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, _Output):
            # A process that was started with the stream closed has none.
            setattr(sys, name, _Output(stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")))


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """End the command where the block fails in a way that users meet: a line or two, and the exit code."""
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
    """A text stream that shows `?` for a character that its encoding lacks, and that ignores a reader who has gone."""

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
            # A closed pipe, a full disk. What is still buffered must go somewhere, or Python complains at exit.
            with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor, or none to be had
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def put(text: str, stream: TextIO | None = None) -> None:
    """Print lines in one piece: those of processes that share a stream, such as a launcher's, do not run into each other."""
    stream = stream or sys.stdout
    stream.write(f"{text}\n")
    stream.flush()


def say(text: str) -> None:
    """Print for the user, on the main process only."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        put(text)


def notice(text: str) -> None:
    """Print a notice for the user, once per command: the runs of a sweep repeat theirs."""
    if first_time(text):
        say(f"notice: {text}")
