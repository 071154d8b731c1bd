"""The command `wlora` with its subcommands. `wlora key=value` without a subcommand means `wlora run key=value`."""

from __future__ import annotations

import importlib
import sys

from wlora import __version__
from wlora.console import protect_output
from wlora.errors import ConfigError, unknown_name

COMMANDS = {
    "run": ("wlora.cli.run", "train one run, or a sweep with -m; from=RUN_ID repeats a recorded run"),
    "tables": ("wlora.cli.tables", "write the paper's tables, tests of its claims, or a summary of a study"),
    "figures": ("wlora.cli.figures", "draw the paper's figures and others for a study"),
    "report": ("wlora.cli.report", "write one interactive HTML page about a study"),
    "export": ("wlora.cli.export", "export the trained adapters of a run for PEFT, or merged into a plain model"),
    "verify-export": ("wlora.cli.verify_export", "compare the logits of an export with those of its run"),
    "push": ("wlora.cli.push", "upload the trained adapters of a run, or the merged model, to the hub"),
    "predict": (
        "wlora.cli.predict",
        "label new rows with a trained run, or write the files that the GLUE server takes",
    ),
    "memory": ("wlora.cli.memory", "measure the memory of a training step by number of adapters (Figure 3)"),
    "sweep": ("wlora.cli.sweep", "list the runs of a sweep, which are done, and the time that the rest takes"),
}


def main() -> None:
    """Call the subcommand named by the first argument with the remaining arguments."""
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
    """Return the overview for `--help`, with one line per subcommand."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: wlora [COMMAND] key=value ...",
            "",
            *lines,
            "",
            "wlora COMMAND --help describes a command; `python -m wlora COMMAND` is equivalent. The default command is run:",
            "  wlora task=rte method=wlora_plus rank=4",
            "  wlora experiment=demo        needs no data, no GPU and no network",
            "wlora --version prints the version.",
        ]
    )
