"""Completes and checks a composed configuration. Errors are one or two lines and are raised before torch is imported."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from wlora.adapters.peft_format import fingerprint
from wlora.config.identity import method_revision
from wlora.config.rules import RULES, check, check_rules, look_up
from wlora.config.schema import METHOD_NOTES, TARGET_SETS, AdapterConfig, Config, ModelConfig, method_names, read_method
from wlora.config.spelling import expand_home
from wlora.console import tell
from wlora.data.hub import require_sources
from wlora.data.own_tables import BENCHMARK, settle
from wlora.errors import ConfigError, unknown_name, wrong_value
from wlora.models.architectures import NAMED_HEADS, order_classes, read_architecture
from wlora.models.layout import Layout
from wlora.models.settle import settle_model
from wlora.models.targets import find_layout, name_kinds, select_targets, supported_heads, unmatched_words
from wlora.tasks.base import find_kind

# Models with each head (`Task.head`), for messages.
EXAMPLES = {
    "sequence_classification": "deberta_v3_base",
    "token_classification": "deberta_v3_base",
    "question_answering": "deberta_v3_base",
    "seq2seq": "bart_large",
}


def resolve(config: Config) -> Config:
    """Check a composed configuration in place and fill in the defaults that depend on other keys.

    This function sets `k` from the number of adapters, and `train.accumulation_steps` from model and task. For an own table
    it reads the table and sets columns, labels and validation rows (`wlora.data.own_tables`). Values that
    depend on the number of rows (warm-up, selection steps) are set after the data are loaded (`wlora.training.run_length`).

    Raises:
        ConfigError: a value violates its rule, `k` exceeds the number of adapters, or the results folder is unusable.
    """
    check_rules(config)
    for key in ("lr", "head_lr"):
        if isinstance(getattr(config, key), (int, float)):
            setattr(config, key, float(getattr(config, key)))
    assert config.method.get("preset") is None and config.task.preset is None, "apply_presets comes first"
    check_method(config.method)
    _check_model(config.model)
    settle_model(config.model, offline=config.offline)
    _settle_task(config)
    _check_saving(config)
    _check_sharding(config)
    identify_adapter(config.adapter)
    config.results_dir = expand_home("results_dir", config.results_dir)
    check_results_folder(config.results_dir)
    config.per_task = {}  # its values have been interpolated into other keys
    config.task.presets = {}
    if config.compat == "release" and config.method["name"] == "probe":
        raise ConfigError("method=probe compat=release: the release's head is frozen, so nothing would train")
    _check_head(config)
    _check_lengths(config)
    glue = config.task.benchmark == "glue"
    if config.train.accumulation_steps is None:
        config.train.accumulation_steps = (config.model.accumulation_steps if glue else None) or 1
    if config.compat == "release" and config.method["name"] == "wlora_plus":
        config.method["schedule"] = "halvings"  # the only schedule of the published code
    if "targets" in config.method:
        _resolve_k(config)
    if (revision := method_revision(config.method, release=config.compat == "release")) > 1:
        config.method["revision"] = revision
    return config


def _settle_task(config: Config) -> None:
    """Fill in the task's keys that an own table determines, print them, and check the keys that depend on them."""
    task = config.task
    find_kind(task.kind)  # the message for an unknown one
    for key, value in (("task.path", task.path), ("task.validation", task.validation)):
        if isinstance(value, str):
            expand_home(key, value)  # the message for an unknown home folder
    if task.benchmark == BENCHMARK and task.path is None and task.hub_id is not None:
        require_sources(dataclasses.replace(config, model=dataclasses.replace(config.model, source="random", path=None)))
    for line in settle(task, offline=config.offline):
        tell(line)
    best = config.train.best
    # Windows of a question have no validation loss: the answer may be in any of them.
    allowed = [*task.metrics, *([] if task.kind == "question_answering" else ["loss"])]
    if best is not None and best not in allowed:
        raise wrong_value("train.best", best, f"{', '.join(allowed)}, or null, for task={task.name}")


