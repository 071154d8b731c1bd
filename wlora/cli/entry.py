"""What the commands beside `run` have in common: words, help, and mistakes told in a line or two."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from wlora.console import protect_output, telling
from wlora.errors import ConfigError


def serve(act: Callable[[Sequence[str]], None], usage: str, words: Sequence[str] | None, *, alone: bool = False) -> None:
    """Answer one command; exits with 1 after a fault, and with 2 after a mistake in the request.

    Args:
        act: does what the words ask for; what it may raise is what `telling` tells.
        usage: what `--help` prints.
        words: the words after the command; None for those of the command line.
        alone: whether the command may stand without words.
    """
    protect_output()
    words = list(sys.argv[1:] if words is None else words)
    if {"-h", "--help"} & set(words) or not (words or alone):
        print(usage)
        sys.exit(0 if words else ConfigError.exit_code)
    with telling():
        act(words)
