"""Scoring a model on the rows of a validation split, exact however the rows are spread over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from wlora.metrics import merge_shards
from wlora.tasks import Task
from wlora.training.batching import evaluation_batches, share

if TYPE_CHECKING:
    from datasets import Dataset


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    splits: dict[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Return all metrics of all validation splits, and the mean loss of the first as `loss`.

    Every process sees its share of each batch; predictions are gathered and scored once on the whole.
    """
    model.eval()
    metrics: dict[str, float] = {}
    for index, (split, rows) in enumerate(splits.items()):
        predictions, references, loss = _predict(model, task, rows, tokenizer, batch_size, accelerator)
        metrics.update(task.score(split, predictions, references))
        if index == 0:
            metrics["loss"] = loss
    model.train()
    return metrics


def _predict(
    model: nn.Module,
    task: Task,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    accelerator: Accelerator,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return predictions and references in row order, and the mean loss over rows."""
    indices: list[int] = []
    found: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []
    for batch in evaluation_batches(list(rows["length"]), batch_size):
        mine = share(batch, accelerator.process_index, accelerator.num_processes)
        if not mine:
            continue
        inputs = move(task.collate(pick(rows, mine), tokenizer), accelerator.device)
        outputs = model(**inputs)
        indices += mine
        found.append(task.predict(outputs))
        labels.append(inputs["labels"])
        losses.append(outputs.loss.detach().double() * len(mine))
    shard = (
        np.asarray(indices, dtype=np.int64),
        torch.cat(found).cpu().numpy() if found else np.empty(0),
        torch.cat(labels).cpu().numpy() if labels else np.empty(0),
    )
    total = float(torch.stack(losses).sum()) if losses else 0.0
    shards = gather_object([shard]) if accelerator.num_processes > 1 else [shard]
    totals = gather_object([total]) if accelerator.num_processes > 1 else [total]
    predictions, references = merge_shards(shards, rows=len(rows))
    return predictions, references, sum(totals) / len(predictions)


def pick(rows: Dataset, indices: list[int]) -> list[dict[str, Any]]:
    """Return rows by index as a list of features."""
    return rows.__getitems__(indices)  # type: ignore[no-any-return]


def move(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Move a batch to a device."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
