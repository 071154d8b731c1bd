"""Which linear modules carry adapters, by name, for every supported family. Needs no weights and no torch.

The universe counted as n never contains pooler, classification head or embeddings (methods note: the paper's n
is 36 for `qkv`, the release really trains 60 of DeBERTa-base's 72, because a misspelt name drops the
intermediate linears).
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
# Keys of `config.json` that count something of which every model has at least one.
_SIZES = re.compile(r"max_position_embeddings|(hidden|intermediate|vocab)_size|d_model|\w+_heads|\w+_ffn_dim")
"""What `targets` may name; `SET@LAYER` is the part of a set from a layer up."""


@dataclass(frozen=True)
class Stack:
    """A stack of identical layers: where it stands in the model and which linears each layer offers.

    `linears` are all of them in the order of `named_modules`, in which the release numbers its adapters too: equal ω
    are told apart by it. The other tuples name members of target sets, in any order.
    """

    prefix: str
    depth_key: str
    linears: tuple[str, ...]
    qkv: tuple[str, ...]
    output: tuple[str, ...]
    release: tuple[str, ...]

    def suffixes(self, targets: str) -> tuple[str, ...]:
        """Return the module names of one layer that a target set adapts, in the model's own order."""
        chosen = {
            "qkv": self.qkv,
            "attention": self.qkv + self.output,
            "all": self.linears,
            "release": self.release,
        }[targets]
        return tuple(name for name in self.linears if name in chosen)


@dataclass(frozen=True)
class Target:
    """One adapted module: its full name, the index of its layer counted from 0 over all stacks, its kind."""

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
    "deberta-v2": _ENCODER_HEADS,
    "bert": _ENCODER_HEADS,
    "bart": (*_ENCODER_HEADS, "seq2seq"),
    "llama": ("sequence_classification",),
}
"""The heads (`Task.head`) that each family of `FAMILIES` can carry."""

LEARNT_POSITIONS = ("bert", "bart")
"""The families that cannot read past their `max_position_embeddings`; the others count positions relatively."""


def read_architecture(model: ModelConfig) -> dict[str, Any]:
    """Return the model's architecture as in its `config.json`: from `model.path` where set, else from the YAML.

    Of a GGUF file in `model.path` it is what the file itself says; a `config.json` beside it has no part in it.

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
    """Refuse an architecture of another family than the model's YAML, or with sizes that are none."""
    family = str(architecture.get("model_type"))
    if model.path is None and family not in FAMILIES:
        raise unknown_name(f"model.architecture.model_type={family}", family, FAMILIES)
    expected = model.architecture.get("model_type", family)
    if family != expected:
        raise ConfigError(
            f"model.path={model.path}: holds a {family} model, model={model.name} is {expected}: "
            "allowed is a folder of that family, or another model=NAME beside model.path"
        )
    sizes = {stack.depth_key: MOST_LAYERS for stack in FAMILIES[family]}
    sizes |= {key: 1 << 30 for key, size in architecture.items() if _SIZES.fullmatch(key) and size is not None}
    try:
        json.dumps(architecture, allow_nan=False)
    except ValueError:
        where = f"model.path={model.path}: config.json" if model.path else "model.architecture"
        raise ConfigError(f"{where} holds a number that is not finite: allowed are finite numbers") from None
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
    """Return which output of a model's trained classification head stands for each of the task's classes.

    The names in `id2label` decide, upper or lower case. Where the model has only numbers (`LABEL_0`), or the task has no
    classes (regression), the order stays.

    Args:
        architecture: the model's, as in its `config.json`.
        labels: the task's classes, in its order; none for regression.
        where: names the model in errors.

    Raises:
        ConfigError: another number of outputs, or other names.
    """
    try:
        # transformers writes neither key for its default, two outputs.
        named = architecture.get("id2label") or dict.fromkeys(range(architecture.get("num_labels") or 2), "LABEL_0")
        names = [str(name).casefold() for _, name in sorted((int(number), name) for number, name in named.items())]
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: id2label in config.json cannot be read ({error})") from None
    if len(names) != max(len(labels), 1):
        raise ConfigError(
            f"model.head=kept: the head of {where} has {len(names)} outputs, the task asks for {max(len(labels), 1)}\n"
            "allowed is fresh, for a new head"
        )
    if not labels or all(name.startswith("label_") for name in names):
        return list(range(len(names)))
    wanted = [label.casefold() for label in labels]
    if sorted(names) != sorted(wanted):
        raise ConfigError(
            f"model.head=kept: the classes of {where} are {', '.join(names)}, those of the task {', '.join(wanted)}\n"
            "allowed is fresh, for a new head"
        )
    return [names.index(name) for name in wanted]


def list_targets(architecture: dict[str, Any], targets: str) -> list[Target]:
    """Enumerate the adapted modules of an architecture from the lowest layer up.

    Args:
        targets: one of `TARGET_SETS`, or SET@LAYER for its modules from that layer up (counted from 0 over all stacks).
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
