"""Checks of YAML files from outside the package (`--config-dir`, `hydra.searchpath`): they may only contain run settings.

In Hydra's YAML files, `_target_` can call any function, and other keys set environment variables or configure logging. A
file from another person could therefore run arbitrary code. This module restricts external files to the keys of our own
groups. The check runs where Hydra opens a file, so the checked content is exactly the content that is used, no matter how
Hydra found the file. This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra._internal.core_plugins import file_config_source, importlib_resources_config_source
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wlora.config.schema import METHOD_NOTES, Config, config_folder
from wlora.config.spelling import method_keys
from wlora.errors import ConfigError
from wlora.reading import open_file

SECTIONS = ("task", "model", "method", "train")
GLOBAL = ("experiment", "hardware")
"""Groups whose files may set keys of all sections (Hydra package `_global_`)."""
MOST_BYTES, MOST_DEPTH = 1 << 16, 12

# Launcher settings that external files may set. Settings that contain commands are excluded: `setup`, `python`,
# `additional_parameters` and others.
RESOURCES = (
    *("timeout_min", "signal_delay_s", "max_num_timeout", "array_parallelism", "nodes", "tasks_per_node", "cpus_per_task"),
    *("gpus_per_node", "gpus_per_task", "cpus_per_gpu", "mem_gb", "mem_per_cpu", "mem_per_gpu", "gres", "constraint"),
    *("exclude", "partition", "account", "qos", "n_jobs", "ray.remote.num_cpus", "ray.remote.num_gpus"),
)
# Output locations may only be set on the command line. Presets are excluded because they can set any key.
_NEVER = ("results_dir", "track", "task.presets", "method.presets")
_ALLOWED = f"keys of {', '.join((*SECTIONS, *GLOBAL))}, hydra.sweeper.params and resources in hydra.launcher"
_REFERENCE = re.compile(r"\$\{(\w+)(?:\.(?:\w+|\$\{(?:task|model|method)\.name\}))*\}")
_KEYS = {field.name for field in dataclasses.fields(Config)}


def refuse_words(words: Sequence[str]) -> None:
    """Reject Hydra flags that replace this program's configuration.

    Raises:
        ConfigError: `--experimental-rerun` (loads a pickle), `--config-path`, or a `--config-name` other than `config`.
    """
    from hydra._internal.utils import get_args_parser

    given, _ = get_args_parser().parse_known_args(list(words))
    if given.experimental_rerun:
        raise ConfigError(
            f"--experimental-rerun={given.experimental_rerun}: a pickle, which can run anything, is never read\n"
            "way out: from=RUN_ID repeats a recorded run"
        )
    if given.config_path:
        raise ConfigError(f"--config-path={given.config_path}: allowed is --config-dir=DIR, which adds DIR's files to ours")
    if given.config_name not in (None, "config"):
        raise ConfigError(f"--config-name={given.config_name}: allowed is experiment=NAME, a file experiment/NAME.yaml")


def guard_files() -> None:
    """Make Hydra read YAML files through the checking classes below, in this process and in launcher processes."""
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins

    Plugins.instance()  # registers Hydra's own classes, which the next line replaces
    SourcesRegistry.instance().types.update(file=FileConfigSource, pkg=ImportlibResourcesConfigSource)


# Both classes have the names of Hydra's own classes, because Hydra's registry compares class names when launchers restore it
# in another process.
class ImportlibResourcesConfigSource(importlib_resources_config_source.ImportlibResourcesConfigSource):  # type: ignore[misc]
    """Config source for the files of Hydra and its plugins.

    Packages named in `hydra.searchpath` are rejected, because listing their files would import them.
    """

    def __init__(self, provider: str, path: str) -> None:
        if provider.startswith("hydra.searchpath"):
            raise ConfigError(f"hydra.searchpath: {path}: allowed are folders")
        super().__init__(provider=provider, path=path)


class FileConfigSource(file_config_source.FileConfigSource):  # type: ignore[misc]
    """Config source for folders. Packaged files are read unchecked, all others are checked. Symbolic links are resolved."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one file, given by its group and name.

        Raises:
            ConfigError: an external file cannot be read, is too large, or sets a key that it must not set.
        """
        file = Path(self.path, self._normalize_file_name(config_path))
        target = file.resolve()
        if target.is_relative_to(config_folder().resolve()):
            # Read the resolved path: the target of a link could change between the check and the read.
            own = file_config_source.FileConfigSource(provider=self.provider, path=f"file://{target.parent}")
            found = own.load_config(target.name)
            return dataclasses.replace(found, path=f"{self.scheme()}://{self.path}")
        try:
            with open_file(file) as stream:
                content = stream.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                _refuse(file, f"more than {MOST_BYTES >> 10} KiB", "a file of settings")
            text = content.decode()
            _check_form(file, text)
            config = OmegaConf.load(io.StringIO(text))
            header = ConfigSource._get_header_dict(text[:512])
            _check_content(
                file, config_path.split("/"), header.get("package"), OmegaConf.to_container(config, resolve=False)
            )
        except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"{file}: cannot be read ({type(error).__name__}: {reason})") from None
        return ConfigResult(config=config, path=f"{self.scheme()}://{self.path}", provider=self.provider, header=header)


def _refuse(file: Path, found: str, allowed: str) -> NoReturn:
    shown = "".join(sign if sign.isprintable() else " " for sign in found[:80])
    raise ConfigError(f"{file}: {shown}: allowed in a file from outside the package: {allowed}")


def _check_form(file: Path, text: str) -> None:
    """Reject YAML that could expand without bound (deep nesting, aliases) or that interpolates anything but our keys."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            _refuse(file, f"more than {MOST_DEPTH} levels", "a file of settings")
        if isinstance(event, yaml.AliasEvent):
            _refuse(file, f"*{event.anchor}", "values spelled out, or ${KEY}")
        if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            reference = _REFERENCE.fullmatch(event.value)
            if reference is None or reference[1] not in _KEYS:
                _refuse(file, event.value, "${KEY} with a key of this program")


