"""The interface of tasks: how rows become features, batches, predictions and scores. One module per kind of task."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from wlora.errors import unknown_name, wrong_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa
    import torch
    from datasets import Dataset
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

    from wlora.config.schema import TaskConfig
    from wlora.data.features import Features


class Kind(NamedTuple):
    """A kind of task: module and name of its class, and the model head it needs (`Task.head`, available without torch)."""

    module: str
    name: str
    head: str


_KINDS = {
    # One class of `labels` per row; without labels a value, as in STS-B.
    "classification": Kind("wlora.tasks.classification", "SequenceClassification", "sequence_classification"),
    "regression": Kind("wlora.tasks.classification", "SequenceClassification", "sequence_classification"),
    "multi_label": Kind("wlora.tasks.multi_label", "MultiLabel", "sequence_classification"),
    "token_classification": Kind("wlora.tasks.token_classification", "TokenClassification", "token_classification"),
    "question_answering": Kind("wlora.tasks.question_answering", "QuestionAnswering", "question_answering"),
    "summarization": Kind("wlora.tasks.summarization", "Summarization", "seq2seq"),
}


class Task(Protocol):
    """The interface that a run uses.

    *Rows* come from `wlora.data`. They are checked and otherwise unchanged. *Features* are the model's inputs. A row has
    several features if its text is cut into windows.

    Attributes:
        head: the kind of model head, a key of `wlora.models.loading`: `sequence_classification`, `token_classification`,
            `question_answering` or `seq2seq`.
        num_labels: number of outputs of the head.
        any_padding: whether a row's loss is independent of the amount of padding.
        primary_metric: the reported metric, a key of `score` for the first validation split.
    """

    head: str
    any_padding: bool
    num_labels: int
    primary_metric: str

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, training: bool) -> Features:
        """Tokenise rows into features.

        Returns:
            Columns of the model's inputs (not padded) and `length` (tokens). Training features also have the targets of
                the loss: `labels`, or `start_positions` and `end_positions`. Validation features have them if a
                validation loss is defined, and further columns that `predict` and `score` read. If the loss is a mean
                over tokens, `loss_tokens` is their number. Rows without labels (`wlora predict`) give no targets. Training
                rows without any target have no features.
        """
        ...

    def collate(self, features: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        """Pad features to the longest one. The batch holds exactly the arguments of the model's forward pass."""
        ...

    def row_losses(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of each row of a collated batch, float [rows].

        Their mean, weighted by `Features.loss_weights`, is the loss that the model's own forward pass returns.
        """
        ...

    def predict(
        self, model: PreTrainedModel, features: list[dict[str, Any]], inputs: dict[str, torch.Tensor], outputs: Any
    ) -> torch.Tensor | Sequence[Any]:
        """Predict one batch in evaluation mode, without gradients.

        Args:
            model: the model itself, not its wrapper for several processes, for tasks that generate text.
            features: the batch's features, with all their columns.
            inputs: the result of `collate` for them, on the model's device.
            outputs: the result of `model(**inputs)`.

        Returns:
            A tensor with one row per feature (on any device; without waiting for it), or a sequence with one object per
                feature. All predictions of a split are kept until it is scored and are sent between processes, so they
                must be small. Whole logits of tokens are too large.
        """
        ...

    def score(self, split: str, predictions: Sequence[Any], features: Features, rows: Dataset) -> dict[str, float]:
        """Return the metrics of one complete validation split.

        Args:
            split: the name of the split.
            predictions: one per feature, in the features' order; rows of a tensor arrive as numpy arrays or numbers.
            features: the split as returned by `encode`.
            rows: the rows that were encoded.
        """
        ...

    def tabulate(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> pa.Table:
        """Return the predictions of one complete validation split for the records, one line per row.

        Args:
            predictions: as for `score`.
            features: as for `score`.
            rows: as for `score`.

        Returns:
            Columns `row` (int32, in the split's order), `prediction`, and per-row scores in half precision: for classes
                `scores` (the logits, a list per row), for texts one column per metric. Classes and values also have
                `label`. Reference texts are not included, because they belong to their publishers.
        """
        ...

    def describe_classes(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> dict[str, Any]:
        """Return the scores of every class on one complete validation split (`wlora.metrics.classes`).

        The result is JSON for the record. It is empty for tasks without classes.
        """
        ...

    def answer(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> pa.Table:
        """Return predictions in readable form, one line per row. The rows need no labels.

        Returns:
            The column `prediction` (class names, values or texts), and `probability` for classes.
        """
        ...


def find_kind(name: str) -> Kind:
    """Return the kind of task with this name.

    Raises:
        ConfigError: `task.kind` is unknown.
    """
    if name not in _KINDS:
        raise unknown_name(f"task.kind={name}", name, _KINDS)
    return _KINDS[name]


def build_task(config: TaskConfig) -> Task:
    """Build the configured task. Its module, and with it torch, is imported only here.

    Raises:
        ConfigError: `task.kind` is unknown, or `task.primary_metric` is not computed.
    """
    kind = find_kind(config.kind)
    task: Task = getattr(importlib.import_module(kind.module), kind.name)(config)
    return task


def fill_empty(encoded: BatchEncoding, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give every text without tokens one token, in place, because a model cannot read a batch of such texts only.

    The tokenizers of many decoders add no special token, so that an empty text has no token. The heads of decoders read the
    last token that is not padding, so the end token is used unless it is also the padding token.
    """
    marks = [getattr(tokenizer, f"{name}_token_id") for name in ("eos", "bos", "unk")]
    mark = next((mark for mark in marks if mark not in (None, tokenizer.pad_token_id)), tokenizer.pad_token_id)
    filler = {"input_ids": mark, "attention_mask": 1, "token_type_ids": 0}
    for row, tokens in enumerate(encoded["input_ids"]):
        if not tokens:
            for name in filler.keys() & encoded.keys():
                encoded[name][row] = [filler[name]]


def check_metrics(config: TaskConfig, known: Sequence[str], of: str, *, never_primary: tuple[str, ...] = ()) -> None:
    """Check the task's metrics before training starts.

    Args:
        config: the task's configuration.
        known: the metrics that are defined for the task.
        of: description of the task for messages.
        never_primary: prefixes of metrics that do not exist for all data, and therefore cannot be the reported metric.

    Raises:
        ConfigError: there are no metrics, one is not defined for the task, or `task.primary_metric` is not computed.
    """
    wrong = next((name for name in config.metrics if name not in known), None if config.metrics else "[]")
    if wrong is not None:
        raise wrong_value("task.metrics", wrong, f"{', '.join(known)} for {of}")
    primary = [name for name in config.metrics if not name.startswith(never_primary)]
    if config.primary_metric not in primary:
        raise wrong_value("task.primary_metric", config.primary_metric, ", ".join(primary))
