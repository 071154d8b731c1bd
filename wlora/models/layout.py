"""The layout of a model: its layers, their linear modules and its head.

The families in `FAMILIES` are described by hand. Any other family is discovered (`wlora.models.discovery`). This module
needs no weights and no torch.

The count n of adapters never includes pooler, classification head or embeddings. The paper's n is 36 for `qkv` of
DeBERTaV3-base. The published code trains 60 of its 72 adapters, because a misspelt name in its filter excludes the
intermediate linear modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# The linear module that the filter of the published code excludes by mistake.
_LOST_BY_RELEASE = "intermediate.dense"


@dataclass(frozen=True)
class Stack:
    """A stack of layers: its name in the model, and the linear modules of each layer.

    Attributes:
        prefix: name of the `ModuleList` in the model.
        layers: for every layer the names of its linear modules within the layer, in the order of `named_modules`. The
            published code numbers its adapters in the same order, which breaks ties between equal ω.
        qkv: the names that belong to the target set `qkv`.
        output: the names that `attention` has in addition.
    """

    prefix: str
    layers: tuple[tuple[str, ...], ...]
    qkv: tuple[str, ...]
    output: tuple[str, ...]

    def in_set(self, name: str, targets: str) -> bool:
        """Tell whether a linear module, by its name within a layer, belongs to one of `TARGET_SETS`."""
        match targets:
            case "qkv":
                return name in self.qkv
            case "attention":
                return name in self.qkv or name in self.output
            case "release":
                return name != _LOST_BY_RELEASE
        return True


@dataclass(frozen=True)
class Layout:
    """The properties of a model's architecture that a run uses.

    Attributes:
        stacks: the stacks of layers; for an encoder-decoder, the encoder's comes first.
        reads: the token that a classification head reads: `first` (encoders), `end` for the end-of-sequence token
            (encoder-decoders), or `last` for the last token that is not padding (decoders).
        longest: maximum number of tokens of a text with learnt positions; None for relative positions.
        described: whether the family is one of `FAMILIES`.
        head: names of the modules of head and pooler; only for discovered families.
        token_types: whether the model distinguishes the texts of a pair by `token_type_ids`.
    """

    stacks: tuple[Stack, ...]
    reads: Literal["first", "end", "last"]
    longest: int | None = None
    described: bool = True
    head: tuple[str, ...] = ()
    token_types: bool = True


@dataclass(frozen=True)
class Described:
    """A stack of identical layers in a described family; `depth_key` is the key of `config.json` with their number."""

    prefix: str
    depth_key: str
    linears: tuple[str, ...]
    qkv: tuple[str, ...]
    output: tuple[str, ...]


def _encoder(prefix: str, query: str, key: str, value: str) -> Described:
    qkv = tuple(f"attention.self.{name}" for name in (query, key, value))
    output = ("attention.output.dense",)
    linears = (*qkv, *output, "intermediate.dense", "output.dense")
    return Described(prefix, "num_hidden_layers", linears, qkv, output)


def _bart(part: str, attentions: tuple[str, ...]) -> Described:
    inner = [f"{attention}.{name}" for attention in attentions for name in ("k_proj", "v_proj", "q_proj", "out_proj")]
    return Described(
        prefix=f"model.{part}.layers",
        depth_key=f"{part}_layers",
        linears=(*inner, "fc1", "fc2"),
        qkv=tuple(name for name in inner if not name.endswith("out_proj")),
        output=tuple(name for name in inner if name.endswith("out_proj")),
    )


def _llama() -> Described:
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output = ("self_attn.o_proj",)
    linears = (*qkv, *output, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return Described("model.layers", "num_hidden_layers", linears, qkv, output)


FAMILIES: dict[str, tuple[Described, ...]] = {
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

# Families with absolute positions, limited to `max_position_embeddings` tokens. The others use relative ones.
_LEARNT_POSITIONS = ("bert", "bart")
_READS: dict[str, Literal["first", "end", "last"]] = {"bart": "end", "llama": "last"}


def described_layout(architecture: dict[str, Any]) -> Layout:
    """Return the layout of an architecture, as in its `config.json`, of a described family."""
    family = architecture["model_type"]
    stacks = tuple(
        Stack(part.prefix, (part.linears,) * int(architecture[part.depth_key]), part.qkv, part.output)
        for part in FAMILIES[family]
    )
    longest = architecture.get("max_position_embeddings") if family in _LEARNT_POSITIONS else None
    return Layout(stacks, _READS.get(family, "first"), longest)
