"""The rows of every step: batches of similar length, in an order that depends only on (seed, epoch)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from wlora.methods.training_data import Phase

# Rows are sorted by length within windows of this many batches. This saves padding and still mixes the rows.
WINDOW_BATCHES = 50


def training_batches(lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Divide one epoch into micro-batches of row indices.

    Rows are shuffled, sorted by length within windows, divided into batches, and the batches are shuffled. In epoch 0
    the batch with the longest row comes first, so that a lack of memory shows immediately.
    """
    generator = random.Random(f"{seed}/{epoch}")
    rows = list(range(len(lengths)))
    generator.shuffle(rows)
    window = WINDOW_BATCHES * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(rows), window):
        block = sorted(rows[start : start + window], key=lambda row: lengths[row], reverse=True)
        batches += [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
    generator.shuffle(batches)
    if epoch == 0:
        longest = max(range(len(batches)), key=lambda index: max(lengths[row] for row in batches[index]))
        batches[0], batches[longest] = batches[longest], batches[0]
    return batches


def evaluation_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Divide all rows into batches of similar length, longest first. The order is always the same."""
    rows = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def group_for_steps(batches: list[list[int]], accumulation_steps: int) -> list[list[list[int]]]:
    """Group micro-batches into optimiser steps. The last step of an epoch may have fewer."""
    return [batches[i : i + accumulation_steps] for i in range(0, len(batches), accumulation_steps)]


def step_batches(
    phases: Sequence[Phase], lengths: Sequence[int], *, batch_size: int, accumulation_steps: int, seed: int
) -> Iterator[list[list[int]]]:
    """Yield the micro-batches of every optimiser step of a run. Each phase draws from its own rows.

    Args:
        phases: the phases of the run.
        lengths: number of tokens of every training row.
        batch_size: rows per micro-batch.
        accumulation_steps: micro-batches per optimiser step.
        seed: seed of the order.
    """
    epoch = 0
    for phase in phases:
        done = 0
        while done < phase.steps:
            batches = training_batches([lengths[row] for row in phase.rows], batch_size, seed=seed, epoch=epoch)
            for group in group_for_steps(batches, accumulation_steps)[: phase.steps - done]:
                yield [[phase.rows[index] for index in batch] for batch in group]
                done += 1
            epoch += 1


def share(batch: list[int], rank: int, world: int) -> list[int]:
    """Return one process's rows of a micro-batch. Over all processes, every row occurs exactly once."""
    return batch[rank::world]
