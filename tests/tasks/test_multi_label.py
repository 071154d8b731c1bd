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
