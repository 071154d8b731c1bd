"""The optimisers of a run: AdamW for adapters and head, plain SGD for ω, rebuilt when the adapters' structure changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from wlora.adapters.derivation import take_origin
from wlora.methods.parameter_groups import ParameterGroup


class ReleaseAdamW(Optimizer):
    """AdamW as in the paper's published code.

    It differs from torch's AdamW: ε is added before the bias correction of v, and the decoupled weight decay follows
    the step instead of preceding it. So the two are not equal, even with the same ε.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = closure() if closure else None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                m, v, t = state["exp_avg"], state["exp_avg_sq"], state["step"]
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                size = group["lr"] * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
                p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-size)
                p.add_(p, alpha=-group["lr"] * group["weight_decay"])
        return loss


class Optimizers:
    """All optimisers of one run behind one interface.

    Args:
        groups: parameter groups; see `rebuild`.
        weight_decay: decoupled weight decay of the AdamW groups.
        release: use the AdamW of the published code (ε = 1e-6) instead of torch's (ε = 1e-8).
    """

    def __init__(self, groups: list[ParameterGroup], *, weight_decay: float, release: bool = False) -> None:
        self._weight_decay = weight_decay
        self._release = release
        self._rules: dict[str, Optimizer] = {}
        self._rate: Callable[[dict[str, Any]], float] = lambda group: group["peak"]
        self.groups: list[ParameterGroup] = []
        self.rebuild(groups)

    def rebuild(self, groups: list[ParameterGroup]) -> None:
        """Use new groups after a structural change.

        A parameter that existed before keeps its moments and step count. A pruned or extended parameter inherits them
        from its original (`wlora.adapters.derivation`). A new parameter starts with zero moments. The state of removed
        parameters is dropped. The last `set_schedule` or `scale` also holds for the new groups, because a method may change
        its structure between it and the step.
        """
        state = {p: s for optimizer in self._rules.values() for p, s in optimizer.state.items()}
        for p in (p for group in groups for p in group.parameters):
            _inherit(state, p)
        for group in groups:
            # An adapter that several modules share occurs once per module.
            group.parameters = [p for p in dict.fromkeys(group.parameters) if p.requires_grad]
        self.groups = [group for group in groups if group.parameters]
        self._rules = {}
        for rule in sorted({group.rule for group in self.groups}):
            described = [_describe(group) for group in self.groups if group.rule == rule]
            optimizer = self._make(rule, described)
            for p in (p for group in described for p in group["params"] if p in state):
                optimizer.state[p] = state[p]
            self._rules[rule] = optimizer
        self._set_rates(self._rate)

    def forget(self) -> None:
        """Discard all moments and step counts."""
        for optimizer in self._rules.values():
            optimizer.state.clear()

    def state(self, names: Mapping[Tensor, str]) -> dict[str, dict[str, Any]]:
        """Return moments and step counts by parameter name."""
        states = {p: s for optimizer in self._rules.values() for p, s in optimizer.state.items()}
        return {names[p]: dict(s) for p, s in states.items()}

    def load(self, state: Mapping[str, dict[str, Any]], parameters: Mapping[str, nn.Parameter]) -> None:
        """Load moments and step counts. Call `rebuild` with the corresponding groups first."""
        rules = {p: rule for rule in self._rules.values() for group in rule.param_groups for p in group["params"]}
        self.forget()
        for name, values in state.items():
            rules[parameters[name]].state[parameters[name]] = values

    def set_schedule(self, step: int, *, warmup: int, total: int) -> None:
        """Set the learning rate of every scheduled group after `step` of `total` completed steps."""

        def rate(group: dict[str, Any]) -> float:
            done, rest = step - group["start"], total - group["start"]
            return float(group["peak"]) * (linear_schedule(done, warmup=warmup, total=rest) if group["scheduled"] else 1.0)

        self._set_rates(rate)

    def scale(self, factor: float) -> None:
        """Set the learning rate of every scheduled group to a share of its peak, in place of `set_schedule`."""
        self._set_rates(lambda group: float(group["peak"]) * (factor if group["scheduled"] else 1.0))

    def _set_rates(self, rate: Callable[[dict[str, Any]], float]) -> None:
        self._rate = rate
        for group in (group for optimizer in self._rules.values() for group in optimizer.param_groups):
            group["lr"] = rate(group)

    def step(self) -> None:
        """Update all parameters that have gradients. The gradients must be unscaled and clipped.

        `GradScaler.step` is not used: it would unscale a second time if the optimisers were rebuilt after `unscale`.
        """
        for optimizer in self._rules.values():
            optimizer.step()

    def unscale(self, scaler: torch.amp.GradScaler) -> bool:
        """Divide all gradients by the loss scale. Returns whether all of them are finite."""
        for optimizer in self._rules.values():
            scaler.unscale_(optimizer)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        return math.isfinite(float(torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)))

    def clip(self, max_norm: float) -> Tensor:
        """Scale the clipped groups' gradients to a global norm of at most `max_norm`. Returns the norm before."""
        parameters = [p for group in self.groups if group.clipped for p in group.parameters]
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def zero_grad(self) -> None:
        """Free all gradients."""
        for optimizer in self._rules.values():
            optimizer.zero_grad(set_to_none=True)

    def parameters(self) -> list[nn.Parameter]:
        """Return every parameter that is updated."""
        return [p for group in self.groups for p in group.parameters]

    def check(self, model: nn.Module) -> None:
        """Assert that the same parameters require gradients, have gradients and are in an optimiser.

        This check would have detected the frozen head of the published code.
        """
        updated = {id(p) for p in self.parameters()}
        for name, parameter in model.named_parameters():
            state = (parameter.requires_grad, parameter.grad is not None, id(parameter) in updated)
            if len(set(state)) > 1:
                raise AssertionError(
                    f"{name}: requires_grad={state[0]}, has a gradient={state[1]}, is in an optimiser={state[2]}"
                )

    def holds_state(self, parameter: nn.Parameter) -> bool:
        """Return whether any optimiser still has state for a parameter."""
        return any(parameter in optimizer.state for optimizer in self._rules.values())

    def _make(self, rule: str, described: list[dict[str, Any]]) -> Optimizer:
        if rule == "sgd":
            return SGD(described, lr=0.0, foreach=True)  # one operation for the ω of all adapters
        if self._release:
            return ReleaseAdamW(described, weight_decay=self._weight_decay)
        fused = all(p.is_floating_point() for group in described for p in group["params"])
        return AdamW(described, weight_decay=self._weight_decay, fused=fused)


def _inherit(state: dict[Any, dict[str, Any]], derived: nn.Parameter) -> None:
    """Transfer the still valid part of the original parameter's moments to a derived parameter."""
    origin = take_origin(derived)
    if origin is None:
        return
    parent, carry = origin
    _inherit(state, parent)  # the original may itself be derived in the same change
    if parent in state:
        moments = state[parent].items()
        same = [key for key, value in moments if isinstance(value, Tensor) and value.shape == parent.shape]
        state[derived] = {key: carry(key, value).clone() if key in same else value for key, value in moments}


def _describe(group: ParameterGroup) -> dict[str, Any]:
    schedule = {"peak": group.lr, "scheduled": group.scheduled, "start": group.start}
    return {"params": group.parameters, "lr": group.lr, **schedule}


def linear_schedule(step: int, *, warmup: int, total: int) -> float:
    """Return the learning-rate factor after `step` completed steps: linear warm-up, then linear decay to 0."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))
