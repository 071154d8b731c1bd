"""Checks of command-line arguments: syntax errors, unknown keys, and keys that the chosen method does not read.

Also adds the quotes that Hydra needs around texts, and expands home folders in paths.

Every error is one or two lines and suggests what was probably meant. This module does not import torch.

In this module a *word* is one command-line argument, such as `lr=1e-3`.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from omegaconf import DictConfig, OmegaConf

from wlora.config.schema import METHOD_NOTES, Config, config_folder, method_names, read_method
from wlora.errors import ConfigError, shorten, unknown_name, wrong_value

# Top-level keys that a method reads only if its configuration interpolates them.
SHORT = ("rank", "alpha", "dropout", "k", "targets")


class Idle(NamedTuple):
    """Keys that a method ignores while one of its own keys has certain values.

    Attributes:
        method: name of the method.
        own: the method's own key that decides.
        holds: tells whether `keys` are ignored, given the value of `own`.
        keys: full names of the ignored keys.
    """

    method: str
    own: str
    holds: Callable[[Any], bool]
    keys: tuple[str, ...]


_OMEGA = ("lr_omega", "select_steps", "project_every", "omega_scheduled", "omega_clipped")
_IDLE = (
    Idle("wlora_plus", "schedule", lambda schedule: str(schedule).lower() == "halvings", ("k",)),
    Idle("wlora_depth", "rule", lambda rule: str(rule).lower() == "once", ("method.project_every",)),
    Idle("rlora", "draw", lambda draw: str(draw).lower() == "at_start", tuple(f"method.{key}" for key in _OMEGA)),
    Idle("lora_drop", "threshold", lambda threshold: threshold is not None, ("method.keep",)),
)

# Keys whose value is a path, a name or a column: Hydra cannot read all characters that these may have.
_TEXTS = (
    *("task.path", "task.name", "task.text", "task.label", "task.validation"),
    *("model.path", "model.name", "model.gguf_file", "adapter.path", "results_dir"),
)
# Values without a character that Hydra reads only in quotes.
_PLAIN = re.compile(r"[\w/\\+.$%*@?|: -]*", re.ASCII)

# Names of keys in transformers, PEFT and the paper, with our names (last component).
SYNONYMS = {
    "learning_rate": "lr",
    "r": "rank",
    "t": "select_steps",
    "train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "accumulation_steps",
    "max_seq_length": "max_length",
    "max_train_samples": "max_train_rows",
    "max_eval_samples": "max_eval_rows",
    "target_modules": "targets",
    "dataset": "task",
    "output_dir": "results_dir",
}


def check_form(words: Sequence[str]) -> None:
    """Reject arguments that are neither Hydra flags nor `key=value`.

    Raises:
        ConfigError: names the first wrong argument and its correct form.
    """
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise ConfigError(message)

    parser = get_args_parser()
    parser.error = refuse
    given, unknown = parser.parse_known_args(list(words))
    for word in unknown:
        if not word.startswith("-"):
            raise ConfigError(f"{word}: flags such as -m must come before or after all keys, not between them")
        name, _, value = word.lstrip("-").partition("=")
        following = words[words.index(word) + 1 :][:1]
        if not value and following and "=" not in following[0] and not following[0].startswith("-"):
            word, value = f"{word} {following[0]}", following[0]
        name = next(iter(find_keys(name)), name)
        raise ConfigError(f"{word}: keys have no dashes; write {name}={value or _sample(name)}")
    for index, word in enumerate(given.overrides):
        if "=" not in word and not word.startswith("~"):
            raise _not_an_assignment(given.overrides, index)


def quote_texts(words: Sequence[str]) -> list[str]:
    """Return the arguments with quotes around texts that Hydra cannot read without them, as in `task.path=données.csv`.

    This holds for the keys in `_TEXTS`. Quotes, lists, sweeps, and values that Hydra can read are not changed.
    """
    return [_quote_text(word) for word in words]


def _quote_text(word: str) -> str:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, value = word.partition("=")
    if key.lstrip("+") not in _TEXTS or _PLAIN.fullmatch(value) or "," in value or _is_enclosed(value):
        return word
    parser = OverridesParser.create()
    if value.partition("(")[0].strip() in parser.functions.definitions and value.endswith(")"):
        return word
    try:
        parser.parse_overrides([word])
    except HydraException:
        return f"{key}={_quote(value.strip(), single=True)}"
    return word


def _is_enclosed(value: str) -> bool:
    """Tell whether a value is already in quotes, or is a list or mapping."""
    return len(value) > 1 and value[0] + value[-1] in ("''", '""', "[]", "{}")


def _quote(text: str, *, single: bool = False) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return str(QuotedString(text, Quote.single if single else Quote.double).with_quotes())


def expand_home(key: str, path: str) -> str:
    """Return a path with the home folder in place of `~` or `~NAME` at its start.

    Raises:
        ConfigError: there is no such home folder; `key` is for the message.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise wrong_value(key, path, f"a path in an existing home folder, or ./{path} for a name that begins with ~")
    return found


