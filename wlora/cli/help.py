"""What `--help` prints: with `method=NAME` of that method, else of the whole command line.

All of it is read from the YAML files and the rules; what a key means is the comment behind it. Nothing here imports torch.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from wlora.config.presets import KEYED_BY, TEXTS, explicit_keys
from wlora.config.schema import config_folder
from wlora.config.validation import RULES

WIDTH = 120
GROUPS = ("task", "model", "train")


def register_help() -> None:
    """Make the text below what `hydra.help.template` interpolates as `${wlora_help:}`."""
    OmegaConf.register_new_resolver("wlora_help", _fill_template, replace=True)


def _fill_template(*, _root_: DictConfig) -> str:
    """Return the help of a composed configuration as a template of Hydra's, in which a dollar is doubled."""
    chosen = "method" in explicit_keys(_root_.hydra.overrides.task)
    return (describe_method(_root_) if chosen else describe_everything(_root_)).replace("$", "$$")


def describe_method(root: DictConfig) -> str:
    """Describe the composed method: what it is, its keys, its authors' values, what its sources leave open."""
    settings: dict[str, Any] = OmegaConf.to_container(root.method, resolve=True)  # type: ignore[assignment]
    rules = settings.get("allowed", {})
    notes = read_comments(config_folder() / "config.yaml")
    notes |= read_comments(config_folder() / "method" / f"{settings['name']}.yaml")
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
    """Describe the command line: the choices of every group, one line per method, the keys that runs turn."""
    folders = [*config_folder().iterdir(), config_folder() / "hydra" / "launcher"]
    names = {folder: folder.relative_to(config_folder()).as_posix() for folder in folders}
    groups = {name: sorted(file.stem for file in folder.glob("*.yaml")) for folder, name in names.items()}
    choices = [_wrap(f"  {name}=", ", ".join(groups[name])) for name in sorted(groups) if groups[name] and name != "method"]
    width = max(len(name) for name in groups["method"])
    methods = [f"    {name:<{width}}  {_about(name)}" for name in groups["method"]]
    notes = read_comments(config_folder() / "config.yaml")
    rows = [(key, value, RULES.get(key, ""), notes[key]) for key, value in root.items() if key in notes]
    rows += [(key, value, "", notes[key.rpartition(".")[2]]) for key, value in _flatten(root.adapter, "adapter")]
    rows += [(f"{group}.preset", root[group].preset, "", notes["preset"]) for group in KEYED_BY]
    for group in GROUPS:
        notes = read_comments(config_folder() / group / f"{root.hydra.runtime.choices[group]}.yaml")
        for key, value in _flatten(root[group], group):
            meaning = notes.get(key.rpartition(".")[2], "")
            if key in RULES or meaning:
                rows.append((key, value, RULES.get(key, ""), meaning))
    parts = [
        root.hydra.help.header.strip(),
        "Choose one of each group:\n\n" + "\n".join([*choices, "  method=", *methods]),
        "A method's own keys, its paper and its authors' values: python -m wlora.run method=NAME --help",
        f"Keys, set as key=value:\n\n{_align(rows)}",
        *_describe_presets(root, "task"),
        root.hydra.help.footer.strip(),
    ]
    return "\n\n".join(parts)


def read_comments(file: Path) -> dict[str, str]:
    """Return the comment behind each key of a YAML file, presets aside."""
    text = file.read_text(encoding="utf-8").partition("presets:\n")[0]
    return dict(re.findall(r"^ *(\w+):[^#\n]*# *(.+)$", text, re.MULTILINE))


def show(value: Any) -> str:
    """Format a value as it is typed on the command line."""
    if isinstance(value, list):
        return f"[{','.join(show(item) for item in value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def show_values(values: dict[str, Any]) -> str:
    """Format settings as the words of a command line."""
    return " ".join(f"{key}={show(value)}" for key, value in values.items())


def _describe_presets(root: DictConfig, group: str) -> Iterator[str]:
    """Describe the presets of the composed task or method: a line for all, and one per method or task."""
    presets: Any = OmegaConf.to_container(root[group].get("presets") or OmegaConf.create())
    for name, preset in presets.items():
        rows = {key.replace("_", " "): value if key in TEXTS else show_values(value) for key, value in preset.items()}
        width = max(len(key) for key in rows)
        lines = [_wrap(f"  {key:<{width}}  ", text) for key, text in rows.items()]
        yield f"{group}.preset={name} sets what is not given explicitly:\n\n" + "\n".join(lines)


def _flatten(node: DictConfig, path: str) -> Iterator[tuple[str, Any]]:
    """Return the values of a node by their full keys, those of presets left out."""
    for name, value in node.items():
        if name in ("preset", "presets"):
            continue
        if isinstance(value, DictConfig):
            yield from _flatten(value, f"{path}.{name!s}")
        else:
            yield f"{path}.{name!s}", value


def _about(name: str) -> str:
    """Return a method's one sentence."""
    content: Any = OmegaConf.load(config_folder() / "method" / f"{name}.yaml")
    return str(content.get("method", content).about)


def _align(rows: list[tuple[Any, Any, str, str]]) -> str:
    """Format (key, value, what is allowed, meaning) as a table, a line per key unless a meaning is long."""
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
    """Wrap a text behind a label, with lines that hang below its start."""
    return textwrap.fill(
        text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label), break_long_words=False, break_on_hyphens=False
    )
