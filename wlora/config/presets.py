"""`method.preset` and `task.preset`: published hyperparameters, listed under `presets` in the YAML file of a method or task.

A preset maps full configuration keys to values. The section `all` always applies. Sections for single tasks (in a method's
preset) or single methods (in a task's preset) override it. `source` names the publication, and `left_out` lists published
settings that have no key here or are not set. This module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from wlora.errors import unknown_name, wrong_value

TEXTS = ("source", "left_out")
KEYED_BY = {"task": "method", "method": "task"}
"""Groups with presets, and the group that selects their sections. The method's preset overrides the task's."""


def explicit_keys(overrides: Iterable[str]) -> set[str]:
    """Return the keys that command-line arguments set: `lr` for `lr=1e-3`, `task` for `task=rte`."""
    return {word.lstrip("+~").partition("=")[0] for word in overrides}


def apply_presets(composed: DictConfig, overrides: Iterable[str]) -> dict[str, Any]:
    """Replace default values by those of `task.preset` and `method.preset`, in place.

    Keys set by an override are not changed. This function must run before interpolations are resolved, so that `${alpha}`
    follows `alpha`. Afterwards both preset keys are null: the run is identical to one with the same values given explicitly.

    Args:
        composed: the configuration composed by Hydra.
        overrides: the command-line arguments, or those of one run of a sweep.

    Returns:
        The values that were set, by full key.

    Raises:
        ConfigError: the task or method has no such preset, the method's preset has no values for this task, or an override
            tries to change the content of a preset.
    """
    explicit = explicit_keys(overrides)
    for key in sorted(explicit):
        if re.match(r"(task|method)\.presets\b", key):
            raise unknown_name(key, key, [f"{group}.preset" for group in KEYED_BY])
    values: dict[str, Any] = {}
    for group in KEYED_BY:
        name = composed[group].get("preset")
        if name is not None:
            values |= _find_values(composed, group, str(name))
            composed[group].preset = None
    if "task.epochs" in explicit:
        explicit.add("train.max_steps")  # a preset's max_steps would override the requested epochs
    chosen = {key: value for key, value in values.items() if key not in explicit}
    for key, value in chosen.items():
        OmegaConf.update(composed, key, value)
    return chosen


def _find_values(composed: DictConfig, group: str, name: str) -> dict[str, Any]:
    """Return the values of a group's preset for the composed task and method.

    If a method's preset has sections for single tasks, any other task is an error. A task's preset applies to every method.
    """
    other = KEYED_BY[group]
    owner, chosen = composed[group].name, composed[other].name
    presets: Any = OmegaConf.to_container(composed[group].get("presets") or OmegaConf.create())
    if name not in presets:
        allowed = f"{' | '.join(presets)} or null" if presets else "null"
        raise wrong_value(f"{group}.preset", name, f"{allowed} with {group}={owner}")
    single = {key: values for key, values in presets[name].items() if key not in TEXTS}
    values = dict(single.pop("all", {}))
    if group == "method" and single and chosen not in single:
        raise wrong_value("method.preset", f"{name} task={chosen}", f"task={','.join(sorted(single))} with method={owner}")
    return {**values, **single.get(chosen, {})}
