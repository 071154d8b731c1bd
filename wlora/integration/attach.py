"""`wlora.attach`: attach a method's adapters to a model in your own training script."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import PreTrainedModel

from wlora.adapters.layer import AdaptedLinear
from wlora.config.rules import RULES, check
from wlora.config.schema import method_names, read_method
from wlora.errors import ConfigError, unknown_name, wrong_value
from wlora.experiment.build import Assembly, attach_adapters
from wlora.experiment.resolve import check_method, count_adapters, default_k
from wlora.integration.handle import Handle
from wlora.methods.base import Steps
from wlora.methods.registry import build_method
from wlora.models.discovery import layout_of
from wlora.models.heads import head_parameters
from wlora.models.layout import FAMILIES
from wlora.training.precision import raise_head


def attach(
    model: PreTrainedModel,
    method: str = "wlora",
    *,
    targets: str | Sequence[str] = "qkv",
    rank: int = 8,
    alpha: float = 32.0,
    dropout: float = 0.05,
    k: int | None = None,
    steps: int | None = None,
    steps_per_epoch: int | None = None,
    seed: int = 0,
    head: bool = True,
    **options: Any,
) -> Handle:
    """Freeze a model, attach a method's adapters to it, and make its head trainable.

    The defaults are those of the command line, so that equal values give the same adapters as a run. The state of torch's
    random generators does not change. A method that does not use `k`, `rank`, `alpha` or `dropout` ignores it.

    Args:
        model: a transformers model of any family. It is changed in place and keeps its device and dtype; a trained head is
            in float32.
        method: a name of `conf/method/` (docs/methods.md gives the paper of each).
        targets: the linear modules with adapters: `qkv`, `attention`, `all`, or names of modules, with `*` for anything.
        rank: r of every adapter: A has the shape [r, d_in] and B the shape [d_out, r] (Hu et al., 2021).
        alpha: the scale of an adapter is alpha / rank.
        dropout: dropout probability on the input of an adapter.
        k: adapters to keep (WeightLoRA, section 3.3); None means 5 of at most 48 adapters, else 20.
        steps: optimiser steps of the whole training; needed here only by `increlora`, else by `Handle.begin`.
        steps_per_epoch: optimiser steps of one pass over the data; None means `steps`.
        seed: seed of A and of the method's random draws, like the key `seed` of a run.
        head: whether head and pooler are trained, too.
        options: the method's own keys, such as `select_steps=50` (`wlora run method=wlora --help` lists them).

    Raises:
        ConfigError: a method or key is unknown, a value is wrong, targets match nothing, or the model has adapters.
    """
    _check_model(model)
    settings = _settings(
        model, method, {"targets": targets, "rank": rank, "alpha": alpha, "dropout": dropout, "k": k}, options
    )
    policy = build_method(settings, quantized=bool(getattr(model, "is_quantized", False)))
    length = None if steps is None else Steps(steps, steps_per_epoch or steps)
    if length is not None:
        policy.plan(length)
    elif policy.planned_first:
        raise ConfigError(f"method={method}: steps is missing: its adapters depend on the optimiser steps of the training")
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})):
        attach_adapters(model, policy, settings.get("targets", "all"), seed=seed)
    _average_micro_batches(model)
    if head and model.dtype != torch.float32:
        raise_head(model)  # transformers loads a checkpoint in the precision in which it is stored
    trained = head_parameters(model) if head else {}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return Handle(Assembly(model, policy, trained), method, length)


def _average_micro_batches(model: PreTrainedModel) -> None:
    """Let transformers' Trainer average the gradients of accumulated micro-batches, if the loss is a mean over its batch.

    The Trainer adds them if the model's forward pass takes any keyword. The SGD of ω is not invariant to their scale.
    """
    if not model.can_generate():
        model.accepts_loss_kwargs = False


def _settings(model: PreTrainedModel, method: str, shared: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return a method's keys with the given values, and with defaults of its YAML file and of the model for the others.

    Args:
        model: the plain model.
        method: the name of the method.
        shared: values of the keys that several methods have.
        options: values of the method's own keys.

    Raises:
        ConfigError: a method or key is unknown, a value is wrong, or targets match nothing.
    """
    if method not in method_names():
        raise unknown_name(f"method={method}", method, method_names())
    if elsewhere := next((name for name in options if name in signature(Handle.begin).parameters), None):
        raise ConfigError(f"{elsewhere}: is no argument of wlora.attach: allowed is handle.begin(..., {elsewhere}=...)")
    given = shared["targets"]
    targets = check("targets", given if isinstance(given, str) else list(given), RULES["targets"])
    content = {**shared, "targets": targets, "method": {**read_method(method), **options, "name": method}}
    resolved: Any = OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    settings: dict[str, Any] = resolved["method"]
    if "targets" in settings:
        n = count_adapters(layout_of(model), targets, key="targets", model=model.config.model_type)
        if "k" in settings:
            k = default_k(method, n) if settings["k"] is None else settings["k"]
            settings["k"] = check("k", k, f"int >= 1, <= {n}")
    check_method(settings)
    return settings


def _check_model(model: nn.Module) -> None:
    """Raise an error for objects other than transformers models, and for models that already have adapters."""
    if not isinstance(model, PreTrainedModel):
        raise wrong_value("model", type(model).__name__, "a model of transformers, without PEFT's wrapper around it")
    if model.config.model_type in FAMILIES and model.base_model is model:
        raise wrong_value("model", type(model).__name__, "a model with a head, such as one for sequence classification")
    taken = next((name for name, part in model.named_modules() if isinstance(part, AdaptedLinear)), None)
    if taken or getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(f"model={type(model).__name__}: has adapters already ({taken or 'PEFT'}): allowed is a plain one")
