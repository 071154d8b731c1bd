"""ALoRA (Liu et al., 2024, arXiv 2403.16187): move components from unimportant adapters to important ones.

The name means "Allocating LoRA". PEFT's aLoRA ("Activated LoRA") is a different method.
"""

from __future__ import annotations

import torch
from torch import nn

from wlora.adapters.layer import LowRankAdapter
from wlora.errors import wrong_value
from wlora.methods.base import AdapterMethod, Event, Steps
from wlora.methods.training_data import Batch, Phase, TrainingData


class ALoRA(AdapterMethod):
    """Constant budget of components.

    In every round the n least important ones are pruned, and other adapters get n new ones.

    n is the number of adapters (the paper's n_A). A component's importance is its ablation score on one fixed batch
    held out of the training rows (never of the validation set): IS(j) = S(M) − S(M without j) + S(M with only j), with
    S = −cross-entropy and M the model with all components. The adapters that lost no component share the new ones as
    evenly as possible; the remainder goes to those with the highest mean IS. If every adapter lost a component, none is
    added. New components have random A and B = 0, so the function does not change (the paper says random). The paper's
    K₁ = 1 epoch and K₂ = 0.25 epoch are fractions of the run here.

    Args:
        rounds: N_A, rounds of allocation.
        first_share: K₁, share of the run before the first round.
        between_share: K₂, share of the run between rounds.
        held_out: number of rows of the scoring batch.
    """

    startable = True

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        rounds: int,
        first_share: float,
        between_share: float,
        held_out: int,
    ) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout)
        self.rounds, self.first_share, self.between_share, self.held_out = rounds, first_share, between_share, held_out
        if first_share + (rounds - 1) * between_share >= 1:
            raise wrong_value(
                "method.rounds",
                rounds,
                f"rounds that fit the run: {first_share} + {rounds - 1}·{between_share} is not below 1",
            )

    def plan(self, steps: Steps) -> None:
        """Determine the steps of the rounds."""
        shares = [self.first_share + index * self.between_share for index in range(self.rounds)]
        self.round_steps = sorted({max(1, int(steps.total * share)) for share in shares})

    def phases(self, data: TrainingData, steps: int) -> list[Phase]:
        """Hold one batch out of the training rows."""
        self._data = data
        self._batch, rows = data.hold_out(self.held_out, self.generator)
        return [Phase(rows, steps)]

    def final_count(self) -> None:
        """Return None: the number is known only at the end of the run."""

    def after_step(self, step: int) -> list[Event]:
        """Allocate components at the steps of the rounds."""
        if step not in self.round_steps:
            return []
        return [self.allocate(step, self.ablation_scores(self._data, self._batch))]

    def last_change(self) -> int:
        """Return the step of the last round."""
        return max(self.round_steps)

    def allocate(self, step: int, scores: dict[str, list[float]]) -> Event:
        """Prune the components with the lowest scores (n in total) and add as many to adapters that lost none."""
        moved = len(self.adapters)
        ranked = sorted((score, name, j) for name, row in scores.items() for j, score in enumerate(row))
        losers: dict[str, set[int]] = {}
        for _, name, j in ranked[:moved]:
            losers.setdefault(name, set()).add(j)
        receivers = [name for name in scores if name not in losers]
        receivers.sort(key=lambda name: -sum(scores[name]) / max(1, len(scores[name])))
        for name, gone in losers.items():
            kept = [j for j in range(self.adapters[name].rank) if j not in gone]
            if kept:
                self.adapters[name].prune(torch.tensor(kept))
            else:
                self.adapters.disconnect(name)
        added = _spread(moved, receivers, {name: _room(self.adapters[name]) for name in receivers})
        for name, count in added.items():
            adapter = self.adapters[name]
            adapter.extend(adapter.rank + count, how="gaussian", generator=self.generator, keep_moments=True)
        ranks = {name: adapter.rank for name, adapter in self.adapters.items()}
        return Event(step, "allocate", {"pruned": {n: len(g) for n, g in losers.items()}, "added": added, "ranks": ranks})

    @torch.no_grad()
    def ablation_scores(self, data: TrainingData, batch: Batch) -> dict[str, list[float]]:
        """Return IS of every component. Takes 1 + 2·(number of components) forward passes of one batch.

        The forward passes start at the component's layer, because the layers below do not depend on the component.
        """
        everything = -data.loss(batch)
        for adapter in self.adapters.values():
            adapter.gates = nn.Parameter(torch.ones(adapter.rank, device=adapter.A.device), requires_grad=False)
        scores: dict[str, list[float]] = {}
        layer = -1
        for name, adapter in self.adapters.items():
            assert adapter.gates is not None
            if layer != self.adapters.target(name).layer:
                layer = self.adapters.target(name).layer
                with_all = data.entering(layer, batch)
                self._set_gates(0.0)
                with_none = data.entering(layer, batch)
                self._set_gates(1.0)
            scores[name] = []
            for j in range(adapter.rank):
                adapter.gates.data[j] = 0
                with with_all():
                    without = -data.loss(batch)
                self._set_gates(0.0)
                adapter.gates.data[j] = 1
                with with_none():
                    alone = -data.loss(batch)
                self._set_gates(1.0)
                scores[name].append(everything - without + alone)
        for adapter in self.adapters.values():
            adapter.gates = None
        return scores

    def _set_gates(self, value: float) -> None:
        for adapter in self.adapters.values():
            if adapter.gates is not None:
                adapter.gates.data.fill_(value)


def _room(adapter: LowRankAdapter) -> int:
    """Return how many components can be added before the adapter has full rank."""
    return min(adapter.A.shape[1], adapter.B.shape[0]) - adapter.rank


def _spread(count: int, receivers: list[str], room: dict[str, int]) -> dict[str, int]:
    """Distribute components one at a time, best receiver first, among receivers that are below full rank."""
    added = dict.fromkeys(receivers, 0)
    while count and any(added[name] < room[name] for name in receivers):
        for name in receivers:
            if count and added[name] < room[name]:
                added[name] += 1
                count -= 1
    return {name: number for name, number in added.items() if number}
