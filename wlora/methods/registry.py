"""Build a method from its configuration. Each method has its own module in this package."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from wlora.config.schema import method_names
from wlora.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from wlora.methods.base import Method


def method_class(name: str) -> type[Method]:
    """Return the class of a method: the only subclass of `Method` that its module defines."""
    from wlora.methods.base import Method

    module = importlib.import_module(f"wlora.methods.{name}")
    (policy,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    return policy


def build_method(
    settings: dict[str, Any], *, release: bool = False, quantized: bool = False, started: bool = False
) -> Method:
    """Build the method that `conf/method/<name>.yaml` describes.

    The class is the only subclass of `Method` defined in `wlora/methods/<name>.py`. Its arguments are the keys of the
    YAML file, except `name` and `targets`, which the runner reads.

    Args:
        settings: the keys of the YAML file.
        release: `compat=release`.
        quantized: the base model is quantised.
        started: the adapters start from given ones (`adapter.path`).

    Raises:
        ConfigError: the method does not exist or has other keys; the base is quantised and the method reads or changes
            its weights; the method cannot start from given adapters.
    """
    from wlora.methods.release import RELEASES

    if settings["name"] not in method_names():
        raise unknown_name(f"method.name={settings['name']}", str(settings["name"]), method_names())
    policy = method_class(settings["name"])
    if quantized and policy.plain_base:
        raise ConfigError(
            f"method={settings['name']}: reads or trains the base's own weights: allowed is model.quantization=none"
        )
    if started and not policy.startable:
        raise ConfigError(
            f"method={settings['name']}: its adapters have their own initialisation: allowed with adapter.path is "
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
