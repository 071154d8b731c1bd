"""What a policy may decide, and when it is asked."""

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
from wlora.methods.training_data import Bench, Phase
from wlora.models.architectures import Target


@dataclass(frozen=True)
class Steps:
    """The length of a run in optimiser steps."""

    total: int
    per_epoch: int


@dataclass(frozen=True)
class Setting:
    """What a policy is told about the model and the run when it attaches its adapters.

    Attributes:
        targets: the modules that may carry adapters, lowest layer first.
        universe: all linears of the layers (target set `all`), in the same order.
        generator: the run's stream of random choices, on the CPU.
        start: what adapters start from in place of an initialisation, by module name (`adapter.path`).
    """

    targets: list[Target]
    universe: list[Target] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)
    start: Mapping[str, Factors] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """A structural change of the adapters: the timeline of these stands in the record.

    `reset` also drops all optimiser state.
    """

    step: int
    kind: str
    details: dict[str, Any] = field(default_factory=dict)
    reset: bool = False

    @property
    def finite(self) -> bool:
        """Whether all its numbers are finite, which strict JSON asks for."""
        try:
            json.dumps(self.details, allow_nan=False)
        except ValueError:
            return False
        return True


class Method:
    """A policy over the adapters of one run.

    The loop calls, in this order: `plan` (before any weights are loaded), `attach`, `phases`, `groups`, then per optimiser
    step `before_step` (gradients are there, already clipped; parameters not yet updated) and `after_step`
    (updated; gradients still there). A list of events returned by a hook means that the structure changed and makes
    the loop rebuild its optimiser groups. Steps are counted from 1.

    Attributes:
        release_adamw: whether to train with the release's own AdamW (ε 1e-6) in place of torch's.
        released: whether there is something for `compat=release` to reproduce.
        plain_base: whether the policy reads or changes the base's own weights, which a quantised one has not.
        startable: whether its adapters may start from given ones, of any rank (`Setting.start`).
        adapters: the adapters in the model.
        base_parameters: parameters of the body that train; empty but for full fine-tuning.
    """

    release_adamw = False
    released = True
    plain_base = False
    startable = False

    def plan(self, steps: Steps) -> None:
        """Fix the policy's schedule; raises ConfigError if an explicit value does not fit the run."""

    def attach(self, model: nn.Module, setting: Setting) -> None:
        """Put the adapters into the model, whose parameters are all frozen when this is called."""
        self.adapters = AdapterSet(model)
        self.generator = setting.generator
        self.base_parameters: list[nn.Parameter] = []

    def phases(self, bench: Bench, steps: int) -> list[Phase]:
        """Say from which training rows the run's steps are drawn; also the place to keep the bench for later."""
        return [Phase(range(bench.rows), steps)]

    def groups(self, lr: float) -> list[ParameterGroup]:
        """Return what to train besides the head, given the run's peak learning rate."""
        matrices = [p for a in self.adapters.values() for p in (a.A, a.B)]
        return [ParameterGroup([*self.base_parameters, *matrices], lr)]

    def extra_loss(self) -> Tensor | None:
        """Return a scalar that is added once per optimiser step to the mean loss over its rows."""
        return None

    def forget_backward(self) -> None:
        """Drop what backward passes have left besides gradients: a step is tried again, or had gradients that overflow."""

    def unscale_backward(self, scale: float) -> None:
        """Divide what backward passes have left besides gradients by the factor of the loss in float16."""

    def before_step(self, step: int) -> list[Event]:
        """Act on gradients before the optimiser uses them."""
        return []

    def after_step(self, step: int) -> list[Event]:
        """Act after the optimiser's step."""
        return []

    def settled(self, step: int) -> bool:
        """Tell whether the structure stays as it is after this step, and the policy acts at no later one."""
        return False

    def final_count(self) -> tuple[int, int] | None:
        """Return the least and the most elements of its adapters after the last change; None where only the run decides.

        Known once the adapters are attached. Some may leave besides, such as those whose ω is not positive.
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
        """Return every adapter that acts as a plain LoRA adapter beside the pretrained weight, by module name."""
        kept = {name: adapter for name, adapter in self.kept().items() if isinstance(adapter, LowRankAdapter)}
        return {name: Factors(*adapter.factors(), adapter.scale) for name, adapter in kept.items()}

    def to_peft(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return the adapters as the PEFT library describes and names them; None without any."""
        factors = self.factors()
        dropout = next((adapter.dropout for adapter in self.adapters.values()), 0.0)
        return describe_lora(factors, dropout=dropout) if factors else None

    def fold(self) -> None:
        """Add every adapter to the weight beside it and take it out: the end of the policy, whose model is a plain one.

        The base is a plain floating-point one by now.
        """
        for name in self.adapters:
            self.adapters.fold(name)


class AdapterMethod(Method):
    """A policy that starts from one plain LoRA adapter of `rank` on every target (Hu et al., 2021).

    Args:
        rank: components per adapter.
        alpha: numerator of the scale s = alpha / rank.
        dropout: probability of dropping an input element of an adapter.
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
        """Build one adapter for a d_out×d_in linear.

        Raises:
            ConfigError: the rank exceeds the smaller width, so that the adapter would not be low-rank.
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
        """Refuse a rank that exceeds the smaller width, so that the adapter would not be low-rank."""
        if self.rank > min(d_in, d_out):
            raise ConfigError(f"rank={self.rank}: allowed is 1 to {min(d_in, d_out)}, the width of the adapted linear")


def bound_sum(costs: Iterable[int], count: int) -> tuple[int, int]:
    """Return the least and the largest sum of `count` of the given numbers."""
    ordered = sorted(costs)
    return sum(ordered[:count]), sum(ordered[len(ordered) - min(count, len(ordered)) :])


def _start(name: str, adapter: LowRankAdapter, factors: Factors) -> None:
    try:
        adapter.start_from(*factors)
    except ValueError as error:
        raise ConfigError(f"adapter.path: the adapter on {name} {error}: allowed is one of the same model") from None
