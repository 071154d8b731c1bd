"""Texts without a token: they are trained and evaluated like any other, and rows of tags without a piece are left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

from tests.conftest import RunMain, compose
from tests.support.model_folders import build_model_folder
from tests.support.own_tables import write
from wlora.config.schema import TaskConfig
from wlora.errors import ConfigError
from wlora.models.loading import load_model
from wlora.models.source import locate
from wlora.models.tiny import build_tokenizer
from wlora.models.tokenizer import load_tokenizer
from wlora.tasks.base import build_task, fill_empty

UNSEEN = "\u3000"  # white space; other tokenizers drop a zero-width space, too
KINDS: dict[str, dict[str, Any]] = {
    "classification": {"labels": ["a", "b"], "metrics": ["accuracy"]},
    "regression": {"metrics": ["pearson"]},
    "multi_label": {"labels": ["a", "b"], "metrics": ["micro_f1"]},
    "token_classification": {"labels": ["NOUN", "VERB"], "metrics": ["accuracy"]},
}
TOKENS = {"text": [["Anna", "left"], [UNSEEN, ""], ["Ben"], [UNSEEN]], "label": [[0, 1], [0, 1], [0], [1]]}


def make_task(kind: str, **fields: Any) -> Any:
    known: dict[str, Any] = {"name": kind, "kind": kind, "benchmark": "table", "columns": ["text"], "validation": ["v"]}
    known |= KINDS[kind] | fields
    return build_task(TaskConfig(**known, primary_metric=known["metrics"][0]))


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that adds no special token and pads with its end token, as GPT-2's."""
    backend = build_tokenizer().backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, eos_token="[SEP]", pad_token="[SEP]")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_empty_texts_has_a_token_per_row(kind: str) -> None:
    tokenizer = bare_tokenizer()
    texts: list[Any] = [[""], ["Anna"], [""]] if kind == "token_classification" else ["", "Anna", ""]
    task = make_task(kind)
    found = task.encode(Dataset.from_dict({"text": texts}), tokenizer, training=False)
    assert found.lengths == [1, 1, 1] and found.column("input_ids")[0] == [tokenizer.eos_token_id]
    batch = task.collate(found.rows([0, 2]), tokenizer)
    assert batch["attention_mask"].tolist() == [[1], [1]]


def test_summaries_and_documents_have_a_token() -> None:
    task = build_task(compose("task=story_summary", "model=tiny_bart").task)
    document, summary = compose("task=story_summary", "model=tiny_bart").task.columns
    found = task.encode(Dataset.from_dict({document: [""], summary: [""]}), bare_tokenizer(), training=True)
    assert found.lengths == found.loss_weights == [1]


def test_the_loss_of_a_summary_without_a_token_is_zero() -> None:
    config = compose("task=story_summary", "model=tiny_bart")
    task, tokenizer = build_task(config.task), load_tokenizer(config.model, locate(config.model))
    model = load_model(config.model, locate(config.model), tokenizer, head=task.head, num_labels=1, seed=0)
    document, summary = config.task.columns
    rows = Dataset.from_dict({document: ["Anna left.", "Ben."], summary: ["Anna.", "Ben."]})
    batch = task.collate(task.encode(rows, tokenizer, training=True).rows([0, 1]), tokenizer)
    batch["labels"][1] = -100
    losses = task.row_losses(model.eval(), batch)
    assert losses[0] > 0 and losses[1] == 0


def test_a_token_that_is_no_padding_is_preferred() -> None:
    tokenizer = bare_tokenizer()
    tokenizer.bos_token = "[CLS]"
    encoded = BatchEncoding({"input_ids": [[], [7]], "attention_mask": [[], [1]], "token_type_ids": [[], [0]]})
    fill_empty(encoded, tokenizer)
    assert encoded.data == {
        "input_ids": [[tokenizer.bos_token_id], [7]],
        "attention_mask": [[1], [1]],
        "token_type_ids": [[0], [0]],
    }


def test_a_decoder_without_a_start_token_trains_on_empty_texts(tmp_path: Path, run_tiny: Callable[..., Any]) -> None:
    folder = build_model_folder("gpt2", tmp_path / "gpt2")
    bare_tokenizer().save_pretrained(folder)
    texts = [["", "Anna left."][row % 2] for row in range(24)]
    file = write(tmp_path / "t.jsonl", {"text": texts, "label": ["ab"[row % 2] for row in range(24)]})
    words = ["task=text_classification", f"task.path={file}", f"model.path={folder}", "method=lora"]
    record = run_tiny(*words, "task.batch_size=1", "task.eval_batch_size=1", "train.max_steps=8")
    assert record.status == "success" and math.isfinite(record.metrics["loss"])


def test_training_rows_of_tags_without_a_piece_are_left_out() -> None:
    task, tokenizer = make_task("token_classification"), build_tokenizer()
    rows = Dataset.from_dict(TOKENS)
    found = task.encode(rows, tokenizer, training=True)
    assert len(found) == 2 and found.loss_weights == [2, 1]
    whole = task.encode(rows, tokenizer, training=False)
    assert len(whole) == 4 and whole.column("first")[1] == [-1, -1]
    guesses = [np.ones(length, dtype=np.int32) for length in whole.lengths]
    assert task.tabulate(guesses, whole, rows)["prediction"].to_pylist() == [["VERB"] * 2, ["O"] * 2, ["VERB"], ["O"]]
    with pytest.raises(ConfigError, match="task=token_classification: the tokenizer finds no token in any training row"):
        task.encode(rows.select([1, 3]), tokenizer, training=True)


def test_the_loss_of_a_row_of_tags_without_a_piece_is_zero() -> None:
    task, tokenizer = make_task("token_classification"), build_tokenizer()
    config = compose("task=story_nli", "model=tiny_bert").model
    model = load_model(config, locate(config), load_tokenizer(config, locate(config)), head=task.head, num_labels=2, seed=0)
    found = task.encode(Dataset.from_dict(TOKENS), tokenizer, training=False)
    batch = task.collate(found.rows([0, 1]), tokenizer)
    losses = task.row_losses(model.eval(), batch)
    assert losses[1] == 0 and losses.isfinite().all()
    assert torch.allclose(losses[0], model(**batch).loss)
    assert "labels" not in task.collate(found.rows([1, 3]), tokenizer), "the mean over no pieces is not a number"


def test_a_run_tells_of_such_rows_and_scores_them(tmp_path: Path, run_main: RunMain) -> None:
    rows = [{"tokens": ["Anna", "left"], "tags": ["B-PER", "O"]}, {"tokens": [UNSEEN], "tags": ["O"]}] * 8
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["task=token_classification", f"task.path={tmp_path}", "model=tiny_bert", "method=lora", "task.batch_size=1"]
    words += ["train.max_steps=6", "task.eval_batch_size=1", "train.best=loss", f"results_dir={tmp_path / 'r'}"]
    code, printed, error = run_main(*words)
    assert code == 0, error
    assert "notice: 8 of 16 rows of train are left out, because the tokenizer finds no token in them" in printed
    (file,) = (tmp_path / "r" / "records").glob("*.json")
    record = json.loads(file.read_text())
    assert record["task"]["left_out"] == 8 and record["task"]["train_rows"] == 16
    assert record["metrics"]["accuracy"] >= 1 / 3 and math.isfinite(record["metrics"]["loss"])
