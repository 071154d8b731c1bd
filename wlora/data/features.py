"""Encoded features shared by all kinds of tasks: compact storage by column, access by row, and padding to batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

# Small integer types, because the tokens of the whole training set are kept in memory.
INPUT_TYPES = {"input_ids": pa.int32(), "token_type_ids": pa.int8(), "attention_mask": pa.int8()}
ROWS_AT_ONCE = 2048
"""Rows tokenised per call: enough to use all cores, without converting the whole data set to Python objects at once."""


class Features:
    """Encoded rows in memory, stored by column. Values are numbers or lists of numbers.

    The GPU waits while a batch is read. Rows are therefore views of whole columns. A `Dataset` would decode them on each
    access, which takes longer than one layer of the model.

    Args:
        pieces: tables with equal columns, to be concatenated; `length` (tokens) is one of the columns.
        truncated_share: share of the rows that were truncated.
        lost_answers: training rows whose answer lies completely in no window; 0 for tasks without answer spans.
    """

    def __init__(self, pieces: Sequence[pa.Table], *, truncated_share: float = 0.0, lost_answers: int = 0) -> None:
        self.table = pa.concat_tables(pieces).combine_chunks()
        self.truncated_share, self.lost_answers = truncated_share, lost_answers

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def array(self, name: str) -> pa.Array:
        """Return a column as one contiguous array of length [rows]."""
        return self.table[name].combine_chunks()

    def column(self, name: str) -> list[Any]:
        """Return a column as Python objects."""
        return self.array(name).to_pylist()  # type: ignore[no-any-return]

    @cached_property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return self.column("length")

    @cached_property
    def loss_weights(self) -> list[int]:
        """Weight of each row in a mean loss over batches, so that the mean does not depend on the split into batches.

        For text targets the loss is a mean over tokens, so the weight is the column `loss_tokens`; otherwise it is 1.
        """
        return self.column("loss_tokens") if "loss_tokens" in self.table.column_names else [1] * len(self)

    @property
    def single_labels(self) -> list[Any] | None:
        """The class or value of each row; None for spans, texts and sets, by which samples are not stratified."""
        if "labels" not in self.table.column_names or pa.types.is_list(self.table.schema.field("labels").type):
            return None
        return self.column("labels")

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return rows by index. Lists are numpy arrays; they are views and must not be modified."""
        found: list[dict[str, Any]] = [{} for _ in indices]
        for name, (values, ends) in self._columns.items():
            for row, index in zip(found, indices, strict=True):
                row[name] = values[index] if ends is None else values[ends[index] : ends[index + 1]]
        return found

    @cached_property
    def _columns(self) -> dict[str, tuple[Any, list[int] | None]]:
        """By column name: (values, None) for numbers, or (concatenated values, offsets [rows + 1]) for lists."""
        columns: dict[str, tuple[Any, list[int] | None]] = {}
        for name in self.table.column_names:
            column = self.array(name)
            if pa.types.is_list(column.type):
                columns[name] = column.values.to_numpy(), column.offsets.to_pylist()
            else:
                columns[name] = column.to_pylist(), None
        return columns


def input_columns(encoded: Mapping[str, Any]) -> dict[str, pa.Array]:
    """Return a tokenizer's output as columns of lists of small integers, and `length` (number of tokens, int32)."""
    columns = {key: pa.array(encoded[key], pa.list_(kind)) for key, kind in INPUT_TYPES.items() if key in encoded}
    return {**columns, "length": columns["input_ids"].value_lengths()}


def find_truncated(encoded: BatchEncoding, max_length: int | None) -> list[bool]:
    """Tell which rows were truncated. A tokenizer in Python does not report this, so rows of maximum length count."""
    if encoded.encodings is not None:
        return [bool(row.overflowing) for row in encoded.encodings]
    return [len(ids) == max_length for ids in encoded["input_ids"]]


def pad(
    features: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, side: str | None = None
) -> dict[str, torch.Tensor]:
    """Return the model's inputs of a batch, padded to the longest row; each has shape [features, tokens], int64.

    The result equals that of `tokenizer.pad`, which takes about thirty times as long.

    Args:
        side: `right` if token positions matter; None for the padding side of the tokenizer.
    """
    fillers = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "attention_mask": 0}
    names = [name for name in INPUT_TYPES if name in features[0]]
    return {name: stack([row[name] for row in features], fillers[name], side or tokenizer.padding_side) for name in names}


def stack(rows: Sequence[Sequence[int]], filler: int, side: str) -> torch.Tensor:
    """Return lists of numbers as one int64 tensor of shape [rows, longest], padded with `filler` on the given side."""
    block = np.full((len(rows), max(map(len, rows))), filler, dtype=np.int64)
    for line, row in zip(block, rows, strict=True):
        line[len(line) - len(row) if side == "left" else 0 :][: len(row)] = row
    return torch.from_numpy(block)
