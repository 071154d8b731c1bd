"""The identity of a run (`run_id`): a hash of exactly those settings that influence its numerical results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from wlora.config.schema import Config, ModelConfig, TaskConfig, TrainConfig, read_method

RUN_ID_VERSION = 1


def method_revision(method: dict[str, Any], *, release: bool) -> int:
    """Return the revision of a method's numerics: 2 if the same keys gave other numbers in earlier versions, else 1.

    Revision 2 is stored in the configuration as `method.revision` and is therefore part of `run_id`; revision 1 is not
    stored. Revision 2 means:

    - `wlora`, `wlora_depth`: the default of T (`select_steps`) has changed.
    - `wlora_plus`: the second halving has changed, and so have the ranks if n is not a multiple of K. In the mode `release`,
      the step of a cut has the scheduled rate, not the peak.
    - `increlora`: the same holds for the step in which adapters grow.
    - `rlora`: the random set is used from the first projection on.
    - `alora`: rank components that remain keep their optimiser moments.
    """
    match method["name"]:
        case "wlora" | "wlora_depth":
            changed = not release and method["select_steps"] is None
        case "rlora":
            changed = not release and method["draw"] != "at_start"
        case name:
            changed = name in ("wlora_plus", "increlora", "alora")
    return 2 if changed else 1


def scientific_fields(config: Config, *, task_data: str | None, model_data: str | None, precision: str) -> dict[str, Any]:
    """Collect the settings that influence the results of a run, without paths, devices or logging.

    Args:
        config: a resolved configuration.
        task_data: content fingerprint of local or generated data, None for the hub.
        model_data: content fingerprint of local weights, None for the hub.
        precision: the precision chosen for this machine, never `auto`.
    """
    train = _identifying(config.train)
    stored = train.pop("prefix_cache", "off"), train.pop("prefix_cache_dtype", config.train.prefix_cache_dtype)
    if stored[0] != "off":
        train["prefix_cache"] = stored[1]  # only the dtype matters: memory and disk give the same numbers
    if (config.train.best or config.train.patience) and config.train.eval_every is not None:
        train["eval_every"] = config.train.eval_every  # more evaluations give other best ones, and other early stops
    model = _identifying(config.model, content_known=bool(model_data))
    if len(config.task.columns) < 2:
        model.pop("separate_pairs", None)  # there are no pairs
    start = {"adapter": {"data": config.adapter.fingerprint, "head": config.adapter.head}} if config.adapter.path else {}
    return {
        **start,
        **_identifying(config),
        "version": RUN_ID_VERSION,
        "task": {**_identifying(config.task, content_known=bool(task_data)), "data": task_data},
        "model": {**model, "data": model_data},
        "method": _identifying_method(config.method),
        "train": train,
        "precision": precision,
    }


def _identifying(section: Config | TaskConfig | ModelConfig | TrainConfig, *, content_known: bool = False) -> dict[str, Any]:
    """Return the keys of a section that influence results, without its nested sections.

    Args:
        content_known: whether the content of the data or model has a fingerprint; keys of its origin are then left out.
    """
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
    """Return a method's keys, without later added keys that still have the value of the earlier behaviour."""
    later = later_keys(method["name"])
    return {key: value for key, value in method.items() if key not in later or value != later[key]}


def later_keys(method: str) -> dict[str, Any]:
    """Return the keys that a method got after records were published, each with the value that older records imply."""
    return read_method(method).get("later") or {}


def run_id(fields: dict[str, Any]) -> str:
    """Return the identity of a run: 16 hex digits of the SHA-256 of its scientific fields as canonical JSON."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stream_seed(seed: int, stream: str) -> int:
    """Return a 63-bit seed for one named random stream of a run.

    The streams `init`, `order`, `dropout` and `choice` are independent: drawing more numbers from one does not change
    another. Two methods with the same seed therefore share initialisation and data order.
    """
    digest = hashlib.sha256(f"wlora/{seed}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
