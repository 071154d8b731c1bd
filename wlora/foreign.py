"""YAML from elsewhere (`--config-dir`, `hydra.searchpath`): settings, and no code, whatever Hydra would make of them.

Hydra calls what `_target_` names, Python's logging what `()` and `class` name, as soon as the configuration is composed.
What comes with this program and with Hydra's plugins may do so; a file that somebody passed on may not. Nothing here
imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wlora.errors import ConfigError

# What may be named: the launchers and sweepers of Hydra, the handlers and formatters of Python's logging.
_KNOWN = {"_target_": ("hydra_plugins.", "hydra._internal.core_plugins."), "class": ("logging.", "colorlog.")}
_NEVER = ("()", "searchpath")


def refuse_code(words: Sequence[str]) -> None:
    """Refuse a command line that leads Hydra to code in somebody else's files.

    Raises:
        ConfigError: a pickle to start from, or a YAML file that names something to call.
    """
    from hydra._internal.utils import get_args_parser

    given, _ = get_args_parser().parse_known_args(list(words))
    if given.experimental_rerun:
        raise ConfigError(
            f"--experimental-rerun={given.experimental_rerun}: a pickle, which can run anything, is never read\n"
            "way out: from=RUN_ID repeats a recorded run"
        )
    folders = [given.config_dir, given.config_path]
    for word in words:
        if word.lstrip("+").startswith("hydra.searchpath="):
            folders += [text.removeprefix("file://") for text in re.split(r"[][\s,'\"]+", word.partition("=")[2])]
    for folder in filter(None, folders):
        for file in sorted(Path(folder).rglob("*.y*ml")):
            _refuse_in(file)


def _refuse_in(file: Path) -> None:
    """Refuse one file; one that cannot be read is left to Hydra, which will not read it either."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException):
        return
    for key, value in _walk(content):
        named = str(value)
        if key in _NEVER or named.startswith("ext://") or (key in _KNOWN and not named.startswith(_KNOWN[key])):
            raise ConfigError(f"{file}: {key}: {named[:80]} would run code: allowed are settings")


def _walk(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of a nested value, the inner ones of `a.b` apart, with what stands there."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _walk(value, str(name).rpartition(".")[2])
            if isinstance(value, dict | list):
                yield str(name).rpartition(".")[2], "..."
    elif isinstance(content, list):
        for value in content:
            yield from _walk(value, key)
    else:
        yield key, content
