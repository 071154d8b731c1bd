"""Shared entry-point code of all commands except `run`: arguments, help and short error messages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from wlora.console import protect_output, telling
from wlora.errors import ConfigError


def serve(act: Callable[[Sequence[str]], None], usage: str, words: Sequence[str] | None, *, alone: bool = False) -> None:
    """Run one command. The process exits with 1 if it fails (RunFault) and with 2 if the request is wrong (ConfigError).

    Args:
        act: executes the command, given its arguments.
        usage: the text for `--help`.
        words: the arguments of the command; None for those of the command line.
        alone: whether the command may be used without arguments.
    """
    protect_output()
    words = list(sys.argv[1:] if words is None else words)
    if {"-h", "--help"} & set(words) or not (words or alone):
        print(usage)
        sys.exit(0 if words else ConfigError.exit_code)
    with telling():
        act(words)
