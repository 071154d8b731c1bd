"""Sequence classification and regression: GLUE and its synthetic counterpart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wlora.config.schema import TaskConfig
from wlora.data.features import ROWS_AT_ONCE, Features, find_truncated, input_columns, pad
from wlora.data.row_checks import LABEL
from wlora.errors import wrong_value
from wlora.metrics.classes import score_classes
from wlora.metrics.glue import compute, metrics_of
from wlora.tasks.base import check_metrics, fill_empty
from wlora.tasks.class_weights import balance_classes, class_losses


class SequenceClassification:
    """Maps one or two texts to a class (named in `labels`), or to a value if `labels` is empty (regression).

    Attributes:
        head: the kind of model head.
        num_labels: number of outputs of the head; 1 for regression.
        primary_metric: the reported metric, one of `task.metrics`.
        class_weights: the weight of each class in the training loss, once the training rows are encoded; None for equal
            ones. Their mean over the rows is 1.

    Raises:
        ConfigError: `task.labels` has a single name or a duplicate, or a metric is not defined for this number of
            classes.
    """

    head = "sequence_classification"
    any_padding = True

    def __init__(self, config: TaskConfig) -> None:
        classes = len(config.labels)
        if classes == 1 or len(set(config.labels)) < classes:
            allowed = "two or more different names, or [] for values (regression)"
            raise wrong_value("task.labels", f"[{','.join(config.labels)}]", allowed)
        if (config.kind == "regression" and classes) or (config.kind == "multi_label" and not classes):
            allowed = "[] with task.kind=regression" if classes else "two or more different names"
            raise wrong_value("task.labels", f"[{','.join(config.labels)}]", allowed)
        self._check_metrics(config)
        self.config = config
        self.regression = not config.labels
        self.num_labels = len(config.labels) or 1
        self.primary_metric = config.primary_metric
        self.class_weights: list[float] | None = None

    def _check_metrics(self, config: TaskConfig) -> None:
        classes = len(config.labels)
        check_metrics(config, metrics_of(classes), f"{classes} classes" if classes else "values (task.labels=[])")

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, training: bool) -> Features:
        """Tokenise rows, truncated to `task.max_length` tokens and not padded. Every row has at least one token.

        Returns:
            Columns `input_ids`, `attention_mask` and, if the tokenizer provides them, `token_type_ids` (lists of
                `length` integers); `labels` (int64, or float32 for regression; missing for rows without labels) and
                `length` (tokens, int32).
        """
        pieces, truncated = [], 0
        for start in range(0, len(rows), ROWS_AT_ONCE):
            texts = rows[start : start + ROWS_AT_ONCE]
            encoded = tokenizer(
                *(texts[column] for column in self.config.columns),
                truncation=True,
                max_length=self.config.max_length,
            )
            truncated += sum(find_truncated(encoded, self.config.max_length))
            fill_empty(encoded, tokenizer)
            labels = {"labels": self._label_array(texts[LABEL])} if LABEL in texts else {}
            pieces.append(pa.table({**input_columns(encoded), **labels}))
        if training and self.config.class_weights == "balanced":
            self.class_weights = balance_classes(rows[LABEL][:], self.num_labels)
        return Features(pieces, truncated_share=truncated / len(rows))

    def _label_array(self, labels: Sequence[Any]) -> pa.Array:
        return pa.array(labels, pa.float32() if self.regression else pa.int64())

    def collate(self, features: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        """Pad features to the longest one. Labels have shape [rows], int64 or (regression) float32."""
        batch = pad(features, tokenizer)
        dtype = torch.float32 if self.regression else torch.int64
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([feature["labels"] for feature in features], dtype=dtype)
        return batch

    def row_losses(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the cross-entropy of each row, or (regression) its squared error, [rows]."""
        labels = inputs["labels"]
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        if self.regression:
            return F.mse_loss(logits.view(-1), labels.to(logits.dtype), reduction="none")
        return class_losses(logits, labels, self.class_weights if model.training else None)

    def predict(
        self, model: PreTrainedModel, features: list[dict[str, Any]], inputs: dict[str, torch.Tensor], outputs: Any
    ) -> torch.Tensor:
        """Return the logits, float32 [rows, num_labels]. For regression the only logit is the predicted value."""
        logits: torch.Tensor = outputs.logits.float()
        return logits

    def score(self, split: str, predictions: Sequence[Any], features: Features, rows: Dataset) -> dict[str, float]:
        """Return `task.metrics` of a split. Keys of all splits except the first end with the split's name.

        For example, MNLI has `accuracy` (matched) and `accuracy_mismatched`.
        """
        found = compute(self.config.metrics, self._decide(predictions), np.asarray(features.column("labels")))
        return self._name_scores(split, found)

    def _name_scores(self, split: str, found: dict[str, float]) -> dict[str, float]:
        if split == self.config.validation[0]:
            return found
        suffix = split.removeprefix("validation_")
        return {f"{name}_{suffix}": value for name, value in found.items()}

    def tabulate(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> pa.Table:
        """Return `row`, `label`, `prediction` and, for classes, `scores`: the logits in half precision."""
        columns: dict[str, Any] = {"row": pa.array(range(len(rows)), pa.int32()), "label": features.array("labels")}
        columns["prediction"] = pa.array(self._decide(predictions))
        if not self.regression:
            columns["scores"] = self._logits(predictions)
        return pa.table(columns)

    def describe_classes(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> dict[str, Any]:
        """Return the scores of every class on a split, with the confusion matrix; empty for regression."""
        if self.regression:
            return {}
        return score_classes(np.asarray(features.column("labels")), self._decide(predictions), self.config.labels)

    def answer(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> pa.Table:
        """Return `prediction` and, for classes, the `probability` of the predicted class (softmax of the logits)."""
        decided = self._decide(predictions)
        if self.regression:
            return pa.table({"prediction": pa.array(decided.astype(np.float64))})
        logits = np.stack(predictions).astype(np.float64)
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        top = (chances / chances.sum(axis=1, keepdims=True)).max(axis=1)
        return pa.table({"prediction": [self.config.labels[number] for number in decided], "probability": np.round(top, 4)})

    def _logits(self, predictions: Sequence[Any]) -> pa.Array:
        logits = pa.array(np.stack(predictions).astype(np.float16).ravel())
        return pa.FixedSizeListArray.from_arrays(logits, self.num_labels)

    def _decide(self, predictions: Sequence[Any]) -> np.ndarray:
        """Return class indices (int64) or values (float32), shape [rows]."""
        logits = np.stack(predictions)
        decided: np.ndarray = logits[:, 0] if self.regression else logits.argmax(axis=1)
        return decided
