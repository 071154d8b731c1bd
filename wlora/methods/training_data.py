"""What the loop offers a policy beyond the hooks: training rows on demand, and in which order they are drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wlora.distributed import mean
from wlora.errors import ConfigError
from wlora.models.architectures import FAMILIES
from wlora.models.prefix_forward import Prefix

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """A stretch of the run that draws its batches from some of the training rows.

    Attributes:
        rows: indices of training rows.
        steps: optimiser steps.
    """

    rows: Sequence[int]
    steps: int


class Bench:
    """The model under training, and batches of any training rows.

    With several processes each computes the same, on its own; the mean over them is what all decide by.

    Args:
        model: the model, as it is trained.
        labels: the label of every training row, or None where a row has no single one.
        lengths: tokens of every training row.
        collate: turns row indices into a batch on the model's device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        lengths: Sequence[int],
        labels: list[float] | None,
        collate: Callable[[Sequence[int]], Batch],
    ) -> None:
        self.model, self.rows, self.lengths, self.labels, self._collate = model, len(lengths), lengths, labels, collate

    def batches(self, rows: Sequence[int], batch_size: int) -> Iterator[Batch]:
        """Yield batches of the given rows, in their order."""
        for start in range(0, len(rows), batch_size):
            yield self._collate(rows[start : start + batch_size])

    def by_length(self, rows: Sequence[int]) -> list[int]:
        """Return the given rows sorted by length, so that batches of them hold little padding."""
        return sorted(rows, key=lambda row: self.lengths[row])

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """Return the mean loss of a batch in evaluation mode."""
        with self.evaluation_mode():
            return float(mean(self.model(**batch).loss))

    def entering(self, layer: int, batch: Batch) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Compute what enters a layer in evaluation mode; in a block of the result the model goes on from there.

        Args:
            layer: counted from 0 over all stacks; the layers of a decoder are all entered after the whole encoder.
        """
        first, *_ = FAMILIES[self.model.config.model_type]
        depth = min(layer, len(self.model.get_submodule(first.prefix)))  # type: ignore[arg-type]
        if depth == 0:
            return contextlib.nullcontext
        prefix = Prefix(self.model, depth)
        states = prefix.compute(batch)
        return lambda: prefix.replaced(states)

    def gradients(self, batch: Batch, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Return the gradients of a batch's mean loss in evaluation mode; `grad` of no parameter is touched."""
        with self.evaluation_mode():
            trained = [p.requires_grad for p in parameters]
            for p in parameters:
                p.requires_grad_(True)
            found = torch.autograd.grad(self.model(**batch).loss, parameters)
            for p, before in zip(parameters, trained, strict=True):
                p.requires_grad_(before)
        return [mean(gradient) for gradient in found]

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Switch dropout off for a while: the mode after it is that before, and no random number is drawn."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def sample(self, count: int, generator: torch.Generator) -> list[int]:
        """Draw row indices without replacement, with about the labels' proportions where rows have labels."""
        order = torch.randperm(self.rows, generator=generator).tolist()
        if self.labels is None:
            return order[:count]
        by_label: dict[float, list[int]] = {}
        for row in order:
            by_label.setdefault(self.labels[row], []).append(row)
        # The k-th row of each label stands at (k + ½) / size: sorting by that interleaves labels in proportion.
        placed = [((k + 0.5) / len(group), row) for group in by_label.values() for k, row in enumerate(group)]
        return [row for _, row in sorted(placed, key=lambda pair: pair[0])[:count]]

    def hold_out(self, count: int, generator: torch.Generator) -> tuple[Batch, list[int]]:
        """Split a batch of `count` rows off the training rows; returns it and the rows that are left to train on.

        Raises:
            ConfigError: nothing would be left.
        """
        if count >= self.rows:
            raise ConfigError(f"method.held_out={count}: allowed is 1 to {self.rows - 1}, of {self.rows} training rows")
        held_out = set(rows := self.sample(count, generator))
        return self._collate(rows), [row for row in range(self.rows) if row not in held_out]
