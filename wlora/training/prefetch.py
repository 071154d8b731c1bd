"""Collate batches ahead of time in a second thread, and move them to the device without waiting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def move(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device. GPU transfers use pinned memory, so that the host does not wait for the copy."""
    if device.type == "cuda":
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


class Prefetcher:
    """Collates the expected next batch ahead of time. If other rows are requested, they are collated then.

    Args:
        collate: turns row indices into a batch on the CPU; must not draw random numbers.
    """

    def __init__(self, collate: Callable[[list[int]], Batch]) -> None:
        self._collate = collate
        self._pool: ThreadPoolExecutor | None = None
        self._expected: tuple[list[int], Future[Batch]] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Run the thread within this block. Outside, no batch is collated ahead of time."""
        with ThreadPoolExecutor(1, thread_name_prefix="collate") as self._pool:
            try:
                yield
            finally:
                self._pool = self._expected = None

    def expect(self, rows: list[int]) -> None:
        """Start to collate these rows; replaces the previous expectation."""
        self._expected = (rows, self._pool.submit(self._collate, rows)) if self._pool and rows else None

    def take(self, rows: list[int]) -> Batch:
        """Return a batch of these rows on the CPU."""
        if self._expected and self._expected[0] == rows:
            return self._expected[1].result()
        return self._collate(rows)
