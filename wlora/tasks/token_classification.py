"""Token classification: one tag per token, such as named entities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wlora.config.schema import TaskConfig
from wlora.data.features import ROWS_AT_ONCE, Features, find_truncated, input_columns, pad, stack
from wlora.data.row_checks import LABEL
from wlora.errors import ConfigError, wrong_value
from wlora.metrics.classes import score_classes
from wlora.metrics.entities import ENTITY_METRICS, TAG_METRICS, mark_entities, score_entity_types, score_tags
from wlora.tasks.base import check_metrics, fill_empty

IGNORED = -100
"""The label of pieces that are not the first of a token; the cross-entropy of torch ignores it."""
LOST = "O"
"""The tag of a token that `task.max_length` cuts off."""


class TokenClassification:
    """Maps every token of a row (`task.columns`, one column of lists) to a class of `task.labels`.

    A token may consist of several pieces of the model's vocabulary. The first piece carries the class, as in the usual
    protocol of named-entity recognition. Tokens beyond `task.max_length` count as `O`.

    Attributes:
        head: the kind of model head.
        num_labels: number of classes.
        primary_metric: the reported metric, one of `task.metrics`.

    Raises:
        ConfigError: there are fewer than two classes, or a metric is not defined for them.
    """

    head = "token_classification"
    any_padding = True

    def __init__(self, config: TaskConfig) -> None:
        if len(config.labels) < 2 or len(set(config.labels)) < len(config.labels):
            raise wrong_value("task.labels", f"[{','.join(config.labels)}]", "two or more different tags")
        if len(config.columns) != 1:
            raise wrong_value("task.columns", f"[{','.join(config.columns)}]", "one column of tokens")
        self.entities = mark_entities(config.labels)
        known = (*ENTITY_METRICS, "tag_macro_f1") if self.entities else TAG_METRICS
        check_metrics(config, known, "tags such as B-PER and O" if self.entities else "tags other than B-PER, I-PER, O")
        self.config = config
        self.num_labels = len(config.labels)
        self.primary_metric = config.primary_metric

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, training: bool) -> Features:
        """Tokenise rows, joined by spaces, truncated to `task.max_length` pieces and not padded.

        Some tokens have no piece (an empty text, a zero-width space). Training rows of such tokens only are left out.

        Returns:
            Columns `input_ids`, `attention_mask` and, if the tokenizer provides them, `token_type_ids`; `length` (pieces,
                int32); `first` (index of every token's first piece, −1 if it is cut off; lists of int32); and, if the rows
                have labels, `labels` (a list with a class or −100 per piece) and `loss_tokens` (pieces with a class).

        Raises:
            ConfigError: the tokenizer does not provide the character positions of its pieces, or all training rows are left
                out.
        """
        if not tokenizer.is_fast:
            raise ConfigError(
                f"task={self.config.name}: {type(tokenizer).__name__} does not give the positions of tokens in the text\n"
                "allowed is a model whose tokenizer has a fast version (tokenizer.json)"
            )
        pieces, truncated = [], 0
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = rows[start : start + ROWS_AT_ONCE]
            tokens = batch[self.config.columns[0]]
            encoded = tokenizer([" ".join(row) for row in tokens], truncation=True, max_length=self.config.max_length)
            truncated += sum(find_truncated(encoded, self.config.max_length))
            assert encoded.encodings is not None
            first = [_first_pieces(encoding, row) for encoding, row in zip(encoded.encodings, tokens, strict=True)]
            fill_empty(encoded, tokenizer)
            columns = {**input_columns(encoded), "first": pa.array(first, pa.list_(pa.int32()))}
            if LABEL in batch:
                columns |= _label_columns(first, batch[LABEL], columns["length"].to_pylist())
            table = pa.table(columns)
            pieces.append(table.filter(pc.greater(table["loss_tokens"], 0)) if training else table)
        if not any(piece.num_rows for piece in pieces):
            raise ConfigError(f"task={self.config.name}: the tokenizer finds no token in any training row")
        return Features(pieces, truncated_share=truncated / len(rows))

    def collate(self, features: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        """Pad features to the longest one, on the right. Labels have shape [rows, pieces], int64.

        If no piece of the batch has a class, the labels are omitted, because the mean loss over no pieces is not a number.
        """
        batch = pad(features, tokenizer, side="right")
        if any(feature.get("loss_tokens") for feature in features):
            batch["labels"] = stack([feature["labels"] for feature in features], IGNORED, "right")
        return batch

    def row_losses(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean cross-entropy over the labelled pieces of each row, [rows]."""
        labels = inputs["labels"]
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
        return losses.view(labels.shape).sum(1) / (labels != IGNORED).sum(1).clamp(min=1)

    def predict(
        self, model: PreTrainedModel, features: list[dict[str, Any]], inputs: dict[str, torch.Tensor], outputs: Any
    ) -> torch.Tensor:
        """Return the class of every piece, int32 [rows, pieces]."""
        classes: torch.Tensor = outputs.logits.argmax(dim=2).int()
        return classes

    def score(self, split: str, predictions: Sequence[Any], features: Features, rows: Dataset) -> dict[str, float]:
        """Return `task.metrics` of a split. Keys of all splits except the first end with the split's name."""
        found = score_tags(self.config.metrics, self._references(rows), self._decide(predictions, features))
        suffix = "" if split == self.config.validation[0] else "_" + split.removeprefix("validation_")
        return {f"{name}{suffix}": value for name, value in found.items()}

    def tabulate(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> pa.Table:
        """Return `row`, `label` and `prediction`: lists with the tag of every token."""
        kind = pa.list_(pa.string())
        return pa.table(
            {
                "row": pa.array(range(len(rows)), pa.int32()),
                "label": pa.array(self._references(rows), kind),
                "prediction": pa.array(self._decide(predictions, features), kind),
            }
        )

    def describe_classes(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> dict[str, Any]:
        """Return the scores of every entity type or, for other tags, of every tag with the confusion matrix."""
        references, decided = self._references(rows), self._decide(predictions, features)
        if self.entities:
            return score_entity_types(references, decided)
        names = [*self.config.labels, *([] if LOST in self.config.labels else [LOST])]
        index = {name: number for number, name in enumerate(names)}
        true, found = (np.array([index[tag] for row in tags for tag in row]) for tags in (references, decided))
        return score_classes(true, found, names)

    def answer(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> pa.Table:
        """Return `prediction`: the tags of each row, separated by spaces."""
        return pa.table({"prediction": [" ".join(tags) for tags in self._decide(predictions, features)]})

    def _references(self, rows: Dataset) -> list[list[str]]:
        return [[self.config.labels[number] for number in row] for row in rows[LABEL][:]]

    def _decide(self, predictions: Sequence[Any], features: Features) -> list[list[str]]:
        """Return the tag of every token of every row."""
        names = self.config.labels
        return [
            [names[pieces[place]] if place >= 0 else LOST for place in first]
            for pieces, first in zip(predictions, features.column("first"), strict=True)
        ]


def _first_pieces(encoding: Any, tokens: Sequence[str]) -> list[int]:
    """Return the index of the first piece of every token; −1 if it was cut off or has none."""
    found, begin = [], 0
    for token in tokens:
        places = (encoding.char_to_token(place) for place in range(begin, begin + len(token)))
        found.append(next((place for place in places if place is not None), -1))
        begin += len(token) + 1
    return found


def _label_columns(
    first: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], lengths: Sequence[int]
) -> dict[str, pa.Array]:
    """Return the class of every piece, and how many pieces have one.

    Two tokens may share a piece (punctuation in some vocabularies); the first of them gives its class.
    """
    rows = [[IGNORED] * length for length in lengths]
    for row, places, classes in zip(rows, first, labels, strict=True):
        for place, number in zip(reversed(places), reversed(classes), strict=True):
            if place >= 0:
                row[place] = number
    counts = [sum(number != IGNORED for number in row) for row in rows]
    return {"labels": pa.array(rows, pa.list_(pa.int32())), "loss_tokens": pa.array(counts, pa.int32())}
