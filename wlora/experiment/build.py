"""Assembly of a configured model and method. Runs, dry runs, memory estimates and benchmarks all use it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from wlora.adapters.adapter_set import count_elements
from wlora.adapters.layer import quicken_adapters
from wlora.adapters.peft_format import Start, identify_files, read_adapter
from wlora.config.identity import stream_seed
from wlora.config.schema import Config
from wlora.config.spelling import expand_home
from wlora.errors import ConfigError
from wlora.methods.base import Method, Setting, Steps
from wlora.methods.registry import build_method
from wlora.models.architectures import read_architecture
from wlora.models.discovery import layout_of
from wlora.models.fast_dropout import quicken_dropout
from wlora.models.heads import head_parameters
from wlora.models.loading import checkpoint_activations
from wlora.models.quantization import count_model
from wlora.models.targets import list_targets, select_targets
from wlora.storage.content_hash import read_as_hashed
from wlora.tasks.base import find_kind
from wlora.training.precision import Precision, lower_base
from wlora.training.sharding import shard_base

NO_START = Start({}, {})


@dataclass(frozen=True)
class Assembly:
    """A model with the adapters of a method.

    Attributes:
        model: the frozen base with adapters and head.
        method: the method, which controls the adapters.
        head: the trained parameters of head and pooler, by name; empty with `compat=release`.
    """

    model: PreTrainedModel
    method: Method
    head: dict[str, nn.Parameter]

    def count_parameters(self) -> dict[str, int]:
        """Count elements: adapters at the start, trained parameters of the base, trained head, and the bare model.

        `total` counts the elements of the model's architecture; `stored` counts packed elements of a quantised base once.
        """
        in_head = {id(p) for p in self.head.values()}
        adapters = self.method.attached().values()
        in_adapters = {id(p) for a in adapters for p in a.parameters()}
        base = [p for p in self.model.parameters() if id(p) not in in_adapters]
        total, stored = count_model(self.model, without=in_adapters)
        return {
            "adapter_initial": count_elements(adapters),
            "adapter_final": count_elements(adapters),
            "base": sum(p.numel() for p in base if p.requires_grad and id(p) not in in_head),
            "head": sum(p.numel() for p in self.head.values()),
            "total": total,
            "stored": stored,
        }


def prepare_method(config: Config, steps: Steps | None) -> Method:
    """Build the configured method and plan its schedule.

    Args:
        steps: the length of the run; None does not plan the schedule.

    Raises:
        ConfigError: the method is incompatible with the base, with `adapter.path` or with the length of the run.
    """
    method = build_method(
        config.method,
        release=config.compat == "release",
        quantized=config.model.quantization != "none",
        started=config.adapter.path is not None,
    )
    if steps is not None:
        method.plan(steps)
    return method


def assemble(
    config: Config,
    model: PreTrainedModel,
    method: Method,
    precision: Precision | None = None,
    device: torch.device | None = None,
) -> Assembly:
    """Attach a method's adapters to a frozen model and make the head trainable.

    Args:
        model: a float32 model with all parameters frozen.
        precision: the base is cast to this precision; None does not change it.
        device: the model is moved to this device; None does not move it.

    Raises:
        ConfigError: an adapter or head does not fit the model, or an adapter is outside the target set.
    """
    head = _attach(model, method, config)
    if config.train.fast_step:
        quicken_adapters(model)
        quicken_dropout(model)
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    if precision is not None:
        lower_base(model, precision)
    if device is not None:
        if config.train.fsdp:
            shard_base(model, device)
        model.to(device)
    return Assembly(model, method, head)


def _attach(model: PreTrainedModel, method: Method, config: Config) -> dict[str, nn.Parameter]:
    """Attach the adapters; return the trained parameters of head and pooler.

    With `compat=release`, head and pooler are not trained and keep their random initialisation, as in the published code.
    With `adapter.path`, only modules with an adapter in that folder get one, which starts from the stored values.
    """
    start = read_start(config)
    attach_adapters(model, method, config.method.get("targets", config.targets), seed=config.seed, start=start)
    if config.adapter.head:
        _start_head(model, start, config)
    head = {} if config.compat == "release" else head_parameters(model)
    for parameter in head.values():
        parameter.requires_grad_(True)
    return head


def attach_adapters(model: PreTrainedModel, method: Method, targets: str, *, seed: int, start: Start = NO_START) -> None:
    """Attach a method's adapters to a frozen model.

    Args:
        model: a model with all parameters frozen.
        method: the method.
        targets: the modules that get adapters, as for `select_targets`.
        seed: the run's seed; torch's generators are seeded from it.
        start: adapters to start from. If there are any, only their modules get one.
    """
    layout = layout_of(model)
    torch.manual_seed(stream_seed(seed, "adapters"))
    choice = torch.Generator().manual_seed(stream_seed(seed, "choice"))
    chosen = [target for target in select_targets(layout, targets) if not start.adapters or target.name in start.adapters]
    method.attach(model, Setting(chosen, select_targets(layout, "all"), choice, start.adapters))


def read_start(config: Config) -> Start:
    """Read the adapters and head in `adapter.path`; empty if the key is not set.

    Raises:
        ConfigError: the folder is damaged, or an adapter is outside the target set.
    """
    if config.adapter.path is None:
        return NO_START
    path = expand_home("adapter.path", config.adapter.path)
    with read_as_hashed(f"adapter.path={path}", config.adapter.fingerprint, lambda: identify_files(path)):
        start = read_adapter(path)
    head, architecture = find_kind(config.task.kind).head, read_architecture(config.model)
    targets = {target.name for target in list_targets(architecture, config.targets, head)}
    strange = sorted(set(start.adapters) - targets)
    if strange:
        raise ConfigError(
            f"adapter.path={config.adapter.path}: has an adapter on {strange[0]}, which is not among the {len(targets)} "
            f"targets={config.targets} of model={config.model.name}\nallowed is a target set with all {len(start.adapters)}"
        )
    return start


def _start_head(model: PreTrainedModel, start: Start, config: Config) -> None:
    """Initialise head and pooler from those in `adapter.path`."""
    for name, parameter in head_parameters(model).items():
        given = start.head.get(name)
        if given is None or given.shape != parameter.shape:
            there = "missing" if given is None else f"of shape {list(given.shape)}"
            raise ConfigError(
                f"adapter.head=true: {name} is {there} in {config.adapter.path}, the task asks for {list(parameter.shape)}: "
                "allowed is false, for a fresh head"
            )
        parameter.data.copy_(given)
