"""Find the layers, linear modules and head of a family that is not in `FAMILIES`, from the model that transformers builds.

The search relies on these conventions of transformers:

- The repeated layers are in an `nn.ModuleList`.
- The bare model and the modules of the head are children of the model with a head (`base_model_prefix`).
- A head that reads the last token is called `score`.
- Attention modules have `att` in their name. Projections of queries, keys and values are named after them, also where they
  are fused (`c_attn`, `query_key_value`, `Wqkv`, `qkv_proj`, `in_proj`).
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from wlora.errors import ConfigError
from wlora.models.heads import AUTO, head_modules, make_config
from wlora.models.layout import FAMILIES, Layout, Stack, described_layout
from wlora.models.linears import is_linear

_MAPPINGS = {
    "sequence_classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token_classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question_answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
# Words in the last part of a projection's name.
_QKV = {"q", "k", "v", "qk", "kv", "qkv", "wq", "wk", "wv", "wqkv", "query", "key", "value"}
_FUSED = ("c_attn", "in_proj")
_POSITIONS = ("position_embeddings", "embed_positions", "wpe")


def heads_of_family(family: str) -> tuple[str, ...]:
    """Return the heads (`Task.head`) for which transformers has a class of this family."""
    return tuple(head for head, known in _MAPPINGS.items() if family in known)


def layout_of(model: PreTrainedModel) -> Layout:
    """Return the layout of a model, with or without adapters."""
    if model.config.model_type in FAMILIES:
        return described_layout(model.config.to_dict())
    return discover(model)


def discover_architecture(architecture: dict[str, Any], head: str) -> Layout:
    """Return the layout of an architecture, which is built without weights.

    Args:
        architecture: the model's architecture, as in its `config.json`.
        head: the kind of head (`Task.head`).

    Raises:
        ConfigError: the family has no such head, the architecture cannot be built, or it has no layers.
    """
    return _discover_once(json.dumps(architecture, sort_keys=True), head)


@functools.lru_cache(maxsize=16)
def _discover_once(architecture: str, head: str) -> Layout:
    content = json.loads(architecture)
    try:
        config = make_config(content, num_labels=2)
        with torch.device("meta"):
            model = AUTO[head].from_config(config)
    except Exception as error:  # transformers and torch raise many kinds of exceptions for invalid sizes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(f"model_type {content['model_type']}: the architecture cannot be built ({reason})") from error
    return discover(model)


def discover(model: PreTrainedModel) -> Layout:
    """Return the layout of a model, by its structure.

    Raises:
        ConfigError: there are no repeated layers with linear modules.
    """
    head = tuple(head_modules(model))
    stacks = tuple(_describe(name, layers) for name, layers in _layer_lists(model, head))
    if not stacks:
        raise ConfigError(f"model_type {model.config.model_type}: no repeated layers with linear modules were found")
    return Layout(
        stacks,
        "end" if model.config.is_encoder_decoder else "last" if "score" in head else "first",
        _longest(model),
        described=False,
        head=head,
        token_types=_takes_token_types(model),
    )


def _takes_token_types(model: PreTrainedModel) -> bool:
    # RoBERTa's table has a single row, and DistilBERT takes no types at all.
    taken = "token_type_ids" in inspect.signature(model.forward).parameters
    return taken and getattr(model.config, "type_vocab_size", 2) > 1


def _layer_lists(model: nn.Module, head: tuple[str, ...]) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the outermost lists of blocks with linear modules outside the head, with their names."""
    found: list[str] = list(head)
    for name, module in model.named_modules():
        inside = any(name == outer or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and all(_linears(block) for block in module) and len(module):
            found.append(name)
            yield name, module


def _linears(block: nn.Module) -> list[str]:
    """Return the names of the linear modules within a block; the block itself is not a linear module."""
    found, closed = [], [""] if is_linear(block) else list[str]()
    for name, module in block.named_modules():
        if closed and (closed[-1] == "" or name.startswith(f"{closed[-1]}.")):
            continue
        if is_linear(module):
            found.append(name)
            closed.append(name)
        elif isinstance(module, nn.MultiheadAttention):  # reads the weights of its linear module without calling it
            closed.append(name)
    return found


def _describe(prefix: str, layers: nn.ModuleList) -> Stack:
    linears = tuple(tuple(_linears(block)) for block in layers)
    kinds = list(dict.fromkeys(name for names in linears for name in names))
    attention = [name for name in kinds if _in_attention(name, layers)]
    qkv = tuple(name for name in attention if _projects_tokens(name))
    output = tuple(name for name in attention if name not in qkv and "pos" not in _words(name))
    return Stack(prefix, linears, qkv, output)


def _in_attention(name: str, layers: nn.ModuleList) -> bool:
    above = name.split(".")[:-1]
    return any("att" in part.lower() for part in [type(layers[0]).__name__ * (not above), *above])


def _projects_tokens(name: str) -> bool:
    """Tell whether a linear module in an attention computes queries, keys or values of tokens, not of positions."""
    words = _words(name)
    return name.endswith(_FUSED) or bool(_QKV & words) and "pos" not in words


def _words(name: str) -> set[str]:
    return set(re.split(r"[_\d]+", name.rpartition(".")[2].lower()))


def _longest(model: nn.Module) -> int | None:
    """Return the maximum number of tokens of the table of learnt positions; None without a table."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            # The first rows are unused: `offset` rows in BART and OPT, the rows up to the padding index in RoBERTa.
            unused = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            return int(module.num_embeddings - unused)
    return None
