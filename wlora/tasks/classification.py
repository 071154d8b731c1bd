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
from wlora.metrics.glue import compute, metrics_of
from wlora.tasks.base import check_metrics


class SequenceClassification:
    """Maps one or two texts to a class (named in `labels`), or to a value if `labels` is empty (regression).

    Attributes:
        head: the kind of model head.
        num_labels: number of outputs of the head; 1 for regression.
        primary_metric: the reported metric, one of `task.metrics`.

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
        of = f"{classes} classes" if classes else "values (task.labels=[])"
        check_metrics(config, metrics_of(classes), of)
        self.config = config
        self.regression = not config.labels
        self.num_labels = len(config.labels) or 1
        self.primary_metric = config.primary_metric

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, training: bool) -> Features:
        """Tokenise rows, truncated to `task.max_length` tokens and not padded.

        Returns:
            Columns `input_ids`, `attention_mask` and, if the tokenizer provides them, `token_type_ids` (lists of
                `length` integers); `labels` (int64, or float32 for regression) and `length` (tokens, int32).
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
            labels = pa.array(texts[LABEL], pa.float32() if self.regression else pa.int64())
            pieces.append(pa.table({**input_columns(encoded), "labels": labels}))
        return Features(pieces, truncated_share=truncated / len(rows))

    def collate(self, features: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        """Pad features to the longest one. Labels have shape [rows], int64 or (regression) float32."""
        batch = pad(features, tokenizer)
        dtype = torch.float32 if self.regression else torch.int64
        batch["labels"] = torch.tensor([feature["labels"] for feature in features], dtype=dtype)
        return batch

    def row_losses(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the cross-entropy of each row, or (regression) its squared error, [rows]."""
        labels = inputs["labels"]
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        if self.regression:
            return F.mse_loss(logits.view(-1), labels.to(logits.dtype), reduction="none")
        return F.cross_entropy(logits, labels, reduction="none")

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
        if split == self.config.validation[0]:
            return found
        suffix = split.removeprefix("validation_")
        return {f"{name}_{suffix}": value for name, value in found.items()}

    def tabulate(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> pa.Table:
        """Return `row`, `label`, `prediction` and, for classes, `scores`: the logits in half precision."""
        columns: dict[str, Any] = {"row": pa.array(range(len(rows)), pa.int32()), "label": features.array("labels")}
        columns["prediction"] = pa.array(self._decide(predictions))
        if not self.regression:
            logits = pa.array(np.stack(predictions).astype(np.float16).ravel())
            columns["scores"] = pa.FixedSizeListArray.from_arrays(logits, self.num_labels)
        return pa.table(columns)

    def _decide(self, predictions: Sequence[Any]) -> np.ndarray:
        """Return class indices (int64) or values (float32), shape [rows]."""
        logits = np.stack(predictions)
        decided: np.ndarray = logits[:, 0] if self.regression else logits.argmax(axis=1)
        return decided