def _check_content(file: Path, place: Sequence[str], package: str | None, content: Any) -> None:
    """Reject a file that is outside our groups or sets keys that it must not set.

    Args:
        place: group and name in Hydra's search.
        package: the value of `# @package` in the file's header; None without a header.
        content: the file's content with unresolved interpolations.
    """
    group = place[0]
    if group not in (*SECTIONS, *GLOBAL) or len(place) < 2 or ".." in place:
        _refuse(file, "/".join(place), f"files in the folders {', '.join((*SECTIONS, *GLOBAL))}")
    own = ("_global_",) if group in GLOBAL else ("_global_", "_group_", group, None)
    if package not in own:
        _refuse(file, f"# @package {package}", f"# @package {' | '.join(filter(None, own))}, in the first line")
    if not isinstance(content, dict):
        _refuse(file, type(content).__name__, "key: value")
    defaults = content.pop("defaults", [])
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        if not _may_choose(entry, group):
            _refuse(file, f"defaults: {entry}", f"_self_, the name of a packaged {group}, override /GROUP: NAME")
    for path, value in _leaves(content, () if package == "_global_" else (group,)):
        if not _may_set(path, value):
            _refuse(file, f"{'.'.join(path)}: {value}", _ALLOWED)


def _may_choose(entry: Any, group: str) -> bool:
    """Tell whether an entry of a defaults list is allowed.

    External files must not include each other, because a chain of includes could grow exponentially.
    """
    if isinstance(entry, str):
        return entry == "_self_" or _packaged(group, entry)
    if not isinstance(entry, dict) or len(entry) != 1:
        return False
    ((choice, name),) = entry.items()
    match = re.fullmatch(r"override /(\w+|hydra/launcher)", str(choice))
    if match is None or not (name is None or (isinstance(name, str) and re.fullmatch(r"[\w-]+", name))):
        return False
    return match[1] in SECTIONS or (match[1] == "hydra/launcher" and (name == "basic" or _packaged(match[1], name)))


def _packaged(group: str, name: str | None) -> bool:
    """Tell whether the package has a file of this group and name."""
    return name in {file.stem for file in (config_folder() / group).glob("*.yaml")}


def _leaves(content: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path of keys, value) for every value that is not a non-empty mapping."""
    if isinstance(content, dict) and content:
        for key, value in content.items():
            yield from _leaves(value, (*path, str(key)))
    elif path:
        yield path, content


def _may_set(path: tuple[str, ...], value: Any) -> bool:
    """Tell whether an external file may set the key at `path` to `value`."""
    if path[:2] == ("hydra", "launcher"):
        safe = isinstance(value, str) and re.fullmatch(r"[\w.,:&|*+@%()\[\]/-]*", value)
        return ".".join(path[2:]) in RESOURCES and (value is None or bool(safe) or isinstance(value, int | float))
    if path[:3] == ("hydra", "sweeper", "params") and len(path) == 4:
        # These values are parsed by the command-line grammar, in which a backslash can hide an interpolation.
        plain = not isinstance(value, dict | list) and not re.search(r"[$\\]", str(value))
        return plain and (path[3] == "hardware" or _is_setting(path[3].split("."), Config))
    free = path[0] == "per_task" or path[:2] == ("model", "architecture") or (path[0] == "method" and len(path) > 2)
    if "${" in str(value) and (free or not isinstance(value, str)):
        return False  # interpolated copies could be interpolated again and grow exponentially
    return _is_setting(path, Config)


def _is_setting(path: Sequence[str], kind: Any) -> bool:
    """Tell whether a path of keys exists in the schema or, for `method`, in a packaged method."""
    if kind is Config and ".".join(path[:2]) in _NEVER:
        return False
    field = next((field for field in dataclasses.fields(kind) if field.name == path[0]), None)
    if field is None or len(path) == 1:
        return field is not None
    if path[0] == "method":
        own = {key.rpartition(".")[2] for key in method_keys()}
        return path[1] in own | {"name", "preset", *METHOD_NOTES} and all(re.fullmatch(r"\w+", name) for name in path)
    inner = field.default_factory
    return _is_setting(path[1:], inner) if dataclasses.is_dataclass(inner) else inner is dict
