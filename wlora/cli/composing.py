"""Composing a command's configurations once; Hydra alone composes each of them two or three times.

Hydra composes the whole configuration to look for `hydra.mode`, then again to run it. Of a sweep, it composes every run to
check it before the first one starts, and again when the run starts. Copying a configuration takes less than a tenth of the
time of composing it. The runs of a sweep that choose the same files differ only in the keys that are set afterwards. For
`--help`, Hydra lists all groups twice, even if the text does not contain them; that takes five times as long as the rest of
the help.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf

# A copy takes about 1 MB. Runs of a longer sweep are composed again.
MOST_KEPT = 256


@contextmanager
def composing_once() -> Iterator[None]:
    """Context manager for one command: what Hydra has already composed from the same words is copied."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.hydra import Hydra

    compose, find_mode, fill_help = ConfigLoaderImpl.load_configuration, Hydra.get_mode, Hydra.get_help
    kept: dict[Any, DictConfig] = {}

    def load_configuration(
        self: Any, config_name: str | None, overrides: list[str], *given: Any, **named: Any
    ) -> DictConfig:
        key = (config_name, *overrides, given, *sorted(named.items()), os.getcwd())  # the folder becomes part of it
        if key in kept:
            return copy.deepcopy(kept[key])
        composed: DictConfig = compose(self, config_name, overrides, *given, **named)
        if len(kept) < MOST_KEPT:
            kept[key] = copy.deepcopy(composed)  # callers change theirs
        return composed

    def get_mode(self: Any, config_name: str | None, overrides: list[str]) -> Any:
        # No file may set it (`wlora.config.untrusted_yaml`).
        chosen = any("hydra" in word and "mode" in word for word in overrides)
        return find_mode(self, config_name, overrides) if chosen else None

    def get_help(self: Any, help_cfg: DictConfig, *given: Any, **named: Any) -> Any:
        if "CONFIG_GROUPS" not in str(OmegaConf.to_container(help_cfg, resolve=False)):
            self.format_config_groups = lambda *_, **__: ""
        return fill_help(self, help_cfg, *given, **named)

    ConfigLoaderImpl.load_configuration, Hydra.get_mode, Hydra.get_help = load_configuration, get_mode, get_help
    try:
        with merging_once():
            yield
    finally:
        ConfigLoaderImpl.load_configuration, Hydra.get_mode, Hydra.get_help = compose, find_mode, fill_help


@contextmanager
def merging_once() -> Iterator[None]:
    """Context manager: the files that the same choices of groups select are read and merged once, then copied.

    The files must not change inside it. Within another one it has no effect.
    """
    from hydra._internal import config_loader_impl
    from hydra._internal.defaults_list import DefaultsList, Overrides

    loader = config_loader_impl.ConfigLoaderImpl
    if config_loader_impl.create_defaults_list.__module__ == __name__:
        yield
        return
    find, merge = config_loader_impl.create_defaults_list, loader._compose_config_from_defaults_list
    found: dict[Any, DefaultsList] = {}
    merged: dict[int, DictConfig] = {}

    def create_defaults_list(repo: Any, config_name: str | None, overrides_list: list[Any], **options: bool) -> DefaultsList:
        keys = Overrides(repo, overrides_list).config_overrides
        groups = [word for word in overrides_list if word not in keys and not word.is_sweep_override()]
        places = [(source.provider, source.scheme(), source.path) for source in repo.get_sources()]
        key = (config_name, *places, *(word.input_line for word in groups), *sorted(options.items()))
        if key not in found:
            found[key] = find(repo, config_name, groups, **options)
        return dataclasses.replace(found[key], config_overrides=keys)

    def compose_config(self: Any, defaults: list[Any], repo: Any) -> DictConfig:
        key = id(defaults)  # `found` keeps the list
        if key not in merged:
            merged[key] = merge(self, defaults, repo)
        return copy.deepcopy(merged[key])

    config_loader_impl.create_defaults_list = create_defaults_list
    loader._compose_config_from_defaults_list = compose_config
    try:
        yield
    finally:
        config_loader_impl.create_defaults_list, loader._compose_config_from_defaults_list = find, merge
