"""Locate and check a model's files before torch is imported."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from wlora.config.schema import ModelConfig
from wlora.config.spelling import expand_home
from wlora.errors import ConfigError, wrong_value
from wlora.models.gguf import find_gguf
from wlora.reading import read_file, read_json, strict_lookups
from wlora.storage.content_hash import hash_file, hash_files, read_as_hashed

_CONTENT = {".json", ".safetensors", ".bin", ".model", ".txt"}
# Older versions confuse the special tokens of a GGUF file's tokenizer.
READS_GGUF = "5.23"
_PACKAGES = {"model.quantization": "bitsandbytes", "model.gguf_file": "gguf"}


@dataclass(frozen=True)
class ModelSource:
    """A located model.

    Attributes:
        location: a local folder, a hub id, or None for random weights.
        fingerprint: content hash of local files (first 16 hex digits of SHA-256), otherwise None.
        files: the files that the hash covers.
    """

    location: str | None
    fingerprint: str | None
    files: tuple[Path, ...] = ()


def locate(model: ModelConfig) -> ModelSource:
    """Find and check a model's files.

    Raises:
        ConfigError: the folder has no configuration or no weights; a shard index names a file outside the folder; a
            package is not installed; the SHA-256 is wrong.
    """
    if model.path is not None and model.gguf_file is not None:
        file = find_gguf(model)  # it contains configuration and tokenizer
        return _hashed(f"model.path={model.path}", expand_home("model.path", model.path), [file])
    if model.path is not None:
        folder, key = Path(expand_home("model.path", model.path)), f"model.path={model.path}"
    elif model.source == "package":
        folder, key = _package_folder(model), f"model={model.name}"
    else:
        return ModelSource(model.hub_id if model.source == "hub" else None, None)
    if not os.path.isfile(folder / "config.json"):
        raise ConfigError(f"{key}: allowed is a folder with config.json, tokenizer and weights")
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not weights:
        raise ConfigError(
            f"{key}: the folder has no weights: allowed is a folder with model.safetensors or pytorch_model.bin"
        )
    for file in folder.rglob("*"):
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ConfigError(f"{key}: {file.relative_to(folder)} is not a regular file: allowed are files and folders")
    for index in folder.glob("*.index.json"):
        _refuse_elsewhere(index, key)
    if model.sha256 is not None and hash_file(weights[0]) != model.sha256:
        raise ConfigError(
            f"{key}: {weights[0].name} has sha256 {hash_file(weights[0])[:12]}…, not {model.name}'s {model.sha256[:12]}…\n"
            "other weights of this architecture: add model.sha256=null"
        )
    content = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in _CONTENT)
    return _hashed(key, str(folder), content)


def _hashed(key: str, location: str, files: list[Path]) -> ModelSource:
    try:
        return ModelSource(location, hash_files(files), tuple(files))
    except OSError as error:
        raise ConfigError(f"{key}: {error.filename} cannot be read ({error.strerror})") from error


@contextlib.contextmanager
def unchanged(model: ModelConfig, source: ModelSource) -> Iterator[None]:
    """Context manager for reading a model's files. It fails if they differ from those of `source`.

    Raises:
        ConfigError: the files changed, detected at the beginning or the end of the block.
        OSError: a file cannot be accessed. Libraries would treat it as absent.
    """

    def identify() -> tuple[str | None, Sequence[Path]]:
        found = locate(model)
        return found.fingerprint, found.files

    with read_as_hashed(f"model.path={source.location}", source.fingerprint, identify), strict_lookups():
        yield


def _refuse_elsewhere(index: Path, key: str) -> None:
    """Reject a shard index that names a file outside its folder, because the fingerprint would not cover it."""
    try:
        names = set(read_json(read_file(index))["weight_map"].values())
        strange = [name for name in names if name in (".", "..") or Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{key}: {index.name} cannot be read ({type(error).__name__}: {str(error)[:100]})") from None
    if strange:
        raise ConfigError(f"{key}: {index.name} names {strange[0]}: allowed are files in the same folder")


def require_extras(model: ModelConfig) -> None:
    """Check that the packages can read the model's weights.

    Raises:
        ConfigError: `bitsandbytes` or `gguf` is missing, or transformers is too old for GGUF files.
    """
    wanted = {"model.quantization": model.quantization, "model.gguf_file": model.gguf_file}
    for key, package in _PACKAGES.items():
        if wanted[key] not in (None, "none") and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{key}={wanted[key]}: the package {package} is not installed\nway out: pip install 'wlora[quantization]'"
            )
    if model.gguf_file is not None:
        found = importlib.metadata.version("transformers")
        if Version(found) < Version(READS_GGUF):
            raise ConfigError(f"model.gguf_file={model.gguf_file}: needs transformers {READS_GGUF} or newer, not {found}")


def _package_folder(model: ModelConfig) -> Path:
    if model.package is None or not model.package.isidentifier():  # find_spec of `a.b` would import `a`
        raise wrong_value("model.package", "null" if model.package is None else model.package, "the name of a package")
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        name = model.package.replace("_", "-")
        raise ConfigError(f"model={model.name}: the package {name} is not installed\nway out: pip install 'wlora[demo]'")
    return Path(spec.submodule_search_locations[0]) / "model"
