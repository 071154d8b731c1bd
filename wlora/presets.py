"""`method.preset`: values that a method's authors published, as they stand under `presets` in the method's YAML.

A preset has values for `all` tasks and, beside them, for single tasks, by the full keys of the configuration; `source`
says where they are from and `left_out` what has no key here. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from wlora.errors import wrong_value

TEXTS = ("source", "left_out")


def explicit_keys(overrides: Iterable[str]) -> set[str]:
    """Return the keys that words of the command line name: `lr` of `lr=1e-3`, `task` of `task=rte`."""
    return {word.lstrip("+~").partition("=")[0] for word in overrides}


def apply_preset(composed: DictConfig, overrides: Iterable[str]) -> dict[str, Any]:
    """Replace defaults by the values of `method.preset`, in place; a key that an override names stays as it is.

    Works on the composed configuration before its interpolations are resolved, so that `${alpha}` follows `alpha`, and
    sets `method.preset` to null: from here on the run is the one with the same values spelled out.

    Args:
        composed: the configuration as Hydra composes it.
        overrides: the words of the command line, or of one run of a sweep.

    Returns:
        What was set, by key.

    Raises:
        ConfigError: the method has no such preset, or the preset no values for the task.
    """
    name = composed.method.get("preset")
    if name is None:
        return {}
    values = _find_values(composed, str(name))
    explicit = explicit_keys(overrides)
    if "task.epochs" in explicit:
        explicit.add("train.max_steps")  # which would overrule the epochs asked for
    chosen = {key: value for key, value in values.items() if key not in explicit}
    for key, value in chosen.items():
        OmegaConf.update(composed, key, value)
    composed.method.preset = None
    return chosen


def _find_values(composed: DictConfig, name: str) -> dict[str, Any]:
    """Return a preset's values for the composed task; those of the task go before those of all."""
    method, task = composed.method.name, composed.task.name
    presets: Any = OmegaConf.to_container(composed.method.get("presets") or OmegaConf.create())
    if name not in presets:
        allowed = f"{' | '.join(presets)} or null" if presets else "null"
        raise wrong_value("method.preset", name, f"{allowed} with method={method}")
    by_task = {key: values for key, values in presets[name].items() if key not in TEXTS}
    values = dict(by_task.pop("all", {}))
    if by_task and task not in by_task:
        raise wrong_value("method.preset", f"{name} task={task}", f"task={','.join(sorted(by_task))} with method={method}")
    return {**values, **by_task.get(task, {})}
