"""The best evaluation of a run (`train.best`) and early stopping (`train.patience`). Both are off by default."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from wlora.methods.base import Event, Method
from wlora.training.state import State

_PREFIX = "best/"
T = TypeVar("T")


class Best:
    """Remembers the best evaluation of a run and, if requested, the trained parameters at that moment.

    Evaluations before the method's last change (`Method.last_change`) do not count, because the set of adapters is not
    final. A later evaluation with an equal score is not better.

    Args:
        metric: a metric or `loss`; the trained parameters of its best evaluation are kept. None keeps nothing.
        patience: number of consecutive evaluations without a better one after which the run stops; None for never.
        primary: the metric that counts for `patience` if `metric` is None.

    Attributes:
        step: the step of the best evaluation; None if none has counted yet.
        score: its score, to be maximised (minus the loss).
    """

    def __init__(self, metric: str | None, patience: int | None, primary: str) -> None:
        self.metric, self.patience = metric or primary, patience
        self.keeps = metric is not None
        self.step: int | None = None
        self.score = 0.0
        self._since = 0  # evaluations since the best one
        self._tensors: dict[str, Tensor] = {}  # on the CPU

    @property
    def exhausted(self) -> bool:
        """Whether the run must stop."""
        return self.patience is not None and self._since >= self.patience

    def until_exhausted(self, updates: Iterator[T]) -> Iterator[T]:
        """Yield the updates of a run until it must stop."""
        for update in updates:
            if self.exhausted:
                return
            yield update

    def observe(self, step: int, metrics: dict[str, float], model: nn.Module, method: Method) -> None:
        """Process the evaluation after a step. If it is the best so far, keep the trained parameters."""
        if step < method.last_change():
            return
        score = -metrics["loss"] if self.metric == "loss" else metrics[self.metric]
        if self.step is not None and score <= self.score:
            self._since += 1
            return
        self.step, self.score, self._since = step, score, 0
        if self.keeps:
            self._tensors = {name: value.detach().to("cpu", copy=True) for name, value in _trained(model, method).items()}

    @torch.no_grad()
    def put_back(self, step: int, model: nn.Module, method: Method) -> bool:
        """Restore the trained parameters of the best evaluation.

        Args:
            step: the current step. If its evaluation is the best, nothing changes.
            model: the model, with the adapters that it had at the best evaluation.
            method: the method.

        Returns:
            Whether the parameters were changed.
        """
        if not self.keeps or self.step in (None, step):
            return False
        for name, value in _trained(model, method).items():
            value.copy_(self._tensors[name])
        return True

    def events(self, step: int, total: int) -> list[Event]:
        """Return the events for the record: an early stop before step `total`, and the evaluation that was kept."""
        stopped = [Event(step, "stopped", {"patience": self.patience})] if self.exhausted and step < total else []
        kept = [Event(self.step, "best", {"metric": self.metric})] if self.keeps and self.step is not None else []
        return [*kept, *stopped]

    def save(self, state: State) -> None:
        """Add the best evaluation to the state of a run."""
        state.facts["best"] = {"step": self.step, "score": self.score, "since": self._since}
        state.tensors |= {f"{_PREFIX}{name}": value for name, value in self._tensors.items()}

    def load(self, state: State) -> None:
        """Restore the best evaluation from a state. States of earlier versions do not contain it."""
        if "best" in state.facts:
            facts = state.facts["best"]
            self.step, self.score, self._since = facts["step"], facts["score"], facts["since"]
        own = {name.removeprefix(_PREFIX): value for name, value in state.tensors.items() if name.startswith(_PREFIX)}
        self._tensors = {name: value.to("cpu", copy=True) for name, value in own.items()}


def _trained(model: nn.Module, method: Method) -> dict[str, Tensor]:
    """Return all tensors by name that training may change: trained parameters, and those of adapters (ω, gates)."""
    adapters = {id(p) for adapter in method.adapters.values() for p in [*adapter.parameters(), *adapter.buffers()]}
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: value for name, value in named if value.requires_grad or id(value) in adapters}
