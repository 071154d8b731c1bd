"""What all kinds of tasks share in making features: compact columns, rows of them, and padding these to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

# Small integers: the tokens of the whole training set stay in memory.
INPUT_TYPES = {"input_ids": pa.int32(), "token_type_ids": pa.int8(), "attention_mask": pa.int8()}
ROWS_AT_ONCE = 2048
"""Rows to tokenise in one call: enough for all cores, without a second copy of everything in Python objects."""


class Features:
    """Rows as the model reads them, in memory by column: numbers, or lists of numbers.

    A GPU waits for every batch that is read: rows are views of whole columns, where a `Dataset` decodes them anew each time,
    which takes longer than a layer of the model.

    Args:
        pieces: tables with the same columns, one below the other; `length` (tokens) is among them.
        truncated_share: share of the rows of which something was cut off.
        lost_answers: training rows whose answer stands whole in no window; 0 for tasks without answers in texts.
    """

    def __init__(self, pieces: Sequence[pa.Table], *, truncated_share: float = 0.0, lost_answers: int = 0) -> None:
        self.table = pa.concat_tables(pieces).combine_chunks()
        self.truncated_share, self.lost_answers = truncated_share, lost_answers

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def array(self, name: str) -> pa.Array:
        """Return a column in one piece."""
        return self.table[name].combine_chunks()

    def column(self, name: str) -> list[Any]:
        """Return a column as Python objects."""
        return self.array(name).to_pylist()  # type: ignore[no-any-return]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        return self.column("length")

    @cached_property
    def loss_weights(self) -> list[int]:
        """What each row counts in a mean over batches, so that it is the same however they are cut.

        The loss of a text is a mean over its tokens (column `loss_tokens`); any other counts once per row.
        """
        return self.column("loss_tokens") if "loss_tokens" in self.table.column_names else [1] * len(self)

    def rows(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return rows by index: numbers, and lists as numpy arrays, which are views that must not be written to."""
        found: list[dict[str, Any]] = [{} for _ in indices]
        for name, (values, ends) in self._columns.items():
            for row, index in zip(found, indices, strict=True):
                row[name] = values[index] if ends is None else values[ends[index] : ends[index + 1]]
        return found

    @cached_property
    def _columns(self) -> dict[str, tuple[Any, list[int] | None]]:
        """By name, numbers and None, or the numbers of all lists and where each of these ends, from 0 on."""
        columns: dict[str, tuple[Any, list[int] | None]] = {}
        for name in self.table.column_names:
            column = self.array(name)
            if pa.types.is_list(column.type):
                columns[name] = column.values.to_numpy(), column.offsets.to_pylist()
            else:
                columns[name] = column.to_pylist(), None
        return columns


def input_columns(encoded: Mapping[str, Any]) -> dict[str, pa.Array]:
    """Return the model's inputs that a tokenizer gave, as lists of small integers, and `length` (tokens, int32)."""
    columns = {key: pa.array(encoded[key], pa.list_(kind)) for key, kind in INPUT_TYPES.items() if key in encoded}
    return {**columns, "length": columns["input_ids"].value_lengths()}


def find_truncated(encoded: BatchEncoding, max_length: int | None) -> list[bool]:
    """Tell which rows were cut; a tokenizer written in Python does not say, so full rows count as cut there."""
    if encoded.encodings is not None:
        return [bool(row.overflowing) for row in encoded.encodings]
    return [len(ids) == max_length for ids in encoded["input_ids"]]


def pad(
    features: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, side: str | None = None
) -> dict[str, torch.Tensor]:
    """Return the model's inputs of a batch, padded to the longest, each of shape [features, tokens], int64.

    As `tokenizer.pad` does, which takes some thirty times as long.

    Args:
        side: `right` where positions matter; None for the tokenizer's own.
    """
    fillers = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "attention_mask": 0}
    names = [name for name in INPUT_TYPES if name in features[0]]
    return {name: stack([row[name] for row in features], fillers[name], side or tokenizer.padding_side) for name in names}


def stack(rows: Sequence[Sequence[int]], filler: int, side: str) -> torch.Tensor:
    """Return lists of numbers as one int64 tensor, filled up at a side: shape [rows, longest]."""
    block = np.full((len(rows), max(map(len, rows))), filler, dtype=np.int64)
    for line, row in zip(block, rows, strict=True):
        line[len(line) - len(row) if side == "left" else 0 :][: len(row)] = row
    return torch.from_numpy(block)
