"""The gradients of one optimiser step of a single run: forward and backward passes over its micro-batches."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wlora.errors import ran_out_of_memory
from wlora.methods.base import Event
from wlora.training.batch_order import share
from wlora.training.prefetch import Batch, move
from wlora.training.settings import Computed
from wlora.training.sharding import average_gradients
from wlora.training.state import random_streams, set_random_streams

if TYPE_CHECKING:
    from wlora.training.trainer import Trainer

# Names of what a recorded pass is given besides the model's inputs.
_PART, _STATES = "part of the loss", "stored states"


def compute_gradients(trainer: Trainer, batches: list[list[int]]) -> Computed:
    """Store the gradients of a step's mean loss in the run's parameters, and return the loss.

    If memory is exhausted, every micro-batch is divided into twice as many parts, down to single rows, for this step and the
    rest of the run. The rows of a step, and thus the effective batch, do not change. With several processes the error is
    raised, because one process cannot repeat a step alone.

    Args:
        batches: the micro-batches, as row indices.
    """
    begin = time.perf_counter()
    while True:
        streams = random_streams()
        counted = trainer.result.examples, trainer.result.tokens
        try:
            return Computed(_accumulate(trainer, batches), time.perf_counter() - begin)
        except (MemoryError, RuntimeError) as error:
            several = trainer.accelerator.num_processes > 1
            if not ran_out_of_memory(error) or several or trainer.parts >= trainer.plan.batch_size:
                raise
        discard(trainer)
        set_random_streams(streams)
        trainer.result.examples, trainer.result.tokens = counted
        trainer.parts *= 2
        rows = math.ceil(trainer.plan.batch_size / trainer.parts)
        trainer.result.events.append(Event(trainer.step + 1, "out_of_memory", {"rows_at_once": rows}))


def discard(trainer: Trainer) -> None:
    """Discard the gradients of an unfinished step, and release the device's cached memory."""
    trainer.optimizers.zero_grad()
    trainer.method.forget_backward()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _accumulate(trainer: Trainer, batches: list[list[int]]) -> Tensor:
    """Run forward and backward over a step's micro-batches. The gradients are those of the mean loss over all rows."""
    train, accelerator = trainer.data.train, trainer.accelerator
    whole = sum(train.loss_weights[row] for batch in batches for row in batch)
    world, rank = accelerator.num_processes, accelerator.process_index
    total = torch.zeros((), device=accelerator.device)
    if trainer.prefix:
        trainer.prefix.prepare("train", train)
    if trainer.graphs:
        trainer.graphs.begin(len(trainer.result.events))
    pieces = _pieces(trainer, batches)
    for index, piece in enumerate(pieces):
        mine = share(piece, rank, world)
        rows = mine or piece[:1]
        inputs = move(trainer.prefetch.take(rows), accelerator.device)
        last = index == len(pieces) - 1
        following = next(iter(_pieces(trainer, trainer.upcoming) if last else pieces[index + 1 :]), [])
        trainer.prefetch.expect(share(following, rank, world) or following[:1])
        part = sum(train.loss_weights[row] for row in mine) / whole
        if trainer.graphs:
            total = total + _replay(trainer, rows, inputs, part)
        else:
            total = total + _compute(trainer, rows, inputs, part, last=last)
        trainer.count(piece)
    if trainer.settings.sharded:
        average_gradients(trainer.optimizers.parameters())
    if world > 1:
        total = accelerator.reduce(total, "sum")
    return total


def _compute(trainer: Trainer, rows: list[int], inputs: Batch, part: float, *, last: bool) -> Tensor:
    """Run forward and backward over a micro-batch, and return its part of the loss.

    Args:
        rows: this process's rows.
        inputs: the same rows, collated.
        part: their share in the step's mean loss.
        last: whether no other micro-batch of the step follows.
    """
    accelerator, world = trainer.accelerator, trainer.accelerator.num_processes
    with contextlib.nullcontext() if last else accelerator.no_sync(trainer.model), trainer.autocast():
        with trainer.replayed(rows, inputs):
            loss = _at_least_float32(trainer.model(**inputs).loss) * part
        extra = trainer.method.extra_loss() if last else None
        # Data-parallel training averages gradients over processes, but the mean over all rows is a sum of shares.
        scaled = loss * world if extra is None else loss * world + extra
        accelerator.backward(trainer.scaler.scale(scaled) if trainer.scaler else scaled)
    return loss.detach()


def _replay(trainer: Trainer, rows: list[int], inputs: Batch, part: float) -> Tensor:
    """Do the same as `_compute` by a CUDA graph, for the runs that `settle_graphs` admits: one process and no extra loss.

    What changes between micro-batches are tensors here: the inputs, their part, and the stored states of these rows.
    """
    assert trainer.graphs is not None
    given = inputs | move({_PART: torch.tensor(part, dtype=torch.float64)}, trainer.accelerator.device)
    if trainer.prefix:
        given[_STATES] = trainer.prefix.find("train", rows, inputs)
    return trainer.graphs.run(given, functools.partial(_compute_given, trainer), trainer.optimizers.parameters)


def _compute_given(trainer: Trainer, given: Batch) -> Tensor:
    inputs = {name: value for name, value in given.items() if name not in (_PART, _STATES)}
    with trainer.prefix.prefix.replaced(given[_STATES]) if trainer.prefix else contextlib.nullcontext():
        loss = _at_least_float32(trainer.model(**inputs).loss)
    loss = loss * given[_PART].to(loss.dtype)
    torch.autograd.backward(trainer.scaler.scale(loss) if trainer.scaler else loss)
    return loss.detach()


def _pieces(trainer: Trainer, batches: list[list[int]]) -> list[list[int]]:
    """Return the rows of every pass of a step: larger micro-batches after growth, or parts after running out of memory."""
    grown = trainer.growth.regroup(batches, trainer.data.train.lengths) if batches else []
    return [batch[part :: trainer.parts] for batch in grown for part in range(min(trainer.parts, len(batch)))]


def _at_least_float32(loss: Tensor) -> Tensor:
    return loss.to(torch.promote_types(loss.dtype, torch.float32))
