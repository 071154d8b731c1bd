"""Benchmarks: where rows come from (`data`), and how they become batches and scores (a module per kind)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from wlora.errors import unknown_name, wrong_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from wlora.config.schema import TaskConfig
    from wlora.data.features import Features


class Kind(NamedTuple):
    """A kind of task: its class, and the head a model needs for it (`Task.head`, known without torch)."""

    module: str
    name: str
    head: str


_KINDS = {
    "classification": Kind("wlora.tasks.classification", "SequenceClassification", "sequence_classification"),
    "question_answering": Kind("wlora.tasks.question_answering", "QuestionAnswering", "question_answering"),
    "summarization": Kind("wlora.tasks.summarization", "Summarization", "seq2seq"),
}


class Task(Protocol):
    """What a run needs to know of a benchmark.

    Its *rows* are those of `data`, checked and otherwise as published. Its *features* are what the model reads: one
    or more per row (a long text is cut into windows).

    Attributes:
        head: the kind of head on the model, a key of `wlora.models.loading`: `sequence_classification`,
            `question_answering` or `seq2seq`.
        num_labels: the head's outputs.
        primary_metric: the key, among those of `score` for the first validation split, that is reported.
    """

    head: str
    num_labels: int
    primary_metric: str

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, training: bool) -> Features:
        """Tokenise rows into features.

        Returns:
            Columns of the model's inputs (not padded) and `length` (tokens). Training features have what the loss
            needs besides: `labels`, or `start_positions` and `end_positions`. Those of validation have it where a
            validation loss is defined, and further columns that `predict` and `score` read. Where the loss is a mean
            over tokens, `loss_tokens` is their number.
        """
        ...

    def collate(self, features: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        """Pad features to the longest of them; the batch has what the model's forward pass takes and nothing else."""
        ...

    def predict(
        self, model: PreTrainedModel, features: list[dict[str, Any]], inputs: dict[str, torch.Tensor], outputs: Any
    ) -> torch.Tensor | Sequence[Any]:
        """Predict a batch in evaluation mode, without gradients.

        Args:
            model: the bare model, never wrapped for several processes, for those who generate.
            features: the batch's features, with all their columns.
            inputs: the same as `collate` returns it, on the model's device.
            outputs: of `model(**inputs)`.

        Returns:
            A tensor with a row per feature (any device; not waited for), or a sequence with an object per feature.
            All of a split are kept until it is scored, and are sent between processes: small, never whole logits.
        """
        ...

    def score(self, split: str, predictions: Sequence[Any], features: Features, rows: Dataset) -> dict[str, float]:
        """Return the metrics of one whole validation split.

        Args:
            split: its name.
            predictions: one per feature, in the features' order; rows of a tensor come as numpy arrays or numbers.
            features: the split as `encode` returned it.
            rows: the split as it was encoded from.
        """
        ...

    def tabulate(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> pa.Table:
        """Return what was predicted of one whole validation split, a line per row of it, for records.

        Args:
            predictions: as for `score`, as are the others.

        Returns:
            Columns `row` (int32, in the split's order), `prediction`, and in half precision what tells rows apart: of
            classes `scores` (the logits, a list per row), of texts a column per metric. Classes and values have `label`,
            too; right texts are left out, since they are their publishers'.
        """
        ...


def find_kind(name: str) -> Kind:
    """Return the kind of task of this name.

    Raises:
        ConfigError: an unknown `task.kind`.
    """
    if name not in _KINDS:
        raise unknown_name(f"task.kind={name}", name, _KINDS)
    return _KINDS[name]


def build_task(config: TaskConfig) -> Task:
    """Build the task of a configuration; only now is the module of its kind, and with it torch, imported.

    Raises:
        ConfigError: an unknown `task.kind`, or a `task.primary_metric` that is not computed.
    """
    kind = find_kind(config.kind)
    task: Task = getattr(importlib.import_module(kind.module), kind.name)(config)
    return task


def check_metrics(config: TaskConfig, known: Sequence[str], of: str, *, never_primary: tuple[str, ...] = ()) -> None:
    """Check which metrics a task computes and which of them it reports, before anything is trained for them.

    Args:
        config: of the task.
        known: the metrics that are defined for it.
        of: what they are metrics of, for messages.
        never_primary: how the names of metrics begin that some data do not have.

    Raises:
        ConfigError: no metrics, one that is not defined for the task, or a `task.primary_metric` that is not computed.
    """
    wrong = next((name for name in config.metrics if name not in known), None if config.metrics else "[]")
    if wrong is not None:
        raise wrong_value("task.metrics", wrong, f"{', '.join(known)} for {of}")
    primary = [name for name in config.metrics if not name.startswith(never_primary)]
    if config.primary_metric not in primary:
        raise wrong_value("task.primary_metric", config.primary_metric, ", ".join(primary))
