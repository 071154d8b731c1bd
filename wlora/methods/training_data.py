"""Access to training rows and losses for methods that need more than the hooks: held-out loss, gradients, phases."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from wlora.distributed import mean
from wlora.errors import ConfigError
from wlora.models.discovery import layout_of
from wlora.models.prefix_forward import Prefix

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """A part of the run that draws its batches from a subset of the training rows.

    Attributes:
        rows: indices of training rows.
        steps: length of the phase in optimiser steps.
    """

    rows: Sequence[int]
    steps: int


class TrainingData:
    """The model under training, and batches of any training rows.

    In a multi-process run every process evaluates the same rows. Results are averaged over the processes, so that all
    processes make the same decision.

    Args:
        model: the model that is trained.
        labels: the label of every training row; None if rows do not have a single label.
        lengths: number of tokens of every training row.
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
        """Precompute the layers below `layer` in evaluation mode.

        Args:
            layer: first layer that is not precomputed, counted from 0 over all stacks. All layers of a decoder count as
                the first one after the encoder, because each of them needs the encoder's output.

        Returns:
            A function that makes a context manager. Inside it, the model's forward pass starts from the stored states.
            For a family whose layers cannot be skipped (`Prefix.reproduces`), it runs from the beginning.
        """
        depth = min(layer, len(layout_of(self.model).stacks[0].layers))
        if depth == 0:
            return contextlib.nullcontext
        prefix = Prefix(self.model, depth)
        if not prefix.reproduces(batch):
            return contextlib.nullcontext
        states = prefix.compute(batch)
        return lambda: prefix.replaced(states)

    def gradients(self, batch: Batch, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Return the gradients of a batch's mean loss in evaluation mode. `.grad` of the parameters does not change."""
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
        """Switch dropout off temporarily and restore the previous mode afterwards. No random numbers are drawn."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def sample(self, count: int, generator: torch.Generator) -> list[int]:
        """Draw row indices without replacement; stratified by label if rows have labels."""
        order = torch.randperm(self.rows, generator=generator).tolist()
        if self.labels is None:
            return order[:count]
        by_label: dict[float, list[int]] = {}
        for row in order:
            by_label.setdefault(self.labels[row], []).append(row)
        # Stratification: the k-th row of a label gets the sort key (k + ½) / (rows of the label), which interleaves the
        # labels in proportion.
        placed = [((k + 0.5) / len(group), row) for group in by_label.values() for k, row in enumerate(group)]
        return [row for _, row in sorted(placed, key=lambda pair: pair[0])[:count]]

    def hold_out(self, count: int, generator: torch.Generator) -> tuple[Batch, list[int]]:
        """Hold out `count` random training rows. Returns them as one batch, and the remaining row indices for training.

        Raises:
            ConfigError: no rows would remain for training.
        """
        if count >= self.rows:
            raise ConfigError(f"method.held_out={count}: allowed is 1 to {self.rows - 1}, of {self.rows} training rows")
        held_out = set(rows := self.sample(count, generator))
        return self._collate(rows), [row for row in range(self.rows) if row not in held_out]
