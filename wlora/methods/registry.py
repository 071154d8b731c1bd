"""One file per policy: when adapters are cut, grown or drawn, which, and how many."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from wlora.config.schema import config_folder
from wlora.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from wlora.methods.base import Method


def build_method(
    settings: dict[str, Any], *, release: bool = False, quantized: bool = False, started: bool = False
) -> Method:
    """Build the policy that a `conf/method/<name>.yaml` describes.

    The class is the one `Method` defined in `wlora/methods/<name>.py`; its arguments are the YAML's keys (`name` and
    `targets` aside, which the runner reads). `release` stands for `compat=release`, `quantized` for a base whose
    weights are packed, `started` for adapters that start from given ones (`adapter.path`).

    Raises:
        ConfigError: there is no such policy, or it has other keys; it reads or changes the weights of the base, and they are
            packed; its adapters cannot start from others.
    """
    from wlora.methods.base import Method
    from wlora.methods.release import RELEASES

    known = [file.stem for file in (config_folder() / "method").glob("*.yaml")]
    if settings["name"] not in known:
        raise unknown_name(f"method.name={settings['name']}", str(settings["name"]), known)
    module = importlib.import_module(f"wlora.methods.{settings['name']}")
    (policy,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if quantized and policy.plain_base:
        raise ConfigError(
            f"method={settings['name']}: reads or trains the base's own weights: allowed is model.quantization=none"
        )
    if started and not policy.startable:
        raise ConfigError(
            f"method={settings['name']}: its adapters have a start of their own: allowed with adapter.path is "
            "lora, wlora, wlora_plus, wlora_depth, rlora, alora, lora_drop"
        )
    given = {key: value for key, value in settings.items() if key not in ("name", "targets", "revision")}
    if release:
        if not policy.released:
            raise ConfigError(f"method={settings['name']} compat=release: allowed is compat=paper")
        policy = RELEASES.get(policy, policy)
    try:
        return policy(**given)
    except TypeError as error:
        raise ConfigError(f"method={settings['name']}: {error}") from None
