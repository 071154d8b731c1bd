"""A small task of three classes in local files of every format."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wlora.config.schema import TaskConfig
from wlora.data.sources import load_splits
from wlora.errors import ConfigError

Rows = dict[str, list[Any]]

# What each format finds hard: digits and dates as text, commas, quotes, an apostrophe, and characters beyond ASCII.
ROWS: Rows = {
    "premise": ["007", "2020-01-01", 'He said "no", twice.', "N/A", "naïve – 漢字"],
    "hypothesis": ["1.0", "null", "It's a 5\" disk", "true", "nan"],
    "label": [0, 1, 2, 1, 0],
}


def make_task(folder: Path | None, **fields: Any) -> TaskConfig:
    """Return a small three-way task with a local folder."""
    known: dict[str, Any] = {
        "name": "mnli",
        "kind": "classification",
        "benchmark": "glue",
        "hub_id": "nyu-mll/glue",
        "subset": "mnli",
        "columns": ["premise", "hypothesis"],
        "labels": ["entailment", "neutral", "contradiction"],
        "validation": ["validation_matched"],
        "metrics": ["accuracy"],
        "primary_metric": "accuracy",
        "path": None if folder is None else str(folder),
    }
    return TaskConfig(**(known | fields))


def write(file: Path, rows: Rows) -> None:
    """Write rows in the format of the file's extension."""
    records = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    if file.suffix == ".parquet":
        pq.write_table(pa.table(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(records))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        with file.open("w", newline="", encoding="utf-8") as stream:
            if file.suffix == ".csv":
                writer = csv.writer(stream)
                writer.writerows([list(rows), *zip(*rows.values(), strict=True)])
            else:
                lines = [list(rows), *zip(*rows.values(), strict=True)]
                stream.writelines("\t".join(map(str, line)) + "\n" for line in lines)


def write_both(folder: Path, rows: Rows, extension: str = "jsonl") -> Path:
    """Write the same rows as both splits."""
    for split in ("train", "validation_matched"):
        write(folder / f"{split}.{extension}", rows)
    return folder


def fault_of(task: TaskConfig) -> str:
    """Return the message that loading ends with, after checking its form."""
    with pytest.raises(ConfigError) as caught:
        load_splits(task, offline=True)
    message = str(caught.value)
    assert message.startswith(f"task.path={task.path}")
    assert len(message.splitlines()) <= 2
    return message