def _not_an_assignment(words: Sequence[str], index: int) -> ConfigError:
    """Build the error for a word without `=`. Often the user has typed spaces around `=` or after a comma."""
    word, before, (after, beyond) = words[index], words[index - 1] if index else "", [*words[index + 1 :], "", ""][:2]
    if before.endswith((",", "=")):
        return ConfigError(f"{before} {word}: write {before}{word}, without spaces")
    if after.startswith("="):
        cut = f"{word} {after}" if after != "=" else f"{word} = {beyond}"
        return ConfigError(f"{cut.rstrip()}: write {cut.replace(' ', '')}, without spaces")
    group = next((file.parent.name for file in sorted(config_folder().glob("*/*.yaml")) if file.stem == word), None)
    if group:
        return ConfigError(f"{word}: write {group}={word}")
    name, _, value = word.partition(":")
    if not value and after and "=" not in after:
        word, value = f"{word} {after}", after
    name = next(iter(find_keys(name)), name)
    return ConfigError(f"{word}: write {name}={value or _sample(name)}")


def _sample(key: str) -> str:
    """Return an example value for a key whose value the user has omitted."""
    default = OmegaConf.select(OmegaConf.structured(Config), key, default=None) if re.fullmatch(r"[\w.]+", key) else None
    return "true" if isinstance(default, bool) else "VALUE"


