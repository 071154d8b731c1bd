"""The identity of a run: a hash of all that decides its numbers, and of nothing else."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any

from omegaconf import OmegaConf

from wlora.config.schema import Config, ModelConfig, TaskConfig, TrainConfig, config_folder

RUN_ID_VERSION = 1


def method_revision(method: dict[str, Any], *, release: bool) -> int:
    """Return which revision of its policy's numerics a method's keys stand for: 2 where they mean other numbers than once.

    It stands in the configuration as `method.revision`, but for 1, and so in `run_id`. Revision 2 of the selecting methods
    has another default of T; of `wlora_plus` another second halving, and other ranks where n is no multiple of K; of `rlora`
    the set acts from the first projection on; of `alora` components that stay keep their moments.
    """
    match method["name"]:
        case "wlora" | "wlora_depth":
            changed = not release and method["select_steps"] is None
        case "wlora_plus":
            changed = not release
        case "rlora":
            changed = not release and method["draw"] != "at_start"
        case name:
            changed = name == "alora"
    return 2 if changed else 1


def scientific_fields(config: Config, *, task_data: str | None, model_data: str | None, precision: str) -> dict[str, Any]:
    """Collect what decides the numbers of a run, and nothing else (no path, device or logging).

    Args:
        config: a resolved configuration.
        task_data: content fingerprint of local or generated data, None for the hub.
        model_data: content fingerprint of local weights, None for the hub.
        precision: the precision chosen for this machine, never `auto`.
    """
    train = _identifying(config.train)
    stored = train.pop("prefix_cache", "off"), train.pop("prefix_cache_dtype", config.train.prefix_cache_dtype)
    if stored[0] != "off":
        train["prefix_cache"] = stored[1]  # in memory or on disk is the same
    start = {"adapter": {"data": config.adapter.fingerprint, "head": config.adapter.head}} if config.adapter.path else {}
    return {
        **start,
        **_identifying(config),
        "version": RUN_ID_VERSION,
        "task": {**_identifying(config.task, content_known=bool(task_data)), "data": task_data},
        "model": {**_identifying(config.model, content_known=bool(model_data)), "data": model_data},
        "method": _identifying_method(config.method),
        "train": train,
        "precision": precision,
    }


def _identifying(section: Config | TaskConfig | ModelConfig | TrainConfig, *, content_known: bool = False) -> dict[str, Any]:
    """Return the keys of a section, its own sections aside, that decide numbers."""
    found = {}
    for part in dataclasses.fields(section):
        decides, later = part.metadata["decides"], part.metadata["later"]
        value = getattr(section, part.name)
        if isinstance(section, Config) and part.name in _SECTIONS:
            continue
        if decides != "numbers" and (decides != "origin" or content_known):
            continue
        if not later or value != (part.default_factory() if callable(part.default_factory) else part.default):
            found[part.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
    return found


_SECTIONS = ("task", "model", "method", "train", "adapter")


def _identifying_method(method: dict[str, Any]) -> dict[str, Any]:
    """Return a method's keys, those added later left out that stand for what there was before."""
    later = later_keys(method["name"])
    return {key: value for key, value in method.items() if key not in later or value != later[key]}


@functools.cache
def later_keys(method: str) -> dict[str, Any]:
    """Return the keys of a method that were added after records were published, with what a record without them stands for.

    A method that is not known here, such as that of a record of a later version, has none.
    """
    file = config_folder() / "method" / f"{method}.yaml"
    if not file.is_file():
        return {}
    content: Any = OmegaConf.load(file)
    return dict(content.get("method", content).get("later") or {})


def run_id(fields: dict[str, Any]) -> str:
    """Return the identity of a run: 16 hex digits of the SHA-256 of its scientific fields as canonical JSON."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stream_seed(seed: int, stream: str) -> int:
    """Return a 63-bit seed for one named random stream of a run.

    The streams `init`, `order`, `dropout` and `choice` are independent: drawing more from one never moves
    another, so two methods on one seed share initialisation and data order.
    """
    digest = hashlib.sha256(f"wlora/{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
