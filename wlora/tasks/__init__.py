"""Benchmarks: where rows come from (`data`), and how they become batches and scores (a module per kind)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

from wlora.errors import unknown_name

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from wlora.config import TaskConfig

_KINDS = {"classification": ("wlora.tasks.classification", "SequenceClassification")}


class Task(Protocol):
    """What a run needs to know of a benchmark.

    Attributes:
        head: the kind of head on the model.
        num_labels: its outputs.
        primary_metric: the key, among those of `score` for the first validation split, that is reported.
    """

    head: str
    num_labels: int
    primary_metric: str
    truncated_share: float

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Tokenise rows; the result has the model's inputs, `labels` and `length` (tokens)."""
        ...

    def collate(self, features: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        """Pad encoded rows to the longest of them."""
        ...

    def predict(self, outputs: Any) -> torch.Tensor:
        """Turn the model's outputs into predictions, one per row."""
        ...

    def score(self, split: str, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        """Return the metrics of one whole validation split."""
        ...


def build_task(config: TaskConfig) -> Task:
    """Build the task of a configuration; only now is the module of its kind, and with it torch, imported.

    Raises:
        ConfigError: an unknown `task.kind`, or a `task.primary_metric` that is not computed.
    """
    if config.kind not in _KINDS:
        raise unknown_name(f"task.kind={config.kind}", config.kind, _KINDS)
    module, name = _KINDS[config.kind]
    task: Task = getattr(importlib.import_module(module), name)(config)
    return task
