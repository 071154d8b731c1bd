"""Entry point: `python -m wlora.export RUN_ID format=peft|merged`."""

from __future__ import annotations

from collections.abc import Sequence

from wlora.cli.entry import serve
from wlora.experiment.export import export

USAGE = """\
usage: python -m wlora.export RUN_ID [format=peft|merged] [results_dir=results] [to=DIR] [model.path=DIR]
                              [compact=true] [offline=true]

  format=peft     adapters and tokenizer, for PeftModel.from_pretrained(base, DIR) and adapter.path=DIR
  format=merged   a plain transformers model with tokenizer, for from_pretrained(DIR) and model.path=DIR
  compact         true: every adapter keeps its own rank and alpha; best for starting another run with adapter.path.
                  false: ranks are padded with zeros to the largest and alpha / rank is 1, for tools with one rank only
  to              a new folder; default: <results_dir>/exports/<run_id>-<format>, which is replaced
  model.path      the base model, if it is not where the record says; format=merged needs the weights, format=peft only
                  the tokenizer"""


def main(words: Sequence[str] | None = None) -> None:
    """Export one run and print the folder. Exit codes: 0 success, 1 failure, 2 wrong request."""
    serve(lambda given: print(export(given)), USAGE, words)
