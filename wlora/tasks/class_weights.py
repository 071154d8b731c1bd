"""Weights of classes in the training loss (`task.class_weights`)."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def balance_classes(labels: Sequence[int], classes: int) -> list[float]:
    """Return a weight per class that is inversely proportional to its frequency, with mean 1 over the rows.

    A class without rows has weight 0. This is `class_weight="balanced"` of scikit-learn for the classes that occur.
    """
    counts = Counter(labels)
    return [len(labels) / (len(counts) * counts[number]) if number in counts else 0.0 for number in range(classes)]


def class_losses(logits: Tensor, labels: Tensor, weights: Sequence[float] | None) -> Tensor:
    """Return the cross-entropy of each row times the weight of its class, [rows].

    Args:
        logits: shape [rows, classes].
        labels: class indices, int64 [rows].
        weights: the weight of each class; None for equal ones.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    if weights is None:
        return losses
    return losses * _as_tensor(tuple(weights), losses.dtype, losses.device)[labels]


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # it may be used for a backward pass later
def _as_tensor(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return weights as a tensor: created on the CPU, without a synchronisation with the GPU, and once for all steps."""
    return torch.tensor(weights, dtype=dtype).to(device, non_blocking=True)
