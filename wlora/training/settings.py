"""The inputs and results of the training loop."""

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
    """The part of the configuration that the training loop uses.

    Attributes:
        lr: peak learning rate of adapters.
        head_lr: peak learning rate of head and pooler.
        weight_decay: decoupled weight decay.
        max_grad_norm: maximum global gradient norm.
        eval_batch_size: rows of an evaluation batch.
        order_seed: seed of the data order.
        dropout_seed: seed of all random draws in forward passes; it differs between processes.
        scale_loss: whether to scale the loss for float16.
        sharded: whether the frozen base is sharded over the processes, which must then call the model together.
        autocast: dtype of the forward pass if the base itself is trained in float32; otherwise None.
        graphs: whether to record micro-batches as CUDA graphs and replay them.
        grow_batch: how to use the memory freed by a cut: `micro` enlarges the micro-batch only, `effective` also the
            number of rows per optimiser step, `off` nothing.
        best: the final adapters are those of the best evaluation by this metric; None for those of the last step.
        patience: number of evaluations without a better one after which the run stops; None for never.
        prefix: where the output of frozen lower layers is stored; None computes it in every step.
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
    """The result of computing the gradients of one optimiser step.

    Attributes:
        loss: the mean loss over the step's rows, a scalar on the device.
        seconds: this run's part of the computing time.
    """

    loss: Tensor
    seconds: float


@dataclass
class Result:
    """The result of a training, besides the trained model."""

    metrics: dict[str, float] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    examples: int = 0
    tokens: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
