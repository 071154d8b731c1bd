"""The linear modules that can carry adapters, by name, for every supported model family. Needs no weights and no torch.

The count n of adapters never includes pooler, classification head or embeddings. The paper's n is 36 for `qkv` of
DeBERTaV3-base. The published code trains 60 of its 72 adapters, because a misspelt name in its filter excludes the
intermediate linear modules.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wlora.errors import ConfigError, unknown_name
from wlora.models.gguf import find_gguf, read_gguf_architecture
from wlora.reading import read_file, read_json

if TYPE_CHECKING:
    from wlora.config.schema import ModelConfig

MOST_LAYERS = 10_000
# Keys of `config.json` whose value must be an integer of at least 1.
_SIZES = re.compile(r"max_position_embeddings|(hidden|intermediate|vocab)_size|d_model|\w+_heads|\w+_ffn_dim")


@dataclass(frozen=True)
class Stack:
    """A stack of identical layers: its place in the model, and the linear modules in each layer.

    `linears` lists all of them in the order of `named_modules`. The published code numbers its adapters in the same
    order, which breaks ties between equal ω. The other tuples list the members of the target sets, in any order.
    """

    prefix: str
    depth_key: str
    linears: tuple[str, ...]
    qkv: tuple[str, ...]
    output: tuple[str, ...]
    release: tuple[str, ...]

    def suffixes(self, targets: str) -> tuple[str, ...]:
        """Return the module names of one layer that belong to a target set, in the model's own order."""
        chosen = {
            "qkv": self.qkv,
            "attention": self.qkv + self.output,
            "all": self.linears,
            "release": self.release,
        }[targets]
        return tuple(name for name in self.linears if name in chosen)


@dataclass(frozen=True)
class Target:
    """One adapted module: its full name, the index of its layer (counted from 0 over all stacks), and its kind."""

    name: str
    layer: int
    kind: str


def _encoder(prefix: str, query: str, key: str, value: str) -> Stack:
    qkv = tuple(f"attention.self.{name}" for name in (query, key, value))
    output = ("attention.output.dense",)
    return Stack(
        prefix=prefix,
        depth_key="num_hidden_layers",
        linears=(*qkv, *output, "intermediate.dense", "output.dense"),
        qkv=qkv,
        output=output,
        release=(*qkv, *output, "output.dense"),
    )


def _bart(part: str, attentions: tuple[str, ...]) -> Stack:
    inner = [f"{attention}.{name}" for attention in attentions for name in ("k_proj", "v_proj", "q_proj", "out_proj")]
    linears = (*inner, "fc1", "fc2")
    return Stack(
        prefix=f"model.{part}.layers",
        depth_key=f"{part}_layers",
        linears=linears,
        qkv=tuple(name for name in inner if not name.endswith("out_proj")),
        output=tuple(name for name in inner if name.endswith("out_proj")),
        release=linears,
    )


