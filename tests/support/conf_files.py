"""What stands in the files of conf/, and the keys that some methods need on models as narrow as those of the tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from omegaconf import OmegaConf

from wlora.config.schema import config_folder

# NoRA's frame of rank 64 is wider than a tiny model.
FITTING = {"nora": ["method.outer_rank=16"]}


def options(group: str) -> list[str]:
    """Return the choices of a group, as in `options("task")`."""
    return sorted(file.stem for file in (config_folder() / group).glob("*.yaml"))


def read(group: str, name: str) -> dict[str, Any]:
    """Return the content of a YAML as it stands there, interpolations included."""
    content: Any = OmegaConf.to_container(OmegaConf.load(config_folder() / group / f"{name}.yaml"))
    return dict(content)


def read_method(name: str) -> dict[str, Any]:
    """Return the keys of a method's YAML as they stand there, interpolations and rules included."""
    content = read("method", name)
    return dict(content.get("method", content))


METHODS = options("method")

# The methods of the paper's claims, and one of each kind of change of structure.
QUICK = {"full", "lora", "wlora", "wlora_plus", "rlora", "adalora", "increlora", "lora_drop"}


RELEASED = ("wlora compat=release", "wlora_plus compat=release")


def whole_runs(methods: Iterable[str] = METHODS) -> list[Any]:
    """Return methods, which more words may follow, as parameters of a test that trains each; `QUICK` are not slow."""
    return [words if words.split()[0] in QUICK else pytest.param(words, marks=pytest.mark.slow) for words in methods]