def identify_adapter(adapter: AdapterConfig) -> None:
    """Fill in the fingerprint of the adapters to start from.

    Raises:
        ConfigError: there are no adapters in the folder, or their content differs from a given fingerprint.
    """
    if adapter.path is None:
        for key, value, unset in (("head", adapter.head, False), ("fingerprint", adapter.fingerprint, None)):
            if value != unset:
                raise ConfigError(f"adapter.{key}={value}: allowed only with adapter.path=DIR")
        return
    found = fingerprint(expand_home("adapter.path", adapter.path))
    if adapter.fingerprint not in (None, found):
        raise ConfigError(
            f"adapter.path={adapter.path}: its adapters are {found}, not adapter.fingerprint={adapter.fingerprint}"
        )
    adapter.fingerprint = found


def check_method(method: dict[str, Any]) -> None:
    """Check a method's keys against the rules in the packaged YAML file, and remove its descriptive entries.

    Raises:
        ConfigError: the method is unknown, or a key is unknown to it or violates its rule.
    """
    name = method.get("name")
    if name not in method_names():
        raise unknown_name(f"method.name={name}", str(name), method_names())
    shipped = read_method(name)
    own = shipped.get("allowed") or {}
    rules, known = {**RULES, **own}, {"name", *shipped, *own}
    for note in METHOD_NOTES:
        method.pop(note, None)
    for key, value in method.items():
        if key not in known:
            raise ConfigError(f"method.{key} is unknown to method={name}: allowed is {', '.join(own)}")
        if key in rules:
            method[key] = check(f"method.{key}", value, rules[key])


def _check_model(model: ModelConfig) -> None:
    """Reject combinations of model keys that cannot be loaded."""
    if model.gguf_file is not None:
        if model.path is None and model.source != "hub":
            raise wrong_value("model.gguf_file", model.gguf_file, f"null for model={model.name} without model.path=DIR")
        if model.quantization != "none":
            raise wrong_value("model.quantization", model.quantization, "none with model.gguf_file")
    elif model.quantization != "none" and model.path is None and model.source == "random":
        raise wrong_value("model.quantization", model.quantization, f"none for model={model.name}, whose weights are random")


def _check_saving(config: Config) -> None:
    """Reject `train.save_model` for quantised bases, into which adapters cannot be merged."""
    model = config.model
    packed = f"model.gguf_file={model.gguf_file}" if model.gguf_file else f"model.quantization={model.quantization}"
    if config.train.save_model and packed != "model.quantization=none":
        raise wrong_value(
            "train.save_model", "true", f"false with {packed}: adapters are not merged into weights from quantised ones"
        )


def _check_sharding(config: Config) -> None:
    """Reject settings that are not tested under FSDP, in particular methods that cut or grow adapters."""
    if not config.train.fsdp:
        return
    method, model = config.method["name"], config.model
    if method != "lora":
        raise ConfigError(
            f"train.fsdp=true method={method}: allowed is method=lora\n"
            "changing the adapter structure of a sharded model is not supported"
        )
    for key, value, allowed in (
        ("model.quantization", model.quantization, "none"),
        ("model.gguf_file", model.gguf_file, None),
        ("train.save_model", config.train.save_model, False),
        ("train.prefix_cache", config.train.prefix_cache, "off"),
        ("train.grow_batch", config.train.grow_batch, "off"),
    ):
        if value != allowed:
            raise wrong_value(key, value, f"{'null' if allowed is None else str(allowed).lower()} with train.fsdp=true")
    if find_kind(config.task.kind).head == "seq2seq":
        raise wrong_value("train.fsdp", "true", f"false for task={config.task.name}, whose evaluation generates texts")


def _check_head(config: Config) -> None:
    """Reject a task if the model family has no head for it, or if the method would train nothing."""
    head = find_kind(config.task.kind).head
    architecture = read_architecture(config.model)
    heads = supported_heads(architecture)
    if head not in heads:
        able = f"a task for its {' or '.join(heads)} head, or " if heads else ""
        raise ConfigError(
            f"task={config.task.name} model={config.model.name}: a {architecture['model_type']} model has no {head} head\n"
            f"allowed is {able}a model with this head: {EXAMPLES[head]}"
        )
    if head == "seq2seq" and config.method["name"] == "probe":
        raise ConfigError(f"method=probe task={config.task.name}: the model has no head of its own, so nothing would train")
    if config.model.head == "kept":
        _check_kept_head(config, head)


