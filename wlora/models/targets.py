"""The modules that get adapters: the meaning of the key `targets` for an architecture.

Described families need no torch. For a discovered one, transformers builds the model without weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from wlora.config.schema import TARGET_SETS
from wlora.models.layout import FAMILIES, HEADS, Layout, described_layout


@dataclass(frozen=True)
class Target:
    """One adapted module: its full name, the index of its layer (counted from 0 over all stacks), and its kind."""

    name: str
    layer: int
    kind: str


def supported_heads(architecture: dict[str, Any]) -> tuple[str, ...]:
    """Return the heads (`Task.head`) that an architecture's family has."""
    family = architecture["model_type"]
    if family in FAMILIES:
        return HEADS[family]
    from wlora.models.discovery import heads_of_family

    return heads_of_family(family)


def find_layout(architecture: dict[str, Any], head: str | None = None) -> Layout:
    """Return the layout of an architecture.

    Args:
        architecture: the model's architecture, as in its `config.json`.
        head: the kind of head, on which the names of the modules may depend (T5); None for the family's first head.

    Raises:
        ConfigError: the architecture cannot be built, or has no layers with linear modules.
    """
    if architecture["model_type"] in FAMILIES:
        return described_layout(architecture)
    from wlora.models.discovery import discover_architecture

    return discover_architecture(architecture, head or supported_heads(architecture)[0])


def list_targets(architecture: dict[str, Any], targets: str, head: str | None = None) -> list[Target]:
    """List the adapted modules of an architecture, lowest layer first.

    Args:
        architecture: the model's architecture, as in its `config.json`.
        targets: as for `select_targets`.
        head: as for `find_layout`.
    """
    return select_targets(find_layout(architecture, head), targets)


def count_targets(architecture: dict[str, Any], targets: str, head: str | None = None) -> int:
    """Return n, the number of adapters of a target set."""
    return len(list_targets(architecture, targets, head))


def select_targets(layout: Layout, targets: str) -> list[Target]:
    """List the modules of a layout that get adapters, lowest layer first.

    Args:
        layout: the model's layout.
        targets: words joined by commas: names of `TARGET_SETS`, or patterns. A pattern is the name of a linear module in
            the layers or its end behind a dot, as in PEFT's `target_modules`; `*` stands for any characters. `@LAYER` at
            the end leaves out the layers below (counted from 0 over all stacks).
    """
    words, _, lowest = targets.partition("@")
    chosen = words.split(",")
    found: list[Target] = []
    layer = 0
    for stack in layout.stacks:
        for index, linears in enumerate(stack.layers):
            for linear in linears if layer >= int(lowest or 0) else ():
                name = f"{stack.prefix}.{index}.{linear}"
                if any(stack.in_set(linear, word) if word in TARGET_SETS else _matches(name, word) for word in chosen):
                    found.append(Target(name, layer, linear))
            layer += 1
    return found


def unmatched_words(layout: Layout, targets: str) -> list[str]:
    """Return the words of `targets` that select no module of a layout, in any layer."""
    return [word for word in targets.partition("@")[0].split(",") if not select_targets(layout, word)]


def name_kinds(layout: Layout) -> list[str]:
    """Return the names of the linear modules within the layers, each once, in the model's order."""
    return list(dict.fromkeys(linear for stack in layout.stacks for linears in stack.layers for linear in linears))


def tell_layout(family: str, layout: Layout) -> str:
    """Describe the discovered layout of a family, in one line for the user."""
    parts = {
        "qkv": {name for stack in layout.stacks for name in stack.qkv},
        "output": {name for stack in layout.stacks for name in stack.output},
    }
    kinds = name_kinds(layout)
    parts["other"] = set(kinds) - parts["qkv"] - parts["output"]
    stacks = " and ".join(f"{len(stack.layers)} of {stack.prefix}" for stack in layout.stacks)
    named = "; ".join(f"{part}: {_join(kinds, names)}" for part, names in parts.items())
    head = ", ".join(layout.head) or "the pretrained one"
    slower = ". The last layer is computed for all tokens" if layout.reads == "first" else ""
    return f"layers found in this model (model_type {family}): {stacks}; {named}; head: {head}{slower}"


def _join(kinds: Iterable[str], names: set[str]) -> str:
    return ", ".join(kind for kind in kinds if kind in names) or "none"


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
