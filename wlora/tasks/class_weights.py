"""Weights of classes in the training loss (`task.class_weights`)."""

from __future__ import annotations

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
    # Created on the CPU, so that no synchronisation with the GPU is needed.
    return losses * torch.tensor(weights, dtype=losses.dtype).to(losses.device, non_blocking=True)[labels]