def swept_keys(config: DictConfig) -> frozenset[str]:
    """Return the keys that a sweep varies, set on the command line or in the experiment file.

    Args:
        config: the configuration of the sweep, composed by Hydra.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    keys = {str(key) for key in OmegaConf.select(config, "hydra.sweeper.params") or ()}
    words: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    for override in OverridesParser.create().parse_overrides(words):
        if override.is_sweep_override():
            keys.add(override.key_or_group)
        else:
            keys.discard(override.key_or_group)
    return frozenset(keys)


def check_read(runs: Sequence[Sequence[str]], compose: Callable[[Sequence[str]], DictConfig]) -> list[str]:
    """Find keys that a command sets but its runs do not read. Forced keys (`++k=3`) are not checked.

    Args:
        runs: the command-line arguments of each run.
        compose: returns the configuration of a run, interpolations unresolved, given the run's arguments.

    Returns:
        Notices for the user about keys that only some of the runs read.

    Raises:
        ConfigError: a key that no run reads.
    """
    watched = {*SHORT, *(key for rule in _IDLE for key in rule.keys)}
    deciding = {"experiment", "method", "method.preset", *(f"method.{rule.own}" for rule in _IDLE)}
    kinds: dict[tuple[str, ...], Sequence[str]] = {}
    for words in runs:  # composing is slow, and runs that agree in `deciding` read the same keys
        kinds.setdefault(tuple(word for word in words if word.partition("=")[0] in deciding), words)
    read: set[str] = set()
    unread: dict[str, dict[str, str]] = {}
    for words in kinds.values():
        given = {word.partition("=")[0]: word for word in words if word.partition("=")[0] in watched}
        composed = compose(words) if given else OmegaConf.create()
        for key, word in given.items():
            reason = _why_unread(composed, key)
            if reason is None:
                read.add(key)
            else:
                unread.setdefault(key, {})[reason] = word
    for key, reasons in unread.items():
        if key not in read:
            word = next(iter(reasons.values()))
            raise ConfigError(f"{word}: {key} is not read by {', '.join(reasons)}\nway out: remove it; it has no effect")
    return [f"{key} is not read by {', '.join(reasons)}" for key, reasons in unread.items()]


def _why_unread(composed: DictConfig, key: str) -> str | None:
    """Return the setting because of which a run ignores a key; None if the run reads the key."""
    name = composed.method.get("name")
    content: Any = OmegaConf.to_container(composed, resolve=False)
    content.pop("hydra", None)  # it repeats the command line, which would look like an interpolation
    if key in SHORT and f"${{{key}}}" not in str(content):
        return f"method={name}"
    for rule in _IDLE:
        if rule.method == name and key in rule.keys and rule.holds(composed.method[rule.own]):
            return f"method={name} method.{rule.own}={composed.method[rule.own]}"
    return None


def explain(error: Exception, words: Sequence[str] = ()) -> str:
    """Shorten an error of Hydra or OmegaConf to one or two lines: the key, the value and what is allowed.

    Args:
        error: the exception of Hydra or OmegaConf.
        words: the command-line arguments, if known.
    """
    text = f"{error}\n{error.__cause__ or ''}"
    missing = re.search(r"Could not find '([\w-]+)/([^']+)'", text)
    if missing:
        group, name = missing.groups()
        return str(unknown_name(f"{group}={name}", name, _group_options(group), say=lambda near: f"{group}={near}"))
    key = re.search(r"full_key: (\S+)", text)
    value = re.search(r"Value '([^']*)'|Cannot convert '([^']*)'", text)
    if key and value:
        return f"{key[1]}={value[1] or value[2]}: allowed is {_expected(key[1], text)}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        return str(unknown_key(unknown[1], words))
    sweep = re.search(r"Ambiguous value for argument '(.+)'|Sweep parameters '(.+)' requires", text)
    if sweep:
        swept = shorten(sweep[1] or sweep[2])
        told = f"{swept}: several values are a sweep; add -m, as in python -m wlora.run -m {shlex.quote(swept)}"
        name, _, given = swept.partition("=")
        one = shlex.quote(f"{name}={_quote(given)}")
        return f"{told}\na single text with a comma needs quotes: {one}" if name in _TEXTS else told
    word = getattr(error, "override", None)
    if word is not None and not str(error).startswith("Error parsing override"):  # an error of syntax, not of a function
        return _explain_syntax(word)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__


def _explain_syntax(word: str) -> str:
    """Explain a word that Hydra cannot read: name it, and show it with quotes, or the rule of its key."""
    from wlora.config.rules import RULES

    if not word.isprintable():
        return f"{shorten(word)}: the value cannot be read; allowed are printable characters"
    key, _, value = word.partition("=")
    listed = len(value) > 1 and value[0] + value[-1] == "[]"
    inside = value[1:-1] if listed else value
    strange = next((character for character in inside if character != "," and not _PLAIN.fullmatch(character)), None)
    told = f"{shorten(word)}: the value cannot be read" + (f" because of {strange}" if strange else "")
    if key.lstrip("+") in RULES:
        return f"{told}\nallowed is {RULES[key.lstrip('+')]}"
    each = ",".join(_quote(item.strip()) for item in inside.split(","))
    forms = [f"[{each}]"] if listed else list(dict.fromkeys([_quote(value), each]))
    return f"{told}\nway out: quotes, as in {' or '.join(shlex.quote(f'{key}={form}') for form in forms)}"


def unknown_key(key: str, words: Sequence[str] = ()) -> ConfigError:
    """Build the error for an unknown key. It suggests the key that was probably meant, else lists the keys of its section.

    Args:
        key: the key as the user wrote it.
        words: the command-line arguments; the methods chosen there determine which `method` keys exist.
    """
    owners = method_keys()
    chosen = [name for word in words if word.startswith("method=") for name in word[len("method=") :].split(",")]
    found = find_keys(key)
    for near in found:
        names = owners.get(near, [])
        if chosen and names and not set(chosen) <= set(names):
            others = ",".join(name for name in chosen if name not in names)
            said = key if near == key else f"{key} is unknown; {near}"
            return ConfigError(f"{said} is a key of method={','.join(names)}, not of method={others}")
    if found:
        return ConfigError(f"{key} is unknown; did you mean {' or '.join(found)}?")
    parent = key.rpartition(".")[0]
    able = [near for near, names in owners.items() if not chosen or set(chosen) & set(names)] + ["method.preset"]
    known = [*_schema_keys(), *able]
    beside = [near for near in known if near.rpartition(".")[0] == parent] or [n for n in known if "." not in n]
    near = max(known, key=lambda near: _likeness(near, key))
    hint = f"; did you mean {near}?" if _likeness(near, key) > 0.6 else ""
    return ConfigError(f"{key} is unknown{hint}\nallowed: {', '.join(sorted(beside))}")


def find_keys(key: str) -> list[str]:
    """Return existing keys with the same last component, in any case, or of which this is a known synonym.

    Only the keys with the fewest components are returned: `rank` rather than `method.rank`.
    """
    name = key.rpartition(".")[2].lower().replace("-", "_")
    bare = re.sub(r"^(lora|num)_|_(name|steps)$", "", name)
    known = [*_schema_keys(), *method_keys()]
    for form in (name, SYNONYMS.get(name), bare, SYNONYMS.get(bare)):
        found = [near for near in known if near.rpartition(".")[2] == form and form != "name"]
        if found:
            shortest = min(near.count(".") for near in found)
            return sorted(near for near in found if near.count(".") == shortest)
    return []


def _likeness(known: str, key: str) -> float:
    """Return the similarity of the last components of two keys (0 to 1), plus 0.1 if they are in the same section."""
    (place, _, name), (other_place, _, other) = known.rpartition("."), key.rpartition(".")
    return difflib.SequenceMatcher(None, name, other).ratio() + (0.1 if place == other_place else 0)


def _schema_keys() -> list[str]:
    """Return the full keys of the schema, sections included, without the methods' own keys."""

    def walk(node: DictConfig, path: str) -> Iterator[str]:
        # keys() also yields keys whose value is missing. The content of presets cannot be set.
        for name in (name for name in node.keys() if name != "presets"):  # noqa: SIM118
            yield f"{path}{name!s}"
            child = None if OmegaConf.is_missing(node, name) else node[name]
            if isinstance(child, DictConfig):
                yield from walk(child, f"{path}{name!s}.")

    return list(walk(OmegaConf.structured(Config), ""))


def method_keys() -> dict[str, list[str]]:
    """Map every method's own full keys to the names of the methods that have them."""
    owners: dict[str, list[str]] = {}
    for method in method_names():
        for name in read_method(method):
            if name not in METHOD_NOTES:
                owners.setdefault(f"method.{name}", []).append(method)
    return owners


def _expected(key: str, text: str) -> str:
    """Return the allowed values of a key: its rule if it has one, else the type that OmegaConf expected."""
    from wlora.config.rules import RULES

    if key in RULES:
        return RULES[key]
    match = re.search(r"could not be converted to (\w+)|to supported type '([^']+)'|is not a valid (\w+)", text)
    return next(filter(None, match.groups())).lower() if match else "a value of another type"


def _group_options(group: str) -> list[str]:
    return [file.stem for file in (config_folder() / group).glob("*.yaml")]
