"""Checks of configuration values against rules. This module does not import torch.

A rule is a short text that error messages also show: `int >= 1`, `float >= 0, < 1`, `int >= 1 or null`,
`float > 0 or tuned`, `single | halvings`. Rules of shared keys are declared in the schema, rules of a method's own keys
under `allowed` in the method's YAML file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container
from typing import Any

from wlora.config.schema import MODULE_NAMES, TARGET_SETS, Config, walk
from wlora.errors import wrong_value

_DIGITS = 6  # maximum number of digits of a layer index
_NAME = re.compile(r"[\w.*-]{1,200}")  # of a module, or a part of one

RULES: dict[str, str] = {name: part.metadata["rule"] for name, part in walk() if part.metadata["rule"]}
"""Rules of the shared keys, by full key."""

_COMPARISONS = {
    ">=": lambda value, bound: value >= bound,
    ">": lambda value, bound: value > bound,
    "<=": lambda value, bound: value <= bound,
    "<": lambda value, bound: value < bound,
}


def canonical(value: Any, rule: str) -> Any:
    """Return the canonical spelling of a value whose rule lists choices; return other values unchanged.

    Choices are lower case. `true` and `false` become booleans if the rule lists them; otherwise YAML's booleans mean `on`
    and `off`.
    """
    if "|" not in rule or value is None:
        return value
    text = _spell(value, rule)
    return text == "true" if text in ("true", "false") else text


def _spell(value: Any, rule: str) -> str:
    if MODULE_NAMES in _choices(rule):
        return _spell_names(value)
    text = str(value).lower()
    if text in ("true", "false") and text not in _choices(rule):
        text = "on" if text == "true" else "off"
    return text


def _spell_names(value: Any) -> str:
    """Return module names as one text: sorted, each once, joined by commas; `@LAYER`, which holds for all, at the end."""
    items = value if isinstance(value, list) else [value]
    names, at, layer = ",".join(str(item) for item in items).partition("@")
    words = {word.strip() for word in names.split(",")}
    text = ",".join(sorted(word.lower() if word.lower() in TARGET_SETS else word for word in words))
    return f"{text}@{int(layer)}" if at and _is_layer(layer) else f"{text}{at}{layer}"


def _is_layer(text: str) -> bool:
    return text.isdecimal() and len(text) <= _DIGITS


def _choices(rule: str) -> list[str]:
    return [word.strip() for word in rule.partition(" or ")[0].split("|")]


def satisfies(value: Any, rule: str) -> bool:
    """Tell whether a value, in any accepted spelling, satisfies a rule; ValueError if the rule has a syntax error."""
    rule, *words = rule.split(" or ")
    if ("null" if value is None else value) in words:
        return True
    if rule.startswith("list of "):
        return isinstance(value, list) and len(value) > 0 and all(satisfies(v, rule.removeprefix("list of ")) for v in value)
    if "|" in rule or not re.match(r"(int|float)\b", rule):
        if value is None:
            return False
        if MODULE_NAMES not in _choices(rule):
            return _spell(value, rule) in _choices(rule)
        names, at, layer = _spell(value, rule).partition("@")
        return all(map(_NAME.fullmatch, names.split(","))) and (not at or _is_layer(layer))
    kind, _, bounds = rule.partition(" ")
    if isinstance(value, bool) or not isinstance(value, int if kind == "int" else (int, float)):
        return False
    if not math.isfinite(value):
        return False
    for bound in filter(None, re.split(r",\s*", bounds)):
        match = re.fullmatch(r"(>=|>|<=|<) (\S+)", bound)
        if match is None:
            raise ValueError(f"unreadable rule: {rule}")
        if not _COMPARISONS[match[1]](value, float(match[2])):
            return False
    return True


def check_rules(config: Config, rewritten: Container[str] = tuple(RULES)) -> None:
    """Check the shared keys against their rules and replace choices by their canonical spelling.

    Args:
        rewritten: keys whose value may be replaced. Values that come from a record keep their recorded spelling.

    Raises:
        ConfigError: a value violates its rule.
    """
    for key, rule in RULES.items():
        value = check(key, look_up(config, key), rule)
        if key in rewritten:
            *parents, name = key.split(".")
            setattr(look_up(config, ".".join(parents)) if parents else config, name, value)


def look_up(config: Config, key: str) -> Any:
    """Return the value of a full key such as `task.epochs`."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check(key: str, value: Any, rule: str) -> Any:
    """Return the canonical value of a key; ConfigError if the value violates the rule."""
    if not satisfies(value, rule):
        raise wrong_value(key, "null" if value is None else value, rule)
    return canonical(value, rule)