def _llama() -> Stack:
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output = ("self_attn.o_proj",)
    linears = (*qkv, *output, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return Stack("model.layers", "num_hidden_layers", linears, qkv, output, release=linears)


FAMILIES: dict[str, tuple[Stack, ...]] = {
    "deberta-v2": (_encoder("deberta.encoder.layer", "query_proj", "key_proj", "value_proj"),),
    "bert": (_encoder("bert.encoder.layer", "query", "key", "value"),),
    "bart": (_bart("encoder", ("self_attn",)), _bart("decoder", ("self_attn", "encoder_attn"))),
    "llama": (_llama(),),
}


_ENCODER_HEADS = ("sequence_classification", "question_answering")
HEADS: dict[str, tuple[str, ...]] = {
    "deberta-v2": (*_ENCODER_HEADS, "token_classification"),
    "bert": (*_ENCODER_HEADS, "token_classification"),
    "bart": (*_ENCODER_HEADS, "seq2seq"),
    "llama": ("sequence_classification", "token_classification"),
}
"""The heads (`Task.head`) that each family of `FAMILIES` supports."""

LEARNT_POSITIONS = ("bert", "bart")
"""The families with absolute positions, limited to `max_position_embeddings` tokens.

The other families use relative ones.
"""


def read_architecture(model: ModelConfig) -> dict[str, Any]:
    """Return the model's architecture as in its `config.json`: from `model.path` if set, otherwise from the YAML.

    For a GGUF file in `model.path` the architecture comes from the file itself; a `config.json` beside it is ignored.

    Raises:
        ConfigError: `model.path` is not a folder with a readable `config.json` or GGUF file, or its family is not
            supported.
    """
    if model.path is None:
        return _check_family(model.architecture, model) if model.architecture else {}
    if model.gguf_file is not None:
        return _check_family(read_gguf_architecture(find_gguf(model)), model)
    file = Path(model.path) / "config.json"
    if not os.path.isfile(file):
        raise ConfigError(f"model.path={model.path}: allowed is a folder with config.json, tokenizer and weights")
    try:
        architecture = read_json(read_file(file))
        family = architecture["model_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"model.path={model.path}: config.json cannot be read or has no model_type ({error})") from None
    if not isinstance(family, str) or family not in FAMILIES:
        raise unknown_name(f"model.path={model.path}: model_type {family}", str(family), FAMILIES)
    return _check_family(architecture, model)


def _check_family(architecture: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Check that the family matches the model's YAML and that all sizes are valid.

    Raises:
        ConfigError: another family, a size that is not a positive integer, or a number that is not finite.
    """
    family = str(architecture.get("model_type"))
    if model.path is None and family not in FAMILIES:
        raise unknown_name(f"model.architecture.model_type={family}", family, FAMILIES)
    expected = model.architecture.get("model_type", family)
    if family != expected:
        raise ConfigError(
            f"model.path={model.path}: contains a {family} model, but model={model.name} is {expected}: "
            "allowed is a folder of that family, or another model=NAME together with model.path"
        )
    sizes = {stack.depth_key: MOST_LAYERS for stack in FAMILIES[family]}
    sizes |= {key: 1 << 30 for key, size in architecture.items() if _SIZES.fullmatch(key) and size is not None}
    try:
        json.dumps(architecture, allow_nan=False)
    except ValueError:
        where = f"model.path={model.path}: config.json" if model.path else "model.architecture"
        raise ConfigError(f"{where} contains a number that is not finite: allowed are finite numbers") from None
    for key, most in sizes.items():
        size = architecture.get(key)
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            told = (
                f"model.path={model.path}: {key} in config.json is {size};"
                if model.path
                else f"model.architecture.{key}={size}:"
            )
            raise ConfigError(f"{told} allowed is int >= 1, <= {most}")
    return dict(architecture)


def order_classes(architecture: dict[str, Any], labels: Sequence[str], *, where: str) -> list[int]:
    """Return, for each of the task's classes, the index of the corresponding output of a model's trained head.

    The names in `id2label` are matched without regard to case. If the model has only numbers (`LABEL_0`), or the task
    has no classes (regression), the order is kept.

    Args:
        architecture: the model's architecture, as in its `config.json`.
        labels: the task's classes, in the task's order; empty for regression.
        where: name of the model for error messages.

    Raises:
        ConfigError: the number of outputs differs, or the names differ.
    """
    try:
        # transformers omits both keys for its default of two outputs.
        named = architecture.get("id2label") or dict.fromkeys(range(architecture.get("num_labels") or 2), "LABEL_0")
        names = [str(name).casefold() for _, name in sorted((int(number), name) for number, name in named.items())]
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: id2label in config.json cannot be read ({error})") from None
    if len(names) != max(len(labels), 1):
        raise ConfigError(
            f"model.head=kept: the head of {where} has {len(names)} outputs, but the task needs {max(len(labels), 1)}\n"
            "allowed is fresh, for a new head"
        )
    if not labels or all(name.startswith("label_") for name in names):
        return list(range(len(names)))
    wanted = [label.casefold() for label in labels]
    if sorted(names) != sorted(wanted):
        raise ConfigError(
            f"model.head=kept: the classes of {where} are {', '.join(names)}, but the task has {', '.join(wanted)}\n"
            "allowed is fresh, for a new head"
        )
    return [names.index(name) for name in wanted]


def list_targets(architecture: dict[str, Any], targets: str) -> list[Target]:
    """List the adapted modules of an architecture, lowest layer first.

    Args:
        architecture: the model's architecture, as in its `config.json`.
        targets: one of `TARGET_SETS`, or SET@LAYER for the set's modules from that layer upwards (layers counted from 0
            over all stacks).
    """
    name, _, lowest = targets.partition("@")
    found: list[Target] = []
    layer = 0
    for stack in FAMILIES[architecture["model_type"]]:
        for index in range(int(architecture[stack.depth_key])):
            if layer >= int(lowest or 0):
                found += [Target(f"{stack.prefix}.{index}.{suffix}", layer, suffix) for suffix in stack.suffixes(name)]
            layer += 1
    return found


def count_targets(architecture: dict[str, Any], targets: str) -> int:
    """Return n, the number of adapters of a target set."""
    return len(list_targets(architecture, targets))
