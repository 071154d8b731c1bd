"""What values a key may have. Nothing here imports torch.

A rule is a short text that is also the message: `int >= 1`, `float >= 0, < 1`, `int >= 1 or null`,
`float > 0 or tuned`, `single | halvings`. The rules of the shared keys stand in the schema; a method's stand in its own
YAML under `allowed`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container
from typing import Any

from wlora.config.schema import Config, walk
from wlora.errors import wrong_value

_DIGITS = 6  # of a layer's number

RULES: dict[str, str] = {name: part.metadata["rule"] for name, part in walk() if part.metadata["rule"]}
"""The rules of the shared keys, by their full names."""

_COMPARISONS = {
    ">=": lambda value, bound: value >= bound,
    ">": lambda value, bound: value > bound,
    "<=": lambda value, bound: value <= bound,
    "<": lambda value, bound: value < bound,
}


def canonical(value: Any, rule: str) -> Any:
    """Return the one spelling of a value under a rule of choices; any other value as it is.

    Choices are in lower case, `true` and `false` are booleans, and YAML's booleans stand for `on` and `off`.
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
    """Tell whether a value, in any spelling, obeys a rule; raises ValueError for a rule that cannot be read."""
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
    """Check the shared keys against their rules, and put choices into their one spelling.

    Args:
        rewritten: the keys whose spelling may change; what a record's run was asked for keeps its own.

    Raises:
        ConfigError: a value outside its rule.
    """
    for key, rule in RULES.items():
        value = check(key, look_up(config, key), rule)
        if key in rewritten:
            *parents, name = key.split(".")
            setattr(look_up(config, ".".join(parents)) if parents else config, name, value)


def look_up(config: Config, key: str) -> Any:
    """Return the value of a key by its full name."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check(key: str, value: Any, rule: str) -> Any:
    """Return the canonical value of a key; ConfigError for one outside its rule."""
    if not satisfies(value, rule):
        raise wrong_value(key, "null" if value is None else value, rule)
    return canonical(value, rule)
