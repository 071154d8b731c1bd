"""Several classes per row: how they are read from every kind of cell, and a run up to the record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.conftest import compose
from tests.support.own_tables import write as write_table
from wlora.data.sources import load_splits
from wlora.models.tiny import build_tokenizer
from wlora.tasks.base import build_task

SETS = [["library"], ["school", "library"], [], ["school"]]


def write(file: Path, cells: list[Any], number: int = 40) -> Path:
    texts = [" ".join(["Anna", *SETS[row % 4]]) for row in range(number)]
    if file.suffix == ".csv":
        file.write_text("text,tags\n" + "".join(f'{text},"{cells[row % 4]}"\n' for row, text in enumerate(texts)))
    else:
        file.write_text("".join(json.dumps({"text": t, "tags": cells[n % 4]}) + "\n" for n, t in enumerate(texts)))
    return file


@pytest.mark.parametrize(
    ("suffix", "cells"),
    [
        ("jsonl", SETS),
        ("csv", ["library", "school|library", "", "school"]),
        ("csv", ["library", "school; library", "", "school"]),
        ("csv", ["library", "library, school", "", "school"]),
        ("csv", ['[""library""]', '[""school"", ""library""]', "[]", '[""school""]']),
    ],
)
def test_sets_are_read_from_lists_and_texts(suffix: str, cells: list[Any], tmp_path: Path) -> None:
    task = compose("task=multi_label", "model=tiny_bert", f"task.path={write(tmp_path / f't.{suffix}', cells)}").task
    assert task.labels == ["library", "school"]
    rows = load_splits(task, offline=True).rows
    found = {text: row for split in rows.values() for text, row in zip(split["text"][:], split["label"][:], strict=True)}
    assert found == {"Anna library": [0], "Anna school library": [0, 1], "Anna": [], "Anna school": [1]}


@pytest.mark.parametrize("words", [("1", "0"), ("1.0", "0.0"), ("True", "FALSE"), (1, 0), (True, False), (1.0, 0.0)])
@pytest.mark.parametrize("given", [[], ["task.label=[library,school]"]])
def test_sets_are_read_from_columns_of_zeros_and_ones(
    words: tuple[Any, Any], given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {name: [words[name not in SETS[n % 4]] for n in range(40)] for name in ("school", "library")}
    texts = [" ".join(["Anna", *SETS[n % 4]]) for n in range(40)]
    file = write_table(
        tmp_path / ("t.csv" if isinstance(words[0], str) else "t.parquet"), {"id": texts, "text": texts, **flags}
    )
    task = compose("task=multi_label", "model=tiny_bert", f"task.path={file}", *given).task
    order = ["library", "school"] if given else ["school", "library"]  # as given, or as in the table
    assert task.labels == task.label == order
    told = capsys.readouterr().out
    assert f"task.label=[{','.join(order)}]; not used: id" in told and "school 20" in told and "library 20" in told
    rows = load_splits(task, offline=True).rows
    found = {t: {order[n] for n in row} for s in rows.values() for t, row in zip(s["text"][:], s["label"][:], strict=True)}
    assert found == {text: set(text.split()[1:]) for text in texts}


def test_a_class_with_a_column_of_its_own_may_be_a_number_or_never_occur(tmp_path: Path) -> None:
    columns = {"text": [f"a {n}" for n in range(8)], "10": [0, 1] * 4, "9": [0] * 8, "8": [1, 1, 0, 0] * 2}
    file = write_table(tmp_path / "t.csv", columns)
    task = compose("task=multi_label", "model=tiny_bert", f"task.path={file}", "task.label=[10,9,8]").task
    assert task.labels == task.label == ["10", "9", "8"]
    rows = load_splits(task, offline=True).rows
    found = {t: row for split in rows.values() for t, row in zip(split["text"][:], split["label"][:], strict=True)}
    assert [found[f"a {n}"] for n in range(4)] == [[2], [0, 2], [], [0]]


def test_targets_are_zeros_and_ones_and_a_class_is_predicted_above_zero(tmp_path: Path) -> None:
    config = compose("task=multi_label", "model=tiny_bert", f"task.path={write(tmp_path / 't.jsonl', SETS)}").task
    task, tokenizer = build_task(config), build_tokenizer()
    rows = Dataset.from_dict({"text": ["Anna", "Ben"], "label": [[0, 1], []]})
    features = task.encode(rows, tokenizer, training=True)
    assert torch.equal(task.collate(features.rows([0, 1]), tokenizer)["labels"], torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    logits = [np.array([2.0, -1.0]), np.array([-3.0, -1.0])]
    assert task.tabulate(logits, features, rows)["prediction"].to_pylist() == [[0], []]
    assert task.answer(logits, features, rows)["prediction"].to_pylist() == ["library", ""]


def test_a_run_learns_sets(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", SETS, number=160)
    words = ["task=multi_label", f"task.path={file}", "task.batch_size=4", "task.epochs=15", "lr=3e-3", "method=full"]
    record = run_tiny(*words)
    assert record.metrics["micro_f1"] == 1.0 and record.classes["names"] == ["library", "school"]
    assert record.classes["f1"] == [1.0, 1.0] and sum(record.classes["support"]) >= 4
