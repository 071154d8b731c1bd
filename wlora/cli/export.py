"""Entry point: `python -m wlora.export RUN_ID format=peft|merged`."""

from __future__ import annotations

from collections.abc import Sequence

from wlora.cli.entry import serve
from wlora.experiment.export import export

USAGE = """\
usage: python -m wlora.export RUN_ID [format=peft|merged] [results_dir=results] [to=DIR] [model.path=DIR] [offline=true]

  format=peft     adapters and tokenizer, for PeftModel.from_pretrained(base, DIR) and adapter.path=DIR
  format=merged   a plain transformers model with tokenizer, for from_pretrained(DIR) and model.path=DIR
  to              a folder that is not there yet; by default <results_dir>/exports/<run_id>-<format>, which is replaced
  model.path      where the base is now: format=merged needs it, format=peft takes the tokenizer from it"""


def main(words: Sequence[str] | None = None) -> None:
    """Export one run and say where it is; exits with 0, 1 after a fault, or 2 after a mistake in the request."""
    serve(lambda given: print(export(given)), USAGE, words)
