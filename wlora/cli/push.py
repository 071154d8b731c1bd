"""Entry point: `wlora push RUN_ID owner/name`."""

from __future__ import annotations

from collections.abc import Sequence

from wlora.cli.entry import serve
from wlora.experiment.push import push

USAGE = """\
usage: wlora push RUN_ID owner/name [format=peft|merged] [private=true] [results_dir=results] [model.path=DIR] [compact=true]

Exports a run like wlora export and uploads it to the hub with its model card. The token is read from HF_TOKEN, or from the
login of `hf auth login`.

  owner/name      the repository; it is created if it does not exist
  private         true: a new repository is private"""


def main(words: Sequence[str] | None = None) -> None:
    """Upload one run and print its address. Exit codes: 0 success, 1 failure, 2 wrong request."""
    serve(lambda given: print(push(given)), USAGE, words)
