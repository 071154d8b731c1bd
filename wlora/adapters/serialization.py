"""Save the structure of a model's adapters as plain data, and rebuild it: connected adapters, parameters and gates.

Parameters are referred to by their names in the model. A parameter that several adapters share has one name, so that it
is shared again after rebuilding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from wlora.adapters.adapter_set import AdapterSet
from wlora.adapters.layer import LowRankAdapter


def describe_adapters(adapters: AdapterSet, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Describe every connected adapter, by the name of the adapted module.

    Args:
        adapters: the connected adapters.
        names: the name of every parameter and buffer in the model.
    """
    described: dict[str, Any] = {}
    first: dict[nn.Module, str] = {}
    for name, adapter in adapters.items():
        shared_with = first.setdefault(adapter, name)
        described[name] = _describe(adapter, names) if shared_with == name else {"shared_with": shared_with}
    return described


def rebuild_adapters(adapters: AdapterSet, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Change newly attached adapters to a described structure. All their parameters become new objects.

    Args:
        adapters: the adapters as the method attaches them.
        described: the result of `describe_adapters`.
        tensors: the values of parameters and buffers, by name.

    Raises:
        KeyError: the description has an adapter that the method does not attach, or a parameter without a value.
    """
    made: dict[str, nn.Parameter] = {}
    for name in set(adapters) - set(described):
        adapters.disconnect(name)
    for name, content in described.items():
        if "shared_with" in content:
            adapters.replace(name, adapters[content["shared_with"]])
        else:
            _rebuild(adapters[name], content, tensors, made)


def _describe(module: nn.Module, names: Mapping[Tensor, str]) -> dict[str, Any]:
    return {
        "parameters": {
            key: {"name": names[p], "trains": p.requires_grad} for key, p in module.named_parameters(recurse=False)
        },
        "buffers": {key: names[buffer] for key, buffer in module.named_buffers(recurse=False)},
        "settings": {
            key: value
            for key, value in vars(module).items()
            if not key.startswith("_") and key != "training" and isinstance(value, bool | int | float | str | None)
        },
        "children": {key: _describe(child, names) for key, child in module.named_children()},
    }


def _rebuild(
    module: nn.Module, content: Mapping[str, Any], tensors: Mapping[str, Tensor], made: dict[str, nn.Parameter]
) -> None:
    for key in {key for key, _ in module.named_parameters(recurse=False)} - set(content["parameters"]):
        setattr(module, key, None)
    for key, value in content["settings"].items():
        setattr(module, key, value)
    for key, told in content["parameters"].items():
        name = told["name"]
        if name not in made:
            made[name] = nn.Parameter(tensors[name].clone(), told["trains"])
        setattr(module, key, made[name])
    for key, name in content["buffers"].items():
        setattr(module, key, tensors[name].clone())
    for key in [key for key, _ in module.named_children() if key not in content["children"]]:
        delattr(module, key)
    for key, child in content["children"].items():
        if not hasattr(module, key):
            module.add_module(key, LowRankAdapter(1, 1, rank=1, scale=1.0))
        _rebuild(module.get_submodule(key), child, tensors, made)
