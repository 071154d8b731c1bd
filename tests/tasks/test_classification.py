"""Encoding, batching and scoring of single sentences, pairs and values, on rows written by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from wlora.config.schema import TaskConfig
from wlora.data.features import Features, pad
from wlora.errors import ConfigError
from wlora.tasks.base import build_task
from wlora.tasks.classification import SequenceClassification

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "film", "was", "good", "bad", "very"]
PAD, UNK, CLS, SEP, THE, FILM, WAS, GOOD, BAD, VERY = range(len(WORDS))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words in BERT's format."""
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _task(**fields: Any) -> SequenceClassification:
    known: dict[str, Any] = {
        "name": "sst2",
        "kind": "classification",
        "benchmark": "glue",
        "columns": ["sentence"],
        "labels": ["negative", "positive"],
        "validation": ["validation"],
        "metrics": ["accuracy"],
        "primary_metric": "accuracy",
        "max_length": 128,
    }
    task = build_task(TaskConfig(**(known | fields)))
    assert isinstance(task, SequenceClassification)
    return task


def _predict(task: SequenceClassification, logits: torch.Tensor) -> torch.Tensor:
    model: Any = None
    return task.predict(model, [], {}, SimpleNamespace(logits=logits))


def _score(task: SequenceClassification, split: str, predictions: list[Any], labels: list[Any]) -> dict[str, float]:
    features = Features([pa.table({"labels": labels})])
    logits = [[value] if task.regression else torch.eye(task.num_labels)[value].numpy() for value in predictions]
    return task.score(split, logits, features, rows=Dataset.from_dict({"labels": labels}))


SENTENCES = Dataset.from_dict({"sentence": ["the film was very good", "bad"], "label": [1, 0]})
PAIRS = Dataset.from_dict({"premise": ["very good", "bad"], "hypothesis": ["good", "the film was bad"], "label": [0, 2]})
VALUES = Dataset.from_dict({"sentence1": ["good"], "sentence2": ["very good"], "label": [3.75]})


def test_single_sentences(tokenizer: PreTrainedTokenizerFast) -> None:
    task = _task()
    encoded = task.encode(SENTENCES, tokenizer, training=True)
    assert (task.head, task.num_labels, task.primary_metric) == ("sequence_classification", 2, "accuracy")
    assert encoded.column("input_ids") == [[CLS, THE, FILM, WAS, VERY, GOOD, SEP], [CLS, BAD, SEP]]
    assert encoded.column("length") == [7, 3]
    batch = task.collate(encoded.rows([0, 1]), tokenizer)
    assert batch["input_ids"].tolist()[1] == [CLS, BAD, SEP, PAD, PAD, PAD, PAD]
    assert batch["attention_mask"].sum(dim=1).tolist() == [7, 3]
    assert batch["labels"].dtype == torch.int64 and batch["labels"].tolist() == [1, 0]
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


def test_pairs(tokenizer: PreTrainedTokenizerFast) -> None:
    task = _task(columns=["premise", "hypothesis"], labels=["entailment", "neutral", "contradiction"])
    encoded = task.encode(PAIRS, tokenizer, training=True)
    assert task.num_labels == 3
    assert encoded.column("input_ids")[0] == [CLS, VERY, GOOD, SEP, GOOD, SEP]
    assert encoded.column("token_type_ids")[0] == [0, 0, 0, 0, 1, 1]
    batch = task.collate(encoded.rows([0, 1]), tokenizer)
    assert batch["input_ids"].shape == (2, 8)
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]]


def test_regression(tokenizer: PreTrainedTokenizerFast) -> None:
    task = _task(
        columns=["sentence1", "sentence2"], labels=[], metrics=["pearson", "spearman", "corr"], primary_metric="corr"
    )
    encoded = task.encode(VALUES, tokenizer, training=True)
    batch = task.collate(encoded.rows([0]), tokenizer)
    assert task.num_labels == 1
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [3.75]
    predictions = _predict(task, torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16))
    assert predictions.dtype == torch.float32 and predictions.tolist() == [[0.5], [2.0]]
    found = _score(task, "validation", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert found == pytest.approx({"pearson": 1.0, "spearman": 1.0, "corr": 1.0})


def test_a_batch_is_as_long_as_its_longest_row(tokenizer: PreTrainedTokenizerFast) -> None:
    task = _task()
    encoded = task.encode(SENTENCES, tokenizer, training=True)
    assert task.collate(encoded.rows([1]), tokenizer)["input_ids"].shape == (1, 3)
    assert task.collate(encoded.rows([1, 0]), tokenizer)["input_ids"].shape == (2, 7)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_the_tokenizers_own(tokenizer: PreTrainedTokenizerFast, side: str) -> None:
    encoded = _task().encode(SENTENCES, tokenizer, training=True)
    rows = [{key: row[key] for key in row if key not in ("labels", "length")} for row in encoded.table.to_pylist()]
    expected = tokenizer.pad(rows, padding_side=side, return_tensors="pt")
    found = pad(encoded.rows([0, 1]), tokenizer, side=side)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key])


