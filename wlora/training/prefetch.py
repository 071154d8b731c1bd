"""Batches on their way to the device: collated in a second thread ahead of their use, and moved without a wait."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def move(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device. To a GPU it goes from pinned memory, so that the host does not wait for the copy."""
    if device.type == "cuda":
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


class Prefetcher:
    """Collates what is expected next. Other rows than expected are collated when they are asked for, so any guess is safe.

    Args:
        collate: turns row indices into a batch on the CPU; it draws no random number.
    """

    def __init__(self, collate: Callable[[list[int]], Batch]) -> None:
        self._collate = collate
        self._pool: ThreadPoolExecutor | None = None
        self._expected: tuple[list[int], Future[Batch]] | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep the thread for this block; outside of one nothing is collated ahead."""
        with ThreadPoolExecutor(1, thread_name_prefix="collate") as self._pool:
            try:
                yield
            finally:
                self._pool = self._expected = None

    def expect(self, rows: list[int]) -> None:
        """Start to collate these rows, in place of those expected before."""
        self._expected = (rows, self._pool.submit(self._collate, rows)) if self._pool and rows else None

    def take(self, rows: list[int]) -> Batch:
        """Return a batch of these rows on the CPU."""
        if self._expected and self._expected[0] == rows:
            return self._expected[1].result()
        return self._collate(rows)
