"""The state of a run between two steps as named tensors and JSON, and how to restore it.

Everything that can be rebuilt from the configuration is left out: the frozen base, the data, the plan. Methods need no
code for this: their attributes are packed as they are. References to parameters and modules are stored as names in the
model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wlora.adapters.adapter_set import AdapterSet
from wlora.adapters.serialization import describe_adapters, rebuild_adapters
from wlora.distributed import gather
from wlora.methods.base import Method
from wlora.methods.importance import Importance
from wlora.methods.parameter_groups import ParameterGroup
from wlora.methods.peft_backed import PeftAdapter
from wlora.methods.training_data import TrainingData
from wlora.training.optimizers import Optimizers

# Attributes of a method that are recreated when it is attached, and have no state of their own.
_BUILT_AGAIN = (AdapterSet, TrainingData, PeftAdapter)
_PLAIN = (bool, int, float, str, type(None))


@dataclass
class State:
    """The state from which a run resumes. `facts` is JSON; `tensors` contains the tensors that `facts` refers to."""

    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def capture(model: nn.Module, method: Method, optimizers: Optimizers) -> State:
    """Collect adapters, trained parameters, the method's attributes, optimiser state and random-generator states.

    Except for the generator states, the result is the same in every process.
    """
    state = State()
    names: dict[Tensor, str] = {value: name for name, value in [*model.named_parameters(), *model.named_buffers()]}
    state.facts["adapters"] = describe_adapters(method.adapters, names)
    kept = {p for adapter in method.adapters.values() for p in [*adapter.parameters(), *adapter.buffers()]}
    trained = {p for p in model.parameters() if p.requires_grad}
    state.tensors |= {f"model/{names[value]}": value.detach() for value in kept | trained}
    state.facts["trained"] = sorted(names[p] for p in trained - kept)

    packer = _Packer(state.tensors, names, {module: name for name, module in model.named_modules()})
    state.facts["method"] = {key: packer.pack(value, f"method/{key}") for key, value in vars(method).items()}
    state.facts["optimizers"] = packer.pack(optimizers.state(names), "optimizers")
    streams = gather(random_streams())
    state.facts["random"] = packer.pack(streams[0], "random")
    state.facts["random_of_others"] = packer.pack(streams[1:], "random_of_others")
    return state


def restore(
    state: State,
    model: nn.Module,
    method: Method,
    optimizers: Optimizers,
    groups: Callable[[], list[ParameterGroup]],
    *,
    process: int = 0,
) -> None:
    """Restore a model with newly attached adapters, its method and its optimisers from a state.

    Args:
        state: the state.
        model: the model with newly attached adapters.
        method: the method, attached to the model.
        optimizers: the run's optimisers.
        groups: returns the parameter groups; called after the structure is restored.
        process: index of the process whose random-generator states are used. If the state has none for it, the
            generators do not change.

    Raises:
        KeyError: the state belongs to another model or method.
        ValueError: a tensor's shape differs from that of its parameter.
    """
    device = next(model.parameters()).device
    values = {name.removeprefix("model/"): value.to(device) for name, value in state.tensors.items()}
    rebuild_adapters(method.adapters, state.facts["adapters"], values)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in state.facts["trained"]:
            if parameters[name].shape != values[name].shape:
                raise ValueError(f"{name}: {tuple(values[name].shape)} in the state, {tuple(parameters[name].shape)} here")
            parameters[name].copy_(values[name])
    modules = dict(model.named_modules())
    unpacker = _Unpacker(state.tensors, {**parameters, **dict(model.named_buffers())}, modules, device)
    for key, packed in state.facts["method"].items():
        setattr(method, key, unpacker.unpack(packed, getattr(method, key, None)))
    optimizers.rebuild(groups())
    optimizers.load(unpacker.unpack(state.facts["optimizers"], None), parameters)
    streams = [state.facts["random"], *state.facts.get("random_of_others", [])]
    if process < len(streams):
        set_random_streams(_Unpacker(state.tensors, {}, {}, torch.device("cpu")).unpack(streams[process], None))


def random_streams() -> list[Tensor]:
    """Return the states of torch's random generators: the CPU's, then (if available) this process's GPU's."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def set_random_streams(states: list[Tensor]) -> None:
    """Set the states of torch's random generators. The GPU's is set only if both the state and this machine have one."""
    cpu, *cuda = states
    torch.set_rng_state(cpu)
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda[0])


class _Packer:
    """Turns nested values into JSON. Values that JSON cannot represent become {"is": kind, ...}."""

    def __init__(self, tensors: dict[str, Tensor], names: Mapping[Tensor, str], modules: Mapping[nn.Module, str]) -> None:
        self.tensors, self.names, self.modules = tensors, names, modules

    def pack(self, value: Any, path: str) -> Any:
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, _BUILT_AGAIN):
            return {"is": "built again"}
        if isinstance(value, Tensor):
            if value in self.names:
                return {"is": "of the model", "name": self.names[value]}
            return self._tensor(value.detach(), path)
        if isinstance(value, torch.Generator):
            return {"is": "generator", "state": self._tensor(value.get_state(), path)}
        if isinstance(value, nn.Module):
            return {"is": "module", "name": self.modules[value]}
        if isinstance(value, list):
            return [self.pack(item, f"{path}/{index}") for index, item in enumerate(value)]
        if isinstance(value, tuple):
            return {"is": "tuple", "items": self.pack(list(value), path)}
        if isinstance(value, dict):
            return {
                "is": "dict",
                "keys": self.pack(list(value), f"{path}/keys"),
                "values": self.pack(list(value.values()), path),
            }
        if isinstance(value, torch.optim.Optimizer):
            return {"is": "optimizer", "state": self.pack(value.state_dict(), path)}
        if isinstance(value, Importance):
            return {"is": "object", "state": self.pack(vars(value), path)}
        raise TypeError(f"{path}: a {type(value).__name__} cannot be part of a state")

    def _tensor(self, value: Tensor, path: str) -> dict[str, str]:
        self.tensors[path] = value
        return {"is": "tensor", "key": path}


class _Unpacker:
    """Restores packed values. Objects that are referenced elsewhere are updated in place."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        modules: Mapping[str, nn.Module],
        device: torch.device,
    ) -> None:
        self.tensors, self.values, self.modules, self.device = tensors, values, modules, device

    def unpack(self, packed: Any, present: Any) -> Any:
        if isinstance(packed, list):
            return [self.unpack(item, None) for item in packed]
        if not isinstance(packed, dict):
            return packed
        match packed["is"]:
            case "built again":
                return present
            case "of the model":
                return self.values[packed["name"]]
            case "module":
                return self.modules[packed["name"]]
            case "tuple":
                return tuple(self.unpack(packed["items"], None))
            case "dict":
                keys = self.unpack(packed["keys"], None)
                before = present if isinstance(present, dict) else {}
                return {k: self.unpack(v, before.get(k)) for k, v in zip(keys, packed["values"], strict=True)}
            case "tensor":
                value = self.tensors[packed["key"]].to(self.device)
                if isinstance(present, nn.Parameter):
                    present.data.copy_(value)
                    return present
                return value.clone()
            case "generator":
                present.set_state(self.tensors[packed["state"]["key"]].cpu())
            case "optimizer":
                present.load_state_dict(self.unpack(packed["state"], None))
            case "object":
                vars(present).update(self.unpack(packed["state"], vars(present)))
        return present
