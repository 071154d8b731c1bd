"""Read the architecture from the header of a GGUF file, without torch and without the weights.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. transformers reads weights and tokenizer.
"""

from __future__ import annotations

import functools
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from wlora.config.spelling import expand_home
from wlora.errors import ConfigError, wrong_value
from wlora.reading import open_file

if TYPE_CHECKING:
    from wlora.config.schema import ModelConfig

_VERSIONS = (2, 3)
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

# Keys that determine shapes: llama.cpp's name and the name in config.json. The optional ones have defaults there.
_REQUIRED = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_OPTIONAL = {"attention.head_count_kv": "num_key_value_heads", "rope.dimension_count": "head_dim"}


def find_gguf(model: ModelConfig) -> Path:
    """Return the path of `model.gguf_file` in `model.path`.

    Raises:
        ConfigError: the file does not exist.
    """
    assert model.path is not None and model.gguf_file is not None
    folder = Path(expand_home("model.path", model.path))
    file = folder / model.gguf_file
    if not os.path.isfile(file):
        there = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
        raise wrong_value("model.gguf_file", model.gguf_file, f"a GGUF file in model.path={model.path} (there: {there})")
    return file


def read_gguf_architecture(file: Path) -> dict[str, Any]:
    """Return a GGUF file's architecture with the key names of `config.json`.

    Raises:
        ConfigError: not a GGUF file, a family other than Llama, or a missing shape.
    """
    stat = file.stat()
    head = _read_head(str(file), stat.st_size, stat.st_mtime_ns)
    family = head.get("general.architecture")
    if family != "llama":
        raise ConfigError(f"model.gguf_file={file.name}: contains a model of the family {family}: allowed is llama")
    for name in _REQUIRED:
        if f"llama.{name}" not in head:
            raise ConfigError(f"model.gguf_file={file.name}: the file does not state llama.{name}")
    names = {**_REQUIRED, **_OPTIONAL}
    shape = {ours: head[f"llama.{theirs}"] for theirs, ours in names.items() if f"llama.{theirs}" in head}
    words = head.get("llama.vocab_size", head.get("tokenizer.ggml.tokens"))
    return {"model_type": "llama", "vocab_size": words, **shape}


@functools.lru_cache(maxsize=8)
def _read_head(file: str, size: int, modified: int) -> dict[str, Any]:
    """Return the header's numbers and texts by key, and for arrays their length. Cached, so that a file is read once."""
    with open_file(file) as stream:
        try:
            magic, version, _, entries = struct.unpack("<4sIQQ", stream.read(24))
            if magic != b"GGUF" or version not in _VERSIONS:
                raise ValueError
            return {_read_string(stream): _read_value(stream) for _ in range(entries)}
        except (ValueError, KeyError, OverflowError, MemoryError, OSError, struct.error):
            raise ConfigError(
                f"model.gguf_file={Path(file).name}: not a GGUF file of version 2 or 3, or truncated"
            ) from None


def _read_value(stream: BinaryIO) -> Any:
    (kind,) = _read_number(stream, "<I")
    if kind == _STRING:
        return _read_string(stream)
    if kind != _ARRAY:
        return _read_number(stream, _NUMBERS[kind])[0]
    kind, length = _read_number(stream, "<IQ")
    if kind == _STRING:
        for _ in range(length):
            stream.seek(_read_number(stream, "<Q")[0], 1)
    else:
        stream.seek(length * struct.calcsize(_NUMBERS[kind]), 1)
    return length


def _read_string(stream: BinaryIO) -> str:
    (length,) = _read_number(stream, "<Q")
    return stream.read(length).decode()


def _read_number(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, stream.read(struct.calcsize(form)))
