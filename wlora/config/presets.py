"""`method.preset` and `task.preset`: published values, as they stand under `presets` in the YAML of a method or task.

A preset has values for `all` and, before these, for single tasks (a method's preset) or single methods (a task's), by the
full keys of the configuration; `source` says where they are from and `left_out` what has no key here, or is not set.
Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from wlora.errors import unknown_name, wrong_value

TEXTS = ("source", "left_out")
KEYED_BY = {"task": "method", "method": "task"}
"""The groups that have presets, and by which other group their values differ. Of two presets the method's wins."""


def explicit_keys(overrides: Iterable[str]) -> set[str]:
    """Return the keys that words of the command line name: `lr` of `lr=1e-3`, `task` of `task=rte`."""
    return {word.lstrip("+~").partition("=")[0] for word in overrides}


def apply_presets(composed: DictConfig, overrides: Iterable[str]) -> dict[str, Any]:
    """Replace defaults by the values of `task.preset` and `method.preset`, in place.

    A key that an override names stays as it is. Works on the composed configuration before its interpolations are
    resolved, so that `${alpha}` follows `alpha`, and sets both keys to null: from here on the run is the one with the same
    values spelled out.

    Args:
        composed: the configuration as Hydra composes it.
        overrides: the words of the command line, or of one run of a sweep.

    Returns:
        What was set, by key.

    Raises:
        ConfigError: the task or method has no such preset, or the method's preset no values for the task; or an override
            would change what a preset is.
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
        explicit.add("train.max_steps")  # which would overrule the epochs asked for
    chosen = {key: value for key, value in values.items() if key not in explicit}
    for key, value in chosen.items():
        OmegaConf.update(composed, key, value)
    return chosen


def _find_values(composed: DictConfig, group: str, name: str) -> dict[str, Any]:
    """Return the values of a group's preset for the composed task and method.

    A method's preset that has values for single tasks is refused for any other task. A task's holds for every method.
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
