"""Entry point: `wlora push RUN_ID owner/name`."""

from __future__ import annotations

from collections.abc import Sequence

from wlora.cli.entry import serve
from wlora.experiment.push import push

USAGE = """\
usage: wlora push RUN_ID owner/name [format=peft|merged] [private=true] [results_dir=results] [model.path=DIR] [compact=true]

Exports a run as wlora export does and uploads it to the hub with its model card. The token is that of `hf auth login`, or
HF_TOKEN.

  owner/name      the repository, which is created if it is not there
  private         true: a new repository is private"""


def main(words: Sequence[str] | None = None) -> None:
    """Upload one run and print its address. Exit codes: 0 success, 1 failure, 2 wrong request."""
    serve(lambda given: print(push(given)), USAGE, words)
