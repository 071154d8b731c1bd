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

from wlora.config.schema import Config, walk
from wlora.errors import wrong_value

_DIGITS = 6  # maximum number of digits of a layer index

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
    text = str(value).lower()
    if text in ("true", "false") and text not in _choices(rule):
        text = "on" if text == "true" else "off"
    name, at, layer = text.partition("@")
    return f"{name}@{int(layer)}" if at and layer.isdecimal() and len(layer) <= _DIGITS else text


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
        choices = _choices(rule)
        name, at, layer = _spell(value, rule).partition("@")
        return name in choices and (not at or ("SET@LAYER" in choices and layer.isdecimal() and len(layer) <= _DIGITS))
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
