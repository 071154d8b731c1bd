"""Read and check the architecture of a model (the content of its `config.json`). Needs no weights and no torch."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wlora.config.spelling import expand_home
from wlora.errors import ConfigError, shorten
from wlora.models.gguf import find_gguf, read_gguf_architecture
from wlora.models.layout import FAMILIES
from wlora.reading import read_file, read_json

if TYPE_CHECKING:
    from wlora.config.schema import ModelConfig

MOST_LAYERS, LARGEST_SIZE = 10_000, 1 << 30
NAMED_HEADS = ("sequence_classification", "token_classification")
"""The kinds of heads (`Task.head`) whose outputs are the classes of a task."""
# Keys of `config.json` whose value must be an integer of at least 1.
_SIZES = re.compile(r"max_position_embeddings|(hidden|intermediate|vocab)_size|d_model|(?!pruned)\w+_heads|\w+_ffn_dim")
# Keys with the number of layers in families that are not described.
_DEPTHS = re.compile(r"(\w+_)?(n_)?layers?")


def read_architecture(model: ModelConfig) -> dict[str, Any]:
    """Return the model's architecture as in its `config.json`: from `model.path` if set, otherwise from the YAML.

    For a GGUF file in `model.path` the architecture comes from the file itself; a `config.json` beside it is ignored.

    Raises:
        ConfigError: `model.path` is not a folder with a readable `config.json` or GGUF file, or transformers does not
            know its family.
    """
    if model.path is None:
        return _check_sizes(dict(model.architecture), model) if model.architecture else {}
    if model.gguf_file is not None:
        return _check_sizes(read_gguf_architecture(find_gguf(model)), model)
    file = Path(expand_home("model.path", model.path)) / "config.json"
    if not os.path.isfile(file):
        raise ConfigError(f"model.path={model.path}: allowed is a folder with config.json, tokenizer and weights")
    try:
        architecture = read_json(read_file(file))
        architecture["model_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"model.path={model.path}: config.json cannot be read or has no model_type ({error})") from None
    return _check_sizes(architecture, model)


def _check_sizes(architecture: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Check that the family is known and that all sizes are valid.

    Raises:
        ConfigError: an unknown family, a size that is not a positive integer, or a number that is not finite.
    """
    family = architecture.get("model_type")
    where = f"model.path={model.path}: config.json" if model.path else "model.architecture"
    if not isinstance(family, str) or family not in FAMILIES:
        _require_known(family, f"model.path={model.path}: model_type " if model.path else "model.architecture.model_type=")
    try:
        json.dumps(architecture, allow_nan=False)
    except ValueError:
        raise ConfigError(f"{where} contains a number that is not finite: allowed are finite numbers") from None
    for key, most in _bounded_keys(architecture).items():
        size = architecture.get(key)
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            in_folder = f"model.path={model.path}: {key} in config.json is {size};"
            told = in_folder if model.path else f"model.architecture.{key}={size}:"
            raise ConfigError(f"{told} allowed is int >= 1, <= {most}")
    return dict(architecture)


def _bounded_keys(architecture: dict[str, Any]) -> dict[str, int]:
    """Return the keys of an architecture that must be integers from 1 to a bound, with the bound.

    For discovered families, transformers checks the remaining keys when it builds the model.
    """
    described = FAMILIES.get(architecture["model_type"])
    if described is None:
        numbers = {key for key, size in architecture.items() if isinstance(size, int)}
        depths = {key for key in numbers if _DEPTHS.fullmatch(key) and architecture[key] > 1}
    else:
        numbers, depths = set(architecture), {part.depth_key for part in described}
    sizes = {key for key in numbers if _SIZES.fullmatch(key) and architecture[key] is not None}
    return dict.fromkeys(sizes, LARGEST_SIZE) | dict.fromkeys(depths, MOST_LAYERS)


def _require_known(family: Any, given: str) -> None:
    """Check that transformers supports this family. Code in a model's repository is never run."""
    if not isinstance(family, str):
        raise ConfigError(f"{given}{shorten(family)} is unknown: allowed is the name of a family")
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if family not in CONFIG_MAPPING_NAMES:
        near = difflib.get_close_matches(family, CONFIG_MAPPING_NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{given}{shorten(family)} is unknown{hint}\n"
            f"allowed is a family that transformers {__version__} has: code that comes with a model is not run"
        )


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
