"""Tables of users, in files of every format, and the task that is found in them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import compose
from wlora.config.schema import TaskConfig
from wlora.data.sources import load_splits
from wlora.errors import ConfigError

Columns = dict[str, list[Any]]
KINDS = ("bug", "praise", "question")


def write(file: Path, columns: Columns, delimiter: str | None = None) -> Path:
    """Write columns in the format of the file's extension."""
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    if file.suffix == ".parquet":
        pq.write_table(pa.table(columns), file)
    elif file.suffix in (".json", ".jsonl"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(
                stream, list(columns), delimiter=delimiter or ("\t" if file.suffix.lower() == ".tsv" else ",")
            )
            writer.writeheader()
            writer.writerows(rows)
    return file


def tickets(number: int = 60, **more: list[Any]) -> Columns:
    """Return an unbalanced table with an identifier, a text with commas, quotes and line breaks, and a class."""
    kinds = [KINDS[0 if row % 6 else 1 + row // 6 % 2] for row in range(number)]
    texts = [f'It says: "{kind}",\nagain ({row})' for row, kind in enumerate(kinds)]
    return {"id": [f"T-{row}" for row in range(number)], "text": texts, "category": kinds, **more}


def settle(path: Path | str, *words: str, task: str = "text_classification") -> TaskConfig:
    """Return the task as a run gets it."""
    return compose(f"task={task}", "model=tiny_bert", f"task.path={path}", *words).task  # type: ignore[no-any-return]


def fault_of(*words: str, path: Path, task: str = "text_classification") -> str:
    """Return the message that a request ends with, before training, after checking its form."""
    with pytest.raises(ConfigError) as caught:
        load_splits(settle(path, *words, task=task), offline=True)
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 2 and "task." in message
    return message
