"""The command `wlora`: one name for all entry points. `wlora key=value` without a subcommand runs."""

from __future__ import annotations

import importlib
import sys

from wlora import __version__
from wlora.console import protect_output
from wlora.errors import ConfigError, unknown_name

COMMANDS = {
    "run": ("wlora.cli.run", "one run, or with -m a sweep; from=RUN_ID repeats a recorded run"),
    "tables": ("wlora.cli.tables", "the paper's tables, or a summary, of a study as CSV, LaTeX and Markdown"),
    "figures": ("wlora.cli.figures", "the paper's figures, and others, of a study"),
    "report": ("wlora.cli.report", "one HTML page of a study"),
    "export": ("wlora.cli.export", "the trained adapters of a run for PEFT, or merged into a plain model"),
    "memory": ("wlora.cli.memory", "memory of a training step by the number of adapters (Figure 3)"),
    "sweep": ("wlora.cli.sweep", "what a sweep holds, what of it is done, and how long the rest takes"),
}


def main() -> None:
    """Hand the words of the command line on to the subcommand that they name."""
    words = sys.argv[1:]
    first = words[0] if words else ""
    if first in COMMANDS:
        module, _ = COMMANDS[first]
        sys.argv = [f"{sys.argv[0]} {first}", *words[1:]]
        importlib.import_module(module).main()
    elif first == "--version":
        print(f"wlora {__version__}")
    elif words and first not in ("-h", "--help") and ("=" in first or first.startswith(("-", "+", "~"))):
        importlib.import_module("wlora.cli.run").main()
    else:
        protect_output()
        if first and first not in ("-h", "--help"):
            print(f"error: {unknown_name(first, first, COMMANDS)}", file=sys.stderr)
            sys.exit(ConfigError.exit_code)
        print(describe())
        sys.exit(0 if words else ConfigError.exit_code)


def describe() -> str:
    """Return the overview: a line per subcommand."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: wlora [COMMAND] key=value ...",
            "",
            *lines,
            "",
            "wlora COMMAND --help says more; `python -m wlora.COMMAND` is the same. Without COMMAND it is run:",
            "  wlora task=rte method=wlora_plus rank=4",
            "  wlora experiment=demo        needs no data, no GPU and no network",
            "wlora --version prints the version.",
        ]
    )
