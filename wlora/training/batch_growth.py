"""Larger batches that use the memory freed by a cut (paper §3.3: larger batches after the cut)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from wlora.config.schema import Config
from wlora.console import notice
from wlora.methods.base import Event

# Maximum growth factor with `effective`, where the plan sets no limit.
LIMIT = 32


def larger_is_faster(device: torch.device) -> bool:
    """Return whether larger micro-batches take less time per row on a device. On CPUs they were measured to be slower."""
    return device.type != "cpu"


def settle_growth(config: Config, device: torch.device) -> Config:
    """Return a configuration with `train.grow_batch=off` if `micro` would be slower on this device.

    `micro` only serves speed. `effective` is kept, because it changes the number of rows per update.
    """
    if config.train.grow_batch != "micro" or larger_is_faster(device):
        return config
    notice(f"train.grow_batch=micro is off on this {device.type}, where larger micro-batches are slower")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, grow_batch="off"))


class BatchGrowth:
    """The number of planned micro-batches that are computed at once, determined by a measurement after the cut.

    Args:
        kind: `micro` keeps the rows of an optimiser step and computes them in fewer passes. `effective` combines the
            rows of several steps. `off` never grows.
        batch_size: rows of a planned micro-batch.
        accumulation_steps: micro-batches per planned step.
        device: the device; on a CPU the micro-batches of an `effective` update keep their planned size.

    Attributes:
        factor: number of planned micro-batches that are computed at once.
    """

    def __init__(self, kind: str, *, batch_size: int, accumulation_steps: int, device: torch.device) -> None:
        self.kind, self.batch_size = kind, batch_size
        self.enlarges = larger_is_faster(device)
        self.most = {"off": 1, "micro": accumulation_steps, "effective": LIMIT}[kind]
        self.factor = 1
        self.before = 0  # bytes of the longest micro-batch before the cut; 0 after the comparison

    @property
    def steps(self) -> int:
        """Number of planned optimiser steps whose rows form one update."""
        return self.factor if self.kind == "effective" else 1

    def observe(self, step: int, *, settled: bool, measure: Callable[[], int]) -> Event | None:
        """Measure at the first step, and again when the structure is final. Returns the growth as an event.

        Args:
            step: the optimiser step.
            settled: whether no further cut will happen.
            measure: returns the bytes of the longest micro-batch.
        """
        if self.kind == "off":
            return None
        if step == 1:
            self.before = measure()
            return None
        if not self.before or not settled:
            return None
        now = measure()
        self.factor = min(self.most, max(1, self.before // max(1, now)))
        details = {"bytes_before": self.before, "bytes_after": now, "growth": self.factor}
        self.before = 0
        return Event(step, "grow_batch", details | {"micro_batch": (self.factor if self.enlarges else 1) * self.batch_size})

    def regroup(self, batches: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
        """Distribute the rows of an update over as few micro-batches as fit into memory, grouped by length."""
        if self.factor == 1 or not self.enlarges:
            return batches
        rows = sorted((row for batch in batches for row in batch), key=lambda row: lengths[row])
        size = math.ceil(len(rows) / math.ceil(len(batches) / self.factor))
        return [rows[start : start + size] for start in range(0, len(rows), size)]
