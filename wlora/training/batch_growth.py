"""Batches that grow into the memory that a cut has freed (paper, section 3.3: larger batches after the cut)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from wlora.config.schema import Config
from wlora.console import notice
from wlora.methods.base import Event

# Micro-batches at once with `effective`, where the plan sets no bound.
LIMIT = 32


def larger_is_faster(device: torch.device) -> bool:
    """Tell whether a device computes larger micro-batches faster per row; on CPUs they were measured to be slower."""
    return device.type != "cpu"


def settle_growth(config: Config, device: torch.device) -> Config:
    """Return a configuration whose `train.grow_batch` is `off` where `micro`, which is for speed alone, would be slower.

    `effective` stays: it decides how many rows an update takes.
    """
    if config.train.grow_batch != "micro" or larger_is_faster(device):
        return config
    notice(f"train.grow_batch=micro is off on this {device.type}, where larger micro-batches are slower")
    return dataclasses.replace(config, train=dataclasses.replace(config.train, grow_batch="off"))


class BatchGrowth:
    """How many of the plan's micro-batches are computed at once, which a measurement after the cut decides.

    Args:
        kind: `micro` keeps the rows of an optimiser step and takes fewer passes over them, `effective` takes the rows of
            several steps at once; `off` never grows.
        batch_size: rows of a micro-batch of the plan.
        accumulation_steps: micro-batches of a step of the plan.
        device: where they are computed; on a CPU the micro-batches of an `effective` update stay as large as planned.

    Attributes:
        factor: micro-batches at once.
    """

    def __init__(self, kind: str, *, batch_size: int, accumulation_steps: int, device: torch.device) -> None:
        self.kind, self.batch_size = kind, batch_size
        self.enlarges = larger_is_faster(device)
        self.most = {"off": 1, "micro": accumulation_steps, "effective": LIMIT}[kind]
        self.factor = 1
        self.before = 0  # bytes of the longest micro-batch before the cut, until they have been compared

    @property
    def steps(self) -> int:
        """Optimiser steps of the plan whose rows make one update."""
        return self.factor if self.kind == "effective" else 1

    def observe(self, step: int, *, settled: bool, measure: Callable[[], int]) -> Event | None:
        """Measure at the first step, and once more when the structure is settled; returns what has grown then.

        Args:
            settled: no cut is to come.
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
        """Put the rows of an update into as few micro-batches as the memory takes, similar lengths together."""
        if self.factor == 1 or not self.enlarges:
            return batches
        rows = sorted((row for batch in batches for row in batch), key=lambda row: lengths[row])
        size = math.ceil(len(rows) / math.ceil(len(batches) / self.factor))
        return [rows[start : start + size] for start in range(0, len(rows), size)]
