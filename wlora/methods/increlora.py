"""IncreLoRA (Zhang et al., 2023, arXiv 2308.12043): every adapter starts at rank 1; important adapters are extended."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from wlora.adapters.layer import LowRankAdapter
from wlora.adapters.variants import GrowingAdapter
from wlora.distributed import mean
from wlora.errors import ConfigError, wrong_value
from wlora.methods.base import AdapterMethod, Event, Setting, Steps
from wlora.methods.importance import Importance, orthogonality
from wlora.methods.parameter_groups import ParameterGroup

INIT_STD = 0.02
RESERVE_GATE = 1e-5
# Without `top_h`, the number of adapters per growth event is chosen so that the growth ends at this share of the run.
GROWN_BY = 0.65


class IncreLoRA(AdapterMethod):
    """h = W x + s_i · B diag(λ) A x. Every ν steps the h adapters with the highest scores get more components.

    With M = ΔW, each step computes Σ|M ∘ ∂L/∂M| / √(elements of M). An adapter's score is the sensitivity of this value
    times its uncertainty. During the growth this takes one matrix product d_out×rows×d_in per adapter and step.

    Each adapter has reserve components with fixed gates of 1e-5, whose A and B already train ("advance learning"). When
    an adapter grows, the gates of its reserve become trainable, and a new reserve is created. Components that are added
    later have their own learning-rate schedule, with the same warm-up length as the run ("multi_lr"). s_i = alpha /
    rank of adapter i, so s_i falls when the adapter grows. This changes the function slightly, in the authors' code as
    well.

    The total number of components ends at exactly n·`rank`: the last adapter to grow gets only the remainder. (The
    authors' code tests for equality, which fails if the total skips that number.) Then the reserves leave the model,
    which is equivalent to setting their gates to zero.

    Args:
        rank: mean rank per adapter at the end.
        start_steps: no growth up to and including this step; None means `every`.
        every: ν; None means 0.03 of the run, at least 1.
        top_h: h; None means as many as needed to finish at 0.65 of the run.
        add_rank: components per growth; None means half of `rank`, the authors' choice.
        beta1: decay of the sensitivity.
        beta2: decay of the uncertainty.
        orthogonal: weight of the orthogonality penalty on A and B.
    """

    planned_first = True

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        start_steps: int | None,
        every: int | None,
        top_h: int | None,
        add_rank: int | None,
        beta1: float,
        beta2: float,
        orthogonal: float,
    ) -> None:
        super().__init__(rank=1, alpha=alpha, dropout=dropout)
        self.target_rank = rank
        self.start_steps, self.every, self.top_h = start_steps, every, top_h
        self.add_rank = max(1, rank // 2) if add_rank is None else add_rank
        self.orthogonal = orthogonal
        self.importance = Importance(beta1, beta2)

    def plan(self, steps: Steps) -> None:
        """Determine the steps at which adapters grow: multiples of ν above `start_steps`."""
        self.interval = max(1, round(0.03 * steps.total)) if self.every is None else self.every
        start = self.interval if self.start_steps is None else self.start_steps
        self.growth_steps = [step for step in range(self.interval, steps.total, self.interval) if step > start]
        self.total_steps = steps.total

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach adapters of rank 1 with their first reserves.

        Raises:
            ConfigError: the run is too short to grow n·`rank` components.
        """
        super().attach(model, setting)
        self.components = {name: a for name, a in self.adapters.items() if isinstance(a, GrowingAdapter)}
        # Start steps of the learning-rate schedules: when each part was created, and when its gates became trainable.
        self._came: dict[nn.Module, int] = {}
        self._acts: dict[nn.Module, int] = {}
        for adapter in self.components.values():
            self._came[adapter] = self._acts[adapter] = 0
        self.target = len(self.components) * self.target_rank
        self.heads = self._adapters_per_growth()
        if self.total_rank() < self.target:
            for adapter in self.components.values():
                self._draw_reserve(adapter, done=0)

    def make_adapter(self, d_in: int, d_out: int, device: torch.device) -> LowRankAdapter:
        """Build an adapter of rank 1 that records the gradient of its ΔW.

        Raises:
            ConfigError: the final rank exceeds the smaller dimension.
        """
        if self.target_rank > min(d_in, d_out):
            raise wrong_value("rank", self.target_rank, f"1 to {min(d_in, d_out)}, the width of the adapted linear")
        adapter = GrowingAdapter(
            d_in, d_out, rank=1, std=INIT_STD, scale=self.alpha / (1 + 1e-5), dropout=self.dropout, device=device
        )
        adapter.watching = self.target_rank > 1
        return adapter

    def last_change(self) -> int:
        """Return the step of the last growth."""
        return max(self.growth_steps, default=0)

    def final_count(self) -> tuple[int, int]:
        """Return the bounds for n·`rank` components."""
        costs = [adapter.A.shape[1] + adapter.B.shape[0] for adapter in self.components.values()]
        return self.target * min(costs), self.target * max(costs)

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return A, B and the trainable gates, grouped by the step at which their schedule begins."""
        starts: defaultdict[int, list[nn.Parameter]] = defaultdict(list)
        for adapter in self.components.values():
            for part in adapter.parts:
                starts[self._came[part]] += [part.A, part.B]
                if part.gates is not None and part.gates.requires_grad:
                    starts[self._acts[part]].append(part.gates)
        return [ParameterGroup(parameters, lr, start=start) for start, parameters in sorted(starts.items())]

    def extra_loss(self) -> Tensor | None:
        """Return the weighted mean orthogonality penalty of A's rows and B's columns, including the reserves."""
        joined = [adapter.joined() for adapter in self.components.values()]
        return self.orthogonal * orthogonality([m for A, B, _ in joined for m in (A, B.T)])

    def forget_backward(self) -> None:
        """Discard the gradients of ΔW."""
        for adapter in self.components.values():
            adapter.weight_gradient = None

    def unscale_backward(self, scale: float) -> None:
        """Divide the gradients of ΔW by the loss scale. Otherwise the moving averages would mix different scales."""
        for adapter in self.components.values():
            if adapter.weight_gradient is not None:
                adapter.weight_gradient /= scale

    def total_rank(self) -> int:
        """Return the number of active components, over all adapters."""
        return sum(adapter.rank for adapter in self.components.values())

    def before_step(self, step: int) -> list[Event]:
        """Update the scores, and grow the best adapters at the growth steps."""
        if self.total_rank() >= self.target:
            return []
        self.update_scores()
        return [self.grow(step)] if step in self.growth_steps else []

    @torch.no_grad()
    def update_scores(self) -> None:
        """Update the scores with Σ|M ∘ ∂L/∂M| / √(elements of M) of every adapter, M = ΔW."""
        for name, adapter in self.components.items():
            gradient, adapter.weight_gradient = adapter.weight_gradient, None
            if gradient is not None:
                gradient = mean(gradient)  # unlike parameter gradients, it is not averaged over the processes yet
                value = (adapter.delta_weight() * gradient).abs().sum() / math.sqrt(gradient.numel())
                self.importance.update(name, value)

    def grow(self, step: int) -> Event:
        """Activate the reserves of the h best adapters and create new ones. At the target, remove all reserves."""
        able = [name for name, adapter in self.components.items() if adapter.reserve is not None]
        best = sorted(able, key=lambda name: -float(self.importance.score(name)))[: self.heads]
        done = step - 1  # the schedule of the new parts begins with this very step
        for name in best:
            adapter, left = self.components[name], self.target - self.total_rank()
            reserve = adapter.reserve
            if left > 0 and reserve is not None:
                adapter.activate(min(left, reserve.rank))
                self._acts[reserve] = done
                adapter.scale = self.alpha / (adapter.rank + 1e-5)
                self._draw_reserve(adapter, done=done)
        if self.total_rank() >= self.target:
            for adapter in self.components.values():
                if adapter.reserve is not None:
                    del self._came[adapter.reserve]
                adapter.drop_reserve()
                adapter.watching = False
        return Event(step, "grow", {"ranks": {name: adapter.rank for name, adapter in self.components.items()}})

    def _draw_reserve(self, adapter: GrowingAdapter, *, done: int) -> None:
        """Add reserve components to an adapter, unless it has full rank."""
        room = min(adapter.A.shape[1], adapter.B.shape[0]) - adapter.rank
        if room:
            adapter.add_reserve(min(self.add_rank, room), gate=RESERVE_GATE, generator=self.generator)
            self._came[adapter.parts[-1]] = done

    def _adapters_per_growth(self) -> int:
        """Return h, and check that the growth can end within the run.

        Raises:
            ConfigError: the run is too short.
        """
        missing = math.ceil((self.target - self.total_rank()) / self.add_rank)
        if self.top_h is not None:
            needed = math.ceil(missing / self.top_h)
            if needed > len(self.growth_steps):
                raise ConfigError(
                    f"method.top_h={self.top_h}: {missing} growths take {needed} events, {len(self.growth_steps)} fit "
                    f"the run's {self.total_steps} optimiser steps (every {self.interval})"
                )
            return self.top_h
        events = sum(step <= GROWN_BY * self.total_steps for step in self.growth_steps)
        if missing > events * len(self.components):
            raise ConfigError(
                f"rank={self.target_rank}: {missing} growths do not fit {events} events of {len(self.components)} adapters "
                f"within 0.65 of the run's {self.total_steps} optimiser steps; allowed is a longer run or a larger "
                "method.add_rank"
            )
        return math.ceil(missing / max(1, events))