def _check_kept_head(config: Config, head: str) -> None:
    """Reject `model.head=kept` if there is no stored head, another head would replace it, or its classes differ."""
    model = config.model
    if model.path is None or model.gguf_file is not None:
        raise wrong_value("model.head", "kept", "fresh without model.path=DIR of a transformers folder")
    if head == "seq2seq":
        raise wrong_value("model.head", "kept", f"fresh for task={config.task.name}, whose head is always the model's own")
    if config.adapter.head:
        raise wrong_value("adapter.head", "true", "false with model.head=kept: the run has one head")
    if head in NAMED_HEADS:
        order_classes(read_architecture(model), config.task.labels, where=f"model.path={model.path}")


def _check_lengths(config: Config) -> None:
    """Reject lengths that exceed the model's position embeddings, or that contradict each other."""
    generation = config.task.generation
    shortest, longest = generation.min_new_tokens, generation.max_new_tokens
    if shortest is not None and longest is not None and shortest > longest:
        raise wrong_value("task.generation.min_new_tokens", shortest, f"0 to {longest}, task.generation.max_new_tokens")
    positions = find_layout(read_architecture(config.model), find_kind(config.task.kind).head).longest
    if positions is None:
        return
    for key in ("max_length", "max_target_length", "generation.max_new_tokens"):
        length = look_up(config, f"task.{key}")
        if length is not None and length > positions:
            raise wrong_value(f"task.{key}", length, f"at most {positions}, the positions of model={config.model.name}")


def check_results_folder(results_dir: str) -> None:
    """Check that the results folder can be written, before time is spent on a run.

    Raises:
        ConfigError: names the part of the path that cannot be written, or the error of the path itself.
    """
    folder = Path(results_dir).absolute()
    try:
        folder.exists()
    except OSError as error:
        raise wrong_value("results_dir", results_dir, f"a folder that can be written ({error.strerror})") from None
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise wrong_value("results_dir", results_dir, f"a folder that can be written ({existing} cannot)")


def _resolve_k(config: Config) -> None:
    """Fill in `k` and check that it does not exceed n, the number of adapters."""
    targets = config.method["targets"]
    layout = find_layout(read_architecture(config.model), find_kind(config.task.kind).head)
    key = "targets" if targets == config.targets else "method.targets"
    n = count_adapters(layout, targets, key=key, model=config.model.name)
    if config.k is not None and config.k > n and "k" in config.method:
        raise wrong_value("k", config.k, f"1 to {n}, the adapters of targets={targets} on {config.model.name}")
    if config.k is None:
        config.k = default_k(config.method["name"], n, own=config.model.k, release=config.compat == "release")
    if "k" in config.method and config.method["k"] is None:
        config.method["k"] = config.k


def count_adapters(layout: Layout, targets: str, *, key: str, model: str) -> int:
    """Return n, the number of adapters of a target set.

    Args:
        layout: the model's layout.
        targets: as for `select_targets`.
        key: the key that holds them, for messages.
        model: the model's name, for messages.

    Raises:
        ConfigError: a word of `targets`, or all of it, selects no module.
    """
    if unmatched := unmatched_words(layout, targets):
        raise ConfigError(
            f"{key}={unmatched[0]}: allowed is {' | '.join(TARGET_SETS)}, or names of linear modules in the layers of "
            f"model={model}: {', '.join(name_kinds(layout))}"
        )
    n = len(select_targets(layout, targets))
    if n == 0:
        layers = sum(len(stack.layers) for stack in layout.stacks)
        raise ConfigError(f"{key}={targets}: allowed is a layer from 0 to {layers - 1} of model={model}")
    return n


def default_k(method: str, n: int, *, own: int | None = None, release: bool = False) -> int:
    """Return how many of n adapters are kept by default.

    The default is the model's own `k` if it has one, otherwise 5 for n <= 48 and 20 for larger n. WLoRA+ keeps n / 4,
    rounded up, as in the paper's rows "k = 15" (n = 60) and "k = 48" (n = 192).
    """
    if method == "wlora_plus" and not release:
        return math.ceil(n / 4)
    return min(n, own or (5 if n <= 48 else 20))
