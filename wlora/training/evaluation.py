"""Score a model on a validation split. The result does not depend on how features are distributed over processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wlora.data.features import Features
from wlora.distributed import gather
from wlora.errors import RunFault
from wlora.metrics.glue import merge_shards
from wlora.tasks.base import Task
from wlora.training.batch_order import evaluation_batches, share
from wlora.training.prefetch import move
from wlora.training.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Split:
    """A validation split: its checked rows and their encoded features."""

    rows: Dataset
    features: Features


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: all metrics, and per validation split one prediction per feature."""

    metrics: dict[str, float]
    predictions: dict[str, list[Any]]

    def tabulate(self, task: Task, splits: dict[str, Split]) -> pa.Table:
        """Return all predictions, one line per row, with the name of the split (see `Task.tabulate`)."""
        tables = []
        for name, predictions in self.predictions.items():
            table = task.tabulate(predictions, splits[name].features, splits[name].rows)
            tables.append(table.add_column(0, "split", pa.array([name] * len(table)).dictionary_encode()))
        return pa.concat_tables(tables)

    def describe_classes(self, task: Task, splits: dict[str, Split]) -> dict[str, Any]:
        """Return the scores of every class on the first split, which is reported (see `Task.describe_classes`)."""
        name, predictions = next(iter(self.predictions.items()))
        return task.describe_classes(predictions, splits[name].features, splits[name].rows)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    task: Task,
    splits: dict[str, Split],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    accelerator: Accelerator,
    prefix: PrefixCache | None = None,
    together: bool = False,
) -> Evaluation:
    """Evaluate on all validation splits.

    Every process predicts its share of each batch. Predictions are gathered and scored once on the complete split.
    `model` is the bare model: a process without rows in a batch skips it, which a distributed wrapper would not allow.
    With `together` no process skips a batch, because the model is sharded.

    Args:
        model: the bare model.
        task: the task.
        splits: the validation splits by name.
        tokenizer: the model's tokenizer.
        batch_size: rows per batch, over all processes.
        accelerator: the processes.
        prefix: stored states from which the model continues, if its lower layers no longer change.
        together: whether all processes must call the model together.

    Returns:
        All metrics and predictions. If the first split has labels, `loss` is its mean loss.

    Raises:
        FloatingPointError: logits, the loss or a score are not finite; all processes raise it alike.
    """
    model.eval()
    metrics: dict[str, float] = {}
    found: dict[str, list[Any]] = {}
    for index, (name, split) in enumerate(splits.items()):
        if prefix is not None:
            prefix.prepare(name, split.features)

        def replay(rows: list[int], inputs: dict[str, torch.Tensor], name: str = name) -> AbstractContextManager[None]:
            return prefix.replay(name, rows, inputs) if prefix is not None else contextlib.nullcontext()

        predictions, loss, finite = _predict(
            model, task, split.features, tokenizer, batch_size, accelerator, replay, together
        )
        if not finite:  # checked before scoring: scores may hide it, as in SQuAD, and metric libraries may fail
            raise FloatingPointError(f"the logits are not finite on {name}")
        found[name] = predictions
        metrics.update(task.score(name, predictions, split.features, split.rows))
        if index == 0 and loss is not None:
            metrics["loss"] = loss
    model.train()
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
    return Evaluation(metrics, found)


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    task: Task,
    features: Features,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    accelerator: Accelerator,
) -> list[Any]:
    """Return one prediction per feature (see `Task.predict`), for rows that need no labels.

    Raises:
        RunFault: logits are not finite.
    """
    model.eval()
    found, _, finite = _predict(
        model, task, features, tokenizer, batch_size, accelerator, lambda *_: contextlib.nullcontext(), False
    )
    if not finite:
        raise RunFault("the logits are not finite")
    return found


def _predict(
    model: PreTrainedModel,
    task: Task,
    features: Features,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    accelerator: Accelerator,
    replay: Callable[[list[int], dict[str, torch.Tensor]], AbstractContextManager[None]],
    together: bool,
) -> tuple[list[Any], float | None, bool]:
    """Return one prediction per feature, the mean loss, and whether all logits are finite.

    The loss is a mean over features; None without labels.
    """
    indices: list[int] = []
    finite = [torch.ones((), dtype=torch.bool, device=accelerator.device)]
    found: list[torch.Tensor | Sequence[Any]] = []
    losses: list[torch.Tensor] = []
    weights: list[int] = []
    for batch in evaluation_batches(features.lengths, batch_size):
        mine = share(batch, accelerator.process_index, accelerator.num_processes)
        if not mine:
            if together:
                model(**move(task.collate(features.rows(batch[:1]), tokenizer), accelerator.device))
            continue
        picked = features.rows(mine)
        inputs = move(task.collate(picked, tokenizer), accelerator.device)
        with replay(mine, inputs):
            outputs = model(**inputs)
            finite += [value.isfinite().all() for key, value in outputs.items() if key.endswith("logits")]
            found.append(task.predict(model, picked, inputs, outputs))
        indices += mine
        if outputs.get("loss") is not None:
            losses.append(outputs.loss.float())
            weights.append(sum(features.loss_weights[index] for index in mine))
    # Tensors stay on the device until here, so that a batch does not wait for the previous one.
    predictions = [item for part in found for item in (part.cpu().numpy() if isinstance(part, torch.Tensor) else part)]
    # In float64, which Apple's GPU does not have.
    total = float((torch.stack(losses).cpu().double() * torch.tensor(weights)).sum()) if losses else None
    shards, totals = gather((indices, predictions)), [part for part in gather(total) if part is not None]
    loss = sum(totals) / sum(features.loss_weights) if totals else None
    return merge_shards(shards, count=len(features)), loss, all(gather(bool(torch.stack(finite).all())))
