"""The length of a run in optimiser steps, computed from the number of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wlora.config.schema import Config
from wlora.errors import ConfigError, wrong_value

DEFAULT_WARMUP = 100


@dataclass(frozen=True)
class Plan:
    """The length of a run.

    Attributes:
        rows: number of training features; larger than the number of rows if long texts are cut into windows.
        batch_size: features per micro-batch, over all processes.
        accumulation_steps: micro-batches per optimiser step.
        steps_per_epoch: optimiser steps of one pass over the features.
        total_steps: optimiser steps of the run.
        warmup: optimiser steps of the linear learning-rate warm-up.
        eval_every: optimiser steps between evaluations.
        checkpoint_every: optimiser steps between checkpoints.
        until: the step at which the run stops: `total_steps`, or earlier with `train.until`.
        notice: information for the user about a changed default, or "".
    """

    rows: int
    batch_size: int
    accumulation_steps: int
    steps_per_epoch: int
    total_steps: int
    warmup: int
    eval_every: int
    checkpoint_every: int
    until: int
    notice: str = ""

    def stops(self, step: int) -> bool:
        """Tell whether the run stops after a step before its end (`train.until`)."""
        return self.until <= step < self.total_steps


def step_at(share: float, total: int) -> int:
    """Return the step at which a share of a run's steps is reached: at least 1, at most `total`."""
    return min(max(1, math.ceil(share * total - 1e-9)), total)  # 0.1 * 30 is slightly more than 3 in floating point


def make_plan(config: Config, rows: int) -> Plan:
    """Compute the length of a run over `rows` training features.

    Raises:
        ConfigError: the configured warm-up or evaluation interval does not fit the run.
    """
    accumulation = config.train.accumulation_steps
    assert accumulation is not None
    per_epoch = math.ceil(math.ceil(rows / config.task.batch_size) / accumulation)
    total = config.train.max_steps or max(1, round(per_epoch * config.task.epochs))
    notice = ""
    if config.warmup is None:
        warmup = min(DEFAULT_WARMUP, total // 10)
        if warmup < DEFAULT_WARMUP:
            notice = f"warm-up shortened from {DEFAULT_WARMUP} to {warmup} steps, a tenth of the run's {total}"
    elif config.warmup >= total:
        raise wrong_value("warmup", config.warmup, f"0 to {total - 1}, as the run has {total} optimiser steps")
    else:
        warmup = config.warmup
    if config.train.eval_every is not None and config.train.eval_every > total:
        raise ConfigError(f"train.eval_every={config.train.eval_every}: allowed is 1 to {total}, the steps of the run")
    eval_every = config.train.eval_every or per_epoch
    every = config.train.checkpoint_every
    return Plan(
        rows=rows,
        batch_size=config.task.batch_size,
        accumulation_steps=accumulation,
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup=warmup,
        eval_every=eval_every,
        checkpoint_every=eval_every if every is None else every,
        until=step_at(config.train.until, total),
        notice=notice,
    )
