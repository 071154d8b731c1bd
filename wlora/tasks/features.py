"""What all kinds of tasks share in making features: compact columns, and padding them to a batch."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

# Small integers: the tokens of the whole training set stay in memory.
INPUT_TYPES = {"input_ids": pa.int32(), "token_type_ids": pa.int8(), "attention_mask": pa.int8()}
ROWS_AT_ONCE = 2048
"""Rows to tokenise in one call: enough for all cores, without a second copy of everything in Python objects."""


def input_columns(encoded: Mapping[str, Any]) -> dict[str, pa.Array]:
    """Return the model's inputs that a tokenizer gave, as lists of small integers, and `length` (tokens, int32)."""
    columns = {key: pa.array(encoded[key], pa.list_(kind)) for key, kind in INPUT_TYPES.items() if key in encoded}
    return {**columns, "length": columns["input_ids"].value_lengths()}


def find_truncated(encoded: BatchEncoding, max_length: int | None) -> list[bool]:
    """Tell which rows were cut; a tokenizer written in Python does not say, so full rows count as cut there."""
    if encoded.encodings is not None:
        return [bool(row.overflowing) for row in encoded.encodings]
    return [len(ids) == max_length for ids in encoded["input_ids"]]


def loss_weights(features: Dataset) -> list[int]:
    """Return what each feature counts in a mean over batches, so that it is the same however they are cut.

    The loss of a text is a mean over its tokens (column `loss_tokens`); any other counts once per feature.
    """
    return list(features["loss_tokens"]) if "loss_tokens" in features.column_names else [1] * len(features)


def join(pieces: Sequence[pa.Table]) -> Dataset:
    """Return pieces of features as one data set."""
    # Nothing is cached under this fingerprint; without one the library would hash the whole table.
    return Dataset(pa.concat_tables(pieces), fingerprint=uuid.uuid4().hex[:16])


def pad(
    features: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, *, side: str | None = None
) -> dict[str, torch.Tensor]:
    """Return the model's inputs of a batch, padded to the longest, each of shape [features, tokens].

    Args:
        side: `right` where positions matter; None for the tokenizer's own.
    """
    inputs = [{key: feature[key] for key in INPUT_TYPES if key in feature} for feature in features]
    return dict(tokenizer.pad(inputs, padding_side=side, return_tensors="pt"))
