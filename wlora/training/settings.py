"""What the training loop is given, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from wlora.data.features import Features
from wlora.methods.base import Event
from wlora.training.evaluation import Split
from wlora.training.prefix_cache import Storage


@dataclass
class Data:
    """Training features, and every validation split by name."""

    train: Features
    validation: dict[str, Split]


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know of the configuration.

    Attributes:
        lr: peak learning rate of adapters.
        head_lr: peak learning rate of head and pooler.
        weight_decay: decoupled decay.
        max_grad_norm: bound of the global gradient norm.
        eval_batch_size: rows of an evaluation batch.
        order_seed: seed of the data order.
        dropout_seed: seed of everything drawn in the forward passes, another one in each process.
        scale_loss: float16 loss scaling.
        sharded: the frozen base is spread over the processes, which must all call the model together.
        autocast: dtype of the forward pass where the base itself trains and stays float32, else None.
        graphs: record micro-batches as CUDA graphs and replay them.
        grow_batch: what grows into the memory that a cut has freed: `micro` for the micro-batch alone, `effective` for the
            rows of an optimiser step, too; `off` for nothing.
        best: metric whose best evaluation decides the final adapters, None for the last step.
        patience: evaluations without a better one before the run stops, None for never.
        prefix: where the output of layers that no longer change is stored; None computes it in every step.
    """

    lr: float
    head_lr: float
    weight_decay: float
    max_grad_norm: float
    eval_batch_size: int
    order_seed: int
    dropout_seed: int
    scale_loss: bool = False
    sharded: bool = False
    autocast: torch.dtype | None = None
    graphs: bool = False
    grow_batch: str = "off"
    best: str | None = None
    patience: int | None = None
    prefix: Storage | None = None


class Computed(NamedTuple):
    """The gradients of one optimiser step have been computed.

    Attributes:
        loss: the mean loss over the step's rows, a scalar on the device.
        seconds: what this run's part of the computation took.
    """

    loss: Tensor
    seconds: float


@dataclass
class Result:
    """What a training leaves behind, besides the trained model."""

    metrics: dict[str, float] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    examples: int = 0
    tokens: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