def test_truncation_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    task = _task(max_length=7)
    assert task.encode(SENTENCES, tokenizer, training=True).truncated_share == 0.0  # the longer row has exactly 7 tokens
    task = _task(max_length=6)
    encoded = task.encode(SENTENCES, tokenizer, training=True)
    assert encoded.truncated_share == 0.5
    assert encoded.column("length") == [6, 3]


def test_many_rows_stay_in_order(tokenizer: PreTrainedTokenizerFast) -> None:
    labels = [row % 2 for row in range(5000)]
    rows = Dataset.from_dict({"sentence": [WORDS[GOOD + label] for label in labels], "label": labels})
    encoded = _task().encode(rows, tokenizer, training=True)
    assert encoded.column("labels") == labels
    assert [ids[1] - GOOD for ids in encoded.column("input_ids")] == labels


def test_classes_are_predicted_by_the_highest_logit() -> None:
    logits = [[0.1, 0.2], [3.0, -1.0]]
    predictions = list(_predict(_task(), torch.tensor(logits)).numpy())
    features = Features([pa.table({"labels": [1, 1]})])
    rows = Dataset.from_dict({"labels": [1, 1]})
    assert _task().score("validation", predictions, features, rows) == {"accuracy": 0.5}
    table = _task().tabulate(predictions, features, rows).to_pydict()
    assert (table["row"], table["label"], table["prediction"]) == ([0, 1], [1, 1], [1, 0])
    assert table["scores"] == [pytest.approx(row, abs=1e-3) for row in logits]


def test_values_are_kept_as_they_are_predicted() -> None:
    task = _task(labels=[], metrics=["pearson"], primary_metric="pearson")
    features = Features([pa.table({"labels": pa.array([2.5, 4.0], pa.float32())})])
    table = task.tabulate([[1.25], [3.0]], features, Dataset.from_dict({"labels": [2.5, 4.0]}))
    assert table.to_pydict() == {"row": [0, 1], "label": [2.5, 4.0], "prediction": [1.25, 3.0]}


def test_further_splits_have_keys_of_their_own() -> None:
    mnli = _task(
        labels=["entailment", "neutral", "contradiction"], validation=["validation_matched", "validation_mismatched"]
    )
    hit, half = [0, 1], [0, 2]
    assert _score(mnli, "validation_matched", hit, hit) == {"accuracy": 1.0}
    assert _score(mnli, "validation_mismatched", half, hit) == {"accuracy_mismatched": 0.5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "clasification"}, "task.kind=clasification"),
        ({"metrics": ["acuracy"]}, "task.metrics=acuracy: allowed is accuracy, f1, .* for 2 classes"),
        ({"metrics": []}, r"task.metrics=\[\]: allowed is accuracy, f1"),
        ({"metrics": ["accuracy", "pearson"]}, "task.metrics=pearson: allowed is accuracy, f1"),
        (
            {"labels": ["a", "b", "c"], "metrics": ["accuracy", "f1"]},
            "task.metrics=f1: allowed is accuracy, macro_f1, weighted_f1, matthews for 3 classes",
        ),
        ({"labels": ["a", "b", "c"], "metrics": ["accuracy_f1"]}, "task.metrics=accuracy_f1: allowed is accuracy, macro_f1"),
        ({"labels": []}, r"task.metrics=accuracy: allowed is pearson, spearman, corr for values \(task.labels=\[\]\)"),
        ({"labels": ["a"]}, r"task.labels=\[a\]: allowed is two or more different names"),
        ({"labels": ["a", "b", "a"]}, r"task.labels=\[a,b,a\]: allowed is two or more different names"),
        ({"primary_metric": "f1"}, "task.primary_metric=f1"),
    ],
)
def test_a_task_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _task(**fields)
