"""Summarisation with encoder-decoder models: XSum, CNN/DailyMail and their synthetic counterpart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from wlora.config.schema import TaskConfig
from wlora.data.features import ROWS_AT_ONCE, Features, find_truncated, input_columns, pad, stack
from wlora.errors import ConfigError
from wlora.metrics.rouge import ROUGE_NAMES, compute_rouge, score_documents
from wlora.tasks.base import check_metrics, fill_empty

IGNORED = -100
"""The label of a padded position.

The cross-entropy of torch ignores it, and the model replaces it by padding in the decoder's input.
"""


class Summarization:
    """Maps a document to a summary. `task.columns` names the columns of both, in this order.

    Attributes:
        head: the kind of model head; it is pretrained, with no new parameters.
        num_labels: not used by this head.
        primary_metric: the reported metric, one of `task.metrics`.

    Raises:
        ConfigError: `task.columns` does not have two names, `task.metrics` has an unknown name, or
            `task.primary_metric` is not one of them.
    """

    head = "seq2seq"
    any_padding = True
    num_labels = 1

    def __init__(self, config: TaskConfig) -> None:
        if len(config.columns) != 2:
            raise ConfigError(f"task.columns={config.columns}: allowed are two columns, the document's and the summary's")
        check_metrics(config, ROUGE_NAMES, "summaries")
        self.config = config
        self.primary_metric = config.primary_metric
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, training: bool) -> Features:
        """Tokenise rows, truncated to `task.max_length` and `task.max_target_length` tokens and not padded.

        Empty documents and summaries, of which the benchmarks have a few, are encoded as empty texts of at least one token.

        Returns:
            Columns `input_ids`, `attention_mask` (lists of `length` integers), `labels` (list of the summary's tokens),
                `length` (tokens of the document, int32) and `loss_tokens` (tokens of the summary, int32).
        """
        self._tokenizer = tokenizer
        document, summary = self.config.columns
        known = summary in rows.column_names
        limits = self.config.max_length, self.config.max_target_length
        pieces, truncated = [], 0
        for start in range(0, len(rows), ROWS_AT_ONCE):
            texts = rows[start : start + ROWS_AT_ONCE]
            source = tokenizer(texts[document], truncation=True, max_length=limits[0])
            # A row without a summary, which is to be predicted, gets an empty one. Its loss is not used.
            summaries = texts[summary] if known else [""] * len(texts[document])
            target = tokenizer(text_target=summaries, truncation=True, max_length=limits[1])
            cut = (find_truncated(encoded, limit) for encoded, limit in zip((source, target), limits, strict=True))
            truncated += sum(any(both) for both in zip(*cut, strict=True))
            for encoded in (source, target):
                fill_empty(encoded, tokenizer)
            # The tokenizer's token_type_ids are dropped: encoder-decoder models do not accept them.
            inputs = {key: source[key] for key in ("input_ids", "attention_mask")}
            labels = pa.array(target["input_ids"], pa.list_(pa.int32()))
            pieces.append(pa.table({**input_columns(inputs), "labels": labels, "loss_tokens": labels.value_lengths()}))
        return Features(pieces, truncated_share=truncated / len(rows))

    def collate(self, features: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
        """Pad documents and summaries to the longest of each. The loss ignores padded labels.

        Decoder inputs are not included: the model creates them by shifting the labels right.
        """
        batch = pad(features, tokenizer)
        batch["labels"] = stack([feature["labels"] for feature in features], IGNORED, "right")
        return batch

    def row_losses(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean cross-entropy over the tokens of each summary, [rows]."""
        labels = inputs["labels"]
        shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        logits = model(**rest, decoder_input_ids=shifted).logits
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
        return losses.view(labels.shape).sum(1) / (labels != IGNORED).sum(1).clamp(min=1)

    def predict(
        self, model: PreTrainedModel, features: list[dict[str, Any]], inputs: dict[str, torch.Tensor], outputs: Any
    ) -> list[str]:
        """Generate a summary per document, from the encoder output that was computed for the loss."""
        assert self._tokenizer is not None
        self.set_generation(model)
        encoded = BaseModelOutput(last_hidden_state=outputs.encoder_last_hidden_state)
        tokens = model.generate(encoder_outputs=encoded, attention_mask=inputs["attention_mask"])
        return list(self._tokenizer.batch_decode(tokens, skip_special_tokens=True))

    def score(self, split: str, predictions: Sequence[Any], features: Features, rows: Dataset) -> dict[str, float]:
        """Return `task.metrics` with their confidence intervals, against the complete reference summaries."""
        return compute_rouge(self.config.metrics, predictions, rows[self.config.columns[1]])

    def tabulate(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> pa.Table:
        """Return `row`, `prediction` and every metric of every document."""
        scores = score_documents(self.config.metrics, predictions, rows[self.config.columns[1]]).astype(np.float16)
        columns = {"row": pa.array(range(len(rows)), pa.int32()), "prediction": pa.array(predictions, pa.string())}
        return pa.table({**columns, **{name: pa.array(scores[:, i]) for i, name in enumerate(self.config.metrics)}})

    def describe_classes(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> dict[str, Any]:
        """Return nothing: summaries have no classes."""
        return {}

    def answer(self, predictions: Sequence[Any], features: Features, rows: Dataset) -> pa.Table:
        """Return `prediction`: the summaries."""
        return pa.table({"prediction": pa.array(predictions, pa.string())})

    def set_generation(self, model: PreTrainedModel) -> None:
        """Write the configured settings into the model's `generation_config`, the only place that generation reads.

        Generation never samples, so the same model always writes the same summaries. A limit in new tokens replaces the
        model's own limit in total tokens. Otherwise transformers would warn in every batch that both are set.
        """
        overrides = self.config.generation
        changes: dict[str, Any] = {"do_sample": False}
        if overrides.num_beams is not None:
            changes["num_beams"] = overrides.num_beams
        if overrides.length_penalty is not None:
            changes["length_penalty"] = overrides.length_penalty
        if overrides.max_new_tokens is not None:
            changes |= {"max_new_tokens": overrides.max_new_tokens, "max_length": None}
        if overrides.min_new_tokens is not None:
            changes |= {"min_new_tokens": overrides.min_new_tokens, "min_length": None}
        model.generation_config.update(**changes)
