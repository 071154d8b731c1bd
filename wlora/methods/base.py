"""The interface of all methods: the hooks that the training loop calls, and their base classes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wlora.adapters.adapter_set import AdapterSet, count_elements
from wlora.adapters.layer import Adapter, LowRankAdapter
from wlora.adapters.peft_format import Factors, describe_lora
from wlora.errors import ConfigError
from wlora.methods.parameter_groups import ParameterGroup
from wlora.methods.training_data import Phase, TrainingData
from wlora.models.linears import is_transposed
from wlora.models.targets import Target


@dataclass(frozen=True)
class Steps:
    """The length of a run in optimiser steps."""

    total: int
    per_epoch: int


@dataclass(frozen=True)
class Setting:
    """The model and the run, as a method sees them when it attaches its adapters.

    Attributes:
        targets: the modules that may carry adapters, lowest layer first.
        universe: all linear modules of the layers (target set `all`), in the same order.
        generator: the run's random generator, on the CPU.
        start: initial adapter factors by module name (`adapter.path`). They replace the method's own initialisation.
    """

    targets: list[Target]
    universe: list[Target] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)
    start: Mapping[str, Factors] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """A structural change of the adapters. The run's record lists all events in order.

    `reset=True` also discards all optimiser state.
    """

    step: int
    kind: str
    details: dict[str, Any] = field(default_factory=dict)
    reset: bool = False

    @property
    def finite(self) -> bool:
        """Whether all numbers in `details` are finite, as strict JSON requires."""
        try:
            json.dumps(self.details, allow_nan=False)
        except ValueError:
            return False
        return True


class Method:
    """A training method: which parameters train, and when adapters are added, extended or removed.

    The training loop calls, in this order: `plan` (before any weights are loaded), `attach`, `phases` and `groups`. In
    every optimiser step it calls `before_step` (gradients are computed and clipped, parameters are not yet updated) and
    `after_step` (parameters are updated, gradients are still available). If one of these two hooks returns events, the
    structure has changed, and the loop rebuilds its optimiser groups. Steps are counted from 1.

    Attributes:
        release_adamw: whether to train with the AdamW of the paper's published code (ε = 1e-6) instead of torch's.
        released: whether `compat=release` is available for this method.
        plain_base: whether the method reads or changes the weights of the base model. Such a method is not available
            for quantised models.
        startable: whether the adapters can start from given adapters of any rank (`Setting.start`).
        packable: whether runs can train in a pack (`wlora.training.pack`): all adapters are `LowRankAdapter`s, and the
            method acts between steps only, on parameters and their gradients.
        planned_first: whether `attach` needs the schedule (`plan`).
        adapters: the adapters in the model.
        base_parameters: parameters of the model's body that train; empty except for full fine-tuning.
    """

    release_adamw = False
    released = True
    plain_base = False
    startable = False
    packable = False
    planned_first = False

    def plan(self, steps: Steps) -> None:
        """Compute the method's schedule. Raises ConfigError if a value from the configuration does not fit the run."""

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach the adapters to the model. All parameters of the model are frozen when this is called."""
        self.adapters = AdapterSet(model)
        self.generator = setting.generator
        self.base_parameters: list[nn.Parameter] = []

    def phases(self, data: TrainingData, steps: int) -> list[Phase]:
        """Return the training rows that each phase of the run draws from. A method may also store `data` for later use."""
        return [Phase(range(data.rows), steps)]

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return the parameter groups to train besides the head, given the run's peak learning rate."""
        matrices = [p for a in self.adapters.values() for p in (a.A, a.B)]
        return [ParameterGroup([*self.base_parameters, *matrices], lr)]

    def extra_loss(self) -> Tensor | None:
        """Return a scalar that is added to the loss once per optimiser step, or None."""
        return None

    def forget_backward(self) -> None:
        """Discard what the backward passes stored besides gradients.

        Called when the step is repeated, and when its float16 gradients overflowed.
        """

    def unscale_backward(self, scale: float) -> None:
        """Divide what the backward passes stored besides gradients by the float16 loss scale."""

    def before_step(self, step: int) -> list[Event]:
        """Act on the gradients before the optimiser uses them. Returns the structural changes."""
        return []

    def after_step(self, step: int) -> list[Event]:
        """Act after the optimiser's step. Returns the structural changes."""
        return []

    def settled(self, step: int) -> bool:
        """Return whether the method makes no more changes and takes no more actions after this step."""
        return False

    def last_change(self) -> int:
        """Return the step of the last change of the adapters that the schedule plans; 0 if it plans none.

        Earlier evaluations do not count for `train.best` and `train.patience`.
        """
        return 0

    def final_count(self) -> tuple[int, int] | None:
        """Return the smallest and the largest possible number of adapter elements after the last change.

        Callable once the adapters are attached. None if the number is known only at the end of the run. Adapters may
        also leave for other reasons (ω ≤ 0), which these bounds do not cover.
        """
        count = count_elements(self.attached().values())
        return count, count

    def attached(self) -> Mapping[str, Adapter]:
        """Return every adapter in the model, by module name."""
        return self.adapters

    def kept(self) -> dict[str, Adapter]:
        """Return the adapters that take part in the forward pass, by module name."""
        return dict(self.attached())

    def factors(self) -> dict[str, Factors]:
        """Return every active adapter as a plain LoRA adapter for the pretrained weight, by module name."""
        kept = {name: adapter for name, adapter in self.kept().items() if isinstance(adapter, LowRankAdapter)}
        return {name: Factors(*adapter.factors(), adapter.scale) for name, adapter in kept.items()}

    def to_peft(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return configuration and weights of the adapters in PEFT's format; None without adapters."""
        factors = self.factors()
        dropout = next((adapter.dropout for adapter in self.adapters.values()), 0.0)
        transposed = all(is_transposed(self.adapters.base(name)) for name in factors)
        return describe_lora(factors, dropout=dropout, transposed=transposed) if factors else None

    def fold(self) -> None:
        """Merge every adapter into its base weight and remove it. The result is a plain model, and the method ends.

        The weights of the base must be floating-point at this point.
        """
        for name in self.adapters:
            self.adapters.fold(name)


class AdapterMethod(Method):
    """A method that starts with one plain LoRA adapter of rank `rank` on every target (Hu et al., 2021).

    Args:
        rank: components per adapter.
        alpha: numerator of the scale s = alpha / rank.
        dropout: dropout probability on the adapter's input.
    """

    omega: float | None = None

    def __init__(self, *, rank: int, alpha: float, dropout: float) -> None:
        self.rank, self.alpha, self.dropout = rank, alpha, dropout

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Attach an adapter to every target."""
        super().attach(model, setting)
        for target in setting.targets:
            adapter = self.adapters.attach(target, self.make_adapter)
            if target.name in setting.start:
                _start(target.name, adapter, setting.start[target.name])

    def make_adapter(self, d_in: int, d_out: int, device: torch.device) -> LowRankAdapter:
        """Build one adapter for a linear module with a weight of shape [d_out, d_in].

        Raises:
            ConfigError: the rank exceeds the smaller dimension, so the adapter would not be low-rank.
        """
        self.check_rank(d_in, d_out)
        return LowRankAdapter(
            d_in,
            d_out,
            rank=self.rank,
            scale=self.alpha / self.rank,
            dropout=self.dropout,
            omega=self.omega,
            device=device,
        )

    def check_rank(self, d_in: int, d_out: int) -> None:
        """Check that the adapter is low-rank.

        Raises:
            ConfigError: the rank exceeds the smaller dimension.
        """
        if self.rank > min(d_in, d_out):
            raise ConfigError(f"rank={self.rank}: allowed is 1 to {min(d_in, d_out)}, the width of the adapted linear")


def bound_sum(costs: Iterable[int], count: int) -> tuple[int, int]:
    """Return the smallest and the largest sum of `count` of the given numbers."""
    ordered = sorted(costs)
    return sum(ordered[:count]), sum(ordered[len(ordered) - min(count, len(ordered)) :])


def _start(name: str, adapter: LowRankAdapter, factors: Factors) -> None:
    try:
        adapter.start_from(*factors)
    except ValueError as error:
        raise ConfigError(f"adapter.path: the adapter on {name} {error}: allowed is one of the same model") from None
