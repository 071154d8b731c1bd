"""Classification with any number of classes per row."""

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
from wlora.data.features import Features, pad
from wlora.metrics.classes import MULTI_LABEL_METRICS, score_classes, score_label_sets
from wlora.tasks.base import check_metrics
from wlora.tasks.classification import SequenceClassification


class MultiLabel(SequenceClassification):
    """Maps one or two texts to a set of classes. A class is predicted if its logit is above 0 (probability above 0.5).

    The loss is the mean binary cross-entropy over classes, as in transformers' `multi_label_classification`.
    """

    def _check_metrics(self, config: TaskConfig) -> None:
        check_metrics(config, MULTI_LABEL_METRICS, "any number of classes per row")

    def _label_array(self, labels: Sequence[Any]) -> pa.Array:
        return pa.array(labels, pa.list_(pa.int32()))

    def collate(self, features: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        """Pad features to the longest one. Labels are 0 and 1, float32 [rows, classes]."""
        batch = pad(features, tokenizer)
        if "labels" in features[0]:
            batch["labels"] = torch.from_numpy(self._sets([feature["labels"] for feature in features])).float()
        return batch

    def row_losses(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean binary cross-entropy over the classes of each row, [rows]."""
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        return F.binary_cross_entropy_with_logits(logits, inputs["labels"].to(logits.dtype), reduction="none").mean(1)

    def score(self, split: str, predictions: Sequence[Any], features: Features, rows: Dataset) -> dict[str, float]:
        """Return `task.metrics` of a split. Keys of all splits except the first end with the split's name."""
        references = self._sets(features.column("labels"))
        return self._name_scores(split, score_label_sets(self.config.metrics, references, self._decide(predictions)))

    def tabulate(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> pa.Table:
        """Return `row`, `label` and `prediction` (lists of class numbers), and `scores`: the logits in half precision."""
        chosen = [np.flatnonzero(row).tolist() for row in self._decide(predictions)]
        return pa.table(
            {
                "row": pa.array(range(len(rows)), pa.int32()),
                "label": features.array("labels"),
                "prediction": pa.array(chosen, pa.list_(pa.int32())),
                "scores": self._logits(predictions),
            }
        )

    def describe_classes(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> dict[str, Any]:
        """Return the scores of every class on a split, without a confusion matrix."""
        return score_classes(self._sets(features.column("labels")), self._decide(predictions), self.config.labels)

    def answer(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> pa.Table:
        """Return the predicted classes of each row as one text, separated by `|`, and the probability of every class."""
        names = self.config.labels
        chosen = ["|".join(names[number] for number in np.flatnonzero(row)) for row in self._decide(predictions)]
        chances = 1 / (1 + np.exp(-np.stack(predictions).astype(np.float64)))
        texts = [" ".join(f"{name}={value:.4f}" for name, value in zip(names, row, strict=True)) for row in chances]
        return pa.table({"prediction": chosen, "probability": texts})

    def _sets(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Return lists of class numbers as 0 and 1, int64 [rows, classes]."""
        sets = np.zeros((len(rows), self.num_labels), dtype=np.int64)
        for row, numbers in zip(sets, rows, strict=True):
            row[np.asarray(numbers, dtype=np.int64)] = 1
        return sets

    def _decide(self, predictions: Sequence[Any]) -> np.ndarray:
        """Return 0 and 1, int64 [rows, classes]."""
        return (np.stack(predictions) > 0).astype(np.int64)
