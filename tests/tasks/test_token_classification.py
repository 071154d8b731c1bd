"""Token classification: which piece carries a token's class, what is scored, and a run up to the record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from wlora.config.schema import TaskConfig
from wlora.errors import ConfigError
from wlora.models.tiny import build_tokenizer
from wlora.storage.records import RecordStore
from wlora.tasks.base import build_task

LABELS = ["B-PER", "I-PER", "O"]
ROWS = {"tokens": [["Anna", "left", "the", "garden", "."], ["Ben"]], "label": [[0, 2, 2, 2, 2], [0]]}


def make_task(**fields: Any) -> Any:
    known: dict[str, Any] = {"name": "ner", "kind": "token_classification", "benchmark": "table", "columns": ["tokens"]}
    known |= {"labels": LABELS, "validation": ["validation"], "metrics": ["f1", "accuracy"], "primary_metric": "f1"}
    return build_task(TaskConfig(**(known | fields)))


def test_the_first_piece_of_a_token_carries_its_class() -> None:
    task, tokenizer = make_task(), build_tokenizer()
    rows = {"tokens": [["Anna", "unknownword", "library."]], "label": [[0, 1, 2]]}
    found = task.encode(Dataset.from_dict(rows), tokenizer, training=True)
    pieces = tokenizer.convert_ids_to_tokens(found.column("input_ids")[0])
    first = found.column("first")[0]
    assert [pieces[place] for place in first] == ["anna", "[UNK]", "library"]
    labels = found.column("labels")[0]
    assert [labels[place] for place in first] == [0, 1, 2]
    assert sum(label != -100 for label in labels) == found.column("loss_tokens")[0] == 3


def test_tokens_beyond_the_maximum_length_count_as_outside() -> None:
    task, tokenizer = make_task(max_length=8), build_tokenizer()
    rows = Dataset.from_dict({"tokens": [["Anna"] * 9], "label": [[0] * 9]})
    found = task.encode(rows, tokenizer, training=False)
    assert found.column("first")[0] == [1, 2, 3, 4, 5, 6, -1, -1, -1] and found.truncated_share == 1
    guesses = [np.zeros(8, dtype=np.int32)]
    assert task.tabulate(guesses, found, rows)["prediction"].to_pylist() == [["B-PER"] * 6 + ["O"] * 3]
    assert task.score("validation", guesses, found, rows)["accuracy"] == pytest.approx(6 / 9)


def test_rows_without_labels_are_encoded_and_answered() -> None:
    task, tokenizer = make_task(), build_tokenizer()
    rows = Dataset.from_dict({"tokens": ROWS["tokens"]})
    found = task.encode(rows, tokenizer, training=False)
    assert "labels" not in task.collate(found.rows([0, 1]), tokenizer)
    guesses = [np.array([2, 0, 1, 2, 2, 2, 2]), np.array([2, 1, 2])]
    assert task.answer(guesses, found, rows)["prediction"].to_pylist() == ["B-PER I-PER O O O", "I-PER"]


def test_other_tags_are_scored_by_token() -> None:
    with pytest.raises(ConfigError, match="task.metrics=f1: allowed is accuracy, tag_macro_f1"):
        make_task(labels=["NOUN", "VERB"])
    task = make_task(labels=["NOUN", "VERB"], metrics=["accuracy"], primary_metric="accuracy")
    rows = Dataset.from_dict({"tokens": [["Anna", "left"]], "label": [[0, 1]]})
    found = task.encode(rows, build_tokenizer(), training=False)
    block = task.describe_classes([np.array([0, 0, 0, 0])], found, rows)
    assert block["names"] == ["NOUN", "VERB", "O"] and block["confusion"][1] == [1, 0, 0]


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_deberta", "tiny_llama"])
def test_a_run_finds_persons(model: str, run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    names = ("Anna", "Ben", "Clara", "David")
    rows = [{"tokens": [names[n % 4], "left", "the", "garden", "."], "ner_tags": ["B-PER", *["O"] * 4]} for n in range(40)]
    file = tmp_path / "ner.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["task=token_classification", f"task.path={file}", f"model={model}", "task.batch_size=4", "lr=1e-2"]
    record = run_tiny(*words, "method=wlora", "k=2", "task.epochs=4", "task.eval_batch_size=3")
    assert record.metrics["f1"] == 1.0 and record.metrics["accuracy"] == 1.0
    assert record.classes["names"] == ["PER"] and record.classes["support"] == [4]
    table = RecordStore(tmp_path).read_predictions(record)
    assert table is not None and table["prediction"].to_pylist()[0] == ["B-PER", "O", "O", "O", "O"]
