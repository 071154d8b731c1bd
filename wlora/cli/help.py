"""The text of `--help`: about one method with `method=NAME`, otherwise about the whole command line.

The text is generated from the schema and, for a method, from its YAML file, where the comment after a key is its meaning.
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from wlora.config.presets import TEXTS, explicit_keys
from wlora.config.rules import RULES
from wlora.config.schema import config_folder, read_method, walk

WIDTH = 120
MEANINGS = {name: part.metadata["meaning"] for name, part in walk()}
# Keys that are set in the YAML file of a task or model, not on the command line.
_FILES = {
    "task": "name kind benchmark hub_id subset generator columns labels validation_path metrics primary_metric",
    "model": "name hub_id package sha256 architecture accumulation_steps k",
}
_UNSEEN = (
    "method",
    "per_task",
    "task.train_rows",
    "task.presets",
    *(f"{group}.{name}" for group, names in _FILES.items() for name in names.split()),
)
_TYPES = {
    "dict[str, Any]": "mapping",
    "Any": "text, number or list",
    "bool": "true | false",
    "str": "text",
    "list[str]": "list of texts",
    "int": "int",
    "float": "float",
}


def register_help() -> None:
    """Register the resolver `${wlora_help:}`, which `hydra.help.template` uses."""
    OmegaConf.register_new_resolver("wlora_help", _fill_template, replace=True)


def _fill_template(*, _root_: DictConfig) -> str:
    """Return the help text for a composed configuration, escaped for Hydra's template (`$` is written `$$`)."""
    chosen = "method" in explicit_keys(_root_.hydra.overrides.task)
    return (describe_method(_root_) if chosen else describe_everything(_root_)).replace("$", "$$")


def describe_method(root: DictConfig) -> str:
    """Describe the chosen method: summary, keys, its authors' values, and points where its sources are ambiguous."""
    settings: dict[str, Any] = OmegaConf.to_container(root.method, resolve=True)  # type: ignore[assignment]
    rules = settings.get("allowed", {})
    notes = MEANINGS | read_comments(config_folder() / "method" / f"{settings['name']}.yaml")
    shared = [key for key in settings if key in RULES and key not in rules] + ["lr", "warmup"]
    rows = [(key, root[key], RULES[key], notes.get(key, "")) for key in shared]
    rows += [(f"method.{key}", settings[key], rules[key], notes.get(key, "")) for key in settings if key in rules]
    parts = [
        f"method={settings['name']}",
        _wrap("", settings["about"]) + "\n" + _wrap("Paper: ", settings["paper"]),
        f"Its keys, set as key=value:\n\n{_align(rows)}",
        *_describe_presets(root, "method"),
    ]
    if "presets" not in settings:
        parts.append("Its authors' values for GLUE are not known: no method.preset.")
    if settings.get("ambiguous"):
        items = [_wrap("  - ", item) for item in settings["ambiguous"]]
        parts.append("Ambiguous in the sources, and what is done here:\n\n" + "\n".join(items))
    parts.append("All other keys and methods: python -m wlora.run --help")
    return "\n\n".join(parts)


def describe_everything(root: DictConfig) -> str:
    """Describe the command line: the choices of every group, one line per method, and the shared keys."""
    folders = [*config_folder().iterdir(), config_folder() / "hydra" / "launcher"]
    names = {folder: folder.relative_to(config_folder()).as_posix() for folder in folders}
    groups = {name: sorted(file.stem for file in folder.glob("*.yaml")) for folder, name in names.items()}
    choices = [_wrap(f"  {name}=", ", ".join(groups[name])) for name in sorted(groups) if groups[name] and name != "method"]
    width = max(len(name) for name in groups["method"])
    methods = [f"    {name:<{width}}  {read_method(name)['about']}" for name in groups["method"]]
    shown = [(name, part) for name, part in walk() if name not in _UNSEEN]
    rows = [(name, OmegaConf.select(root, name), allowed(part), part.metadata["meaning"]) for name, part in shown]
    rows.append(
        ("method.preset", root.method.preset, "", "published values for all keys that are not set explicitly: authors")
    )
    parts = [
        root.hydra.help.header.strip(),
        "Choose one of each group:\n\n" + "\n".join([*choices, "  method=", *methods]),
        "A method's own keys, its paper and its authors' values: python -m wlora.run method=NAME --help",
        f"Keys, set as key=value:\n\n{_align(rows)}",
        *_describe_presets(root, "task"),
        root.hydra.help.footer.strip(),
    ]
    return "\n\n".join(parts)


def allowed(part: dataclasses.Field[Any]) -> str:
    """Return the allowed values of a key: its rule, or else its type."""
    kind, _, null = str(part.type).partition(" | ")
    return part.metadata["rule"] or _TYPES[kind] + (" or null" if null else "")


def list_keys() -> str:
    """Return the table of all shared keys for the documentation, in Markdown."""
    lines = ["| key | default | allowed | meaning | decides |", "|---|---|---|---|---|"]
    for name, part in walk():
        default = part.default_factory() if callable(part.default_factory) else part.default
        shown = "" if default == MISSING else f"`{show(default)}`"
        cells = [f"`{name}`", shown, allowed(part), part.metadata["meaning"], part.metadata["decides"]]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def read_comments(file: Path) -> dict[str, str]:
    """Return the comment after each key of a YAML file, without the presets."""
    text = file.read_text(encoding="utf-8").partition("presets:\n")[0]
    return dict(re.findall(r"^ *(\w+):[^#\n]*# *(.+)$", text, re.MULTILINE))


def show(value: Any) -> str:
    """Format a value as it is typed on the command line."""
    if isinstance(value, list | ListConfig):
        return f"[{','.join(show(item) for item in value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def show_values(values: dict[str, Any]) -> str:
    """Format settings as the words of a command line."""
    return " ".join(f"{key}={show(value)}" for key, value in values.items())


def _describe_presets(root: DictConfig, group: str) -> Iterator[str]:
    """Describe the presets of the chosen task or method: one line for `all` and one per method or task."""
    presets: Any = OmegaConf.to_container(root[group].get("presets") or OmegaConf.create())
    for name, preset in presets.items():
        rows = {key.replace("_", " "): value if key in TEXTS else show_values(value) for key, value in preset.items()}
        width = max(len(key) for key in rows)
        lines = [_wrap(f"  {key:<{width}}  ", text) for key, text in rows.items()]
        yield f"{group}.preset={name} sets what is not given explicitly:\n\n" + "\n".join(lines)


def _align(rows: list[tuple[Any, Any, str, str]]) -> str:
    """Format (key, value, allowed, meaning) as an aligned table; long meanings are wrapped."""
    table = [
        ("key", "value", "allowed", "meaning"),
        *((str(key), show(value), rule, note) for key, value, rule, note in rows),
    ]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = []
    for *cells, meaning in table:
        label = "".join(f"  {cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(_wrap(f"{label}  ", meaning) if meaning else label.rstrip())
    return "\n".join(lines)


def _wrap(label: str, text: str) -> str:
    """Wrap a text after a label, with a hanging indent of the label's length."""
    return textwrap.fill(
        text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label), break_long_words=False, break_on_hyphens=False
    )
