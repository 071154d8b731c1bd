"""Entry point: `python -m wlora.predict RUN_ID FILE to=OUT.csv`."""

from __future__ import annotations

from collections.abc import Sequence

from wlora.cli.entry import serve

USAGE = """\
usage: python -m wlora.predict RUN_ID FILE to=OUT.csv [results_dir=results] [model.path=DIR] [offline=true]
       python -m wlora.predict RUN_ID split=NAME to=OUT.csv [task.path=DIR] ...
       python -m wlora.predict RUN_ID split=test [to=DIR] ...               a run of a GLUE task

  FILE         new rows with the text columns of the run's table (csv, tsv, json, jsonl or parquet); labels are not needed
  to           the rows with the columns prediction and, for classes, probability; the type follows the name
  split        rows of the run's own data set; for GLUE, split=test writes the files of the benchmark's server, such as
               CoLA.tsv or MNLI-m.tsv, MNLI-mm.tsv and AX.tsv, into a folder (default: <results_dir>/glue)
  task.path    the data set, if it is not where the record says
  model.path   the base model, if it is not where the record says"""


def main(words: Sequence[str] | None = None) -> None:
    """Predict rows and print the written files. Exit codes: 0 success, 1 failure, 2 wrong request."""
    serve(_act, USAGE, words)


def _act(words: Sequence[str]) -> None:
    from wlora.experiment.predict import predict

    for file in predict(words):
        print(file)
