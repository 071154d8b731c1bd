"""Content hashes of files: what identifies local data and weights, wherever they lie, and that it is these that are read."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from wlora.errors import ConfigError
from wlora.reading import open_file
from wlora.storage.atomic_write import patiently

Stamp = tuple[int, int, int, int, int]

# Two changes within so many seconds may leave a file with the same times, on the coarsest file systems in use.
_YOUNG = 2.0


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits; OSError if it cannot be read."""
    stamp = _stamp(file)
    young = time.time() - max(stamp[-2:]) / 1e9 < _YOUNG
    return _read_hash(str(file)) if young else _hash_file(str(file), stamp)


def hash_stream(stream: BinaryIO) -> str:
    """Return the SHA-256 of an open file from its beginning, as 64 hex digits; OSError if it cannot be read."""
    digest = hashlib.sha256()
    stream.seek(0)
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def hash_bytes(content: bytes) -> str:
    """Return the first 16 hex digits of the SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def hash_files(files: Iterable[Path]) -> str:
    """Return 16 hex digits of SHA-256 over the names and bytes of files; their folder has no part in it."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{hash_file(file)}\n".encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def read_as_hashed(
    key: str, expected: str | None, identify: Callable[[], tuple[str | None, Sequence[Path]]]
) -> Iterator[None]:
    """Read files in the block, and only those that a hash is of: what changes before the block ends is refused.

    Args:
        key: names the files in the message, as the user wrote them.
        expected: their hash, as the run's identity has it; None where there is nothing local to read.
        identify: returns their hash now, and the files.

    Raises:
        ConfigError: they are not those that were hashed; what the block has read may be of either content.
    """
    if expected is None:
        yield
        return
    before = _look(key, identify)
    if before[0] != expected:
        raise changed(key)
    yield
    if _look(key, identify) != before:
        raise changed(key)


def changed(key: str) -> ConfigError:
    """Build the message for files that are no longer those that were hashed."""
    return ConfigError(f"{key}: the files changed between being hashed and being read\nway out: the same command again")


def _look(key: str, identify: Callable[[], tuple[str | None, Sequence[Path]]]) -> tuple[str | None, list[Stamp]]:
    """Return the hash of files and their stamps: a change shows in the stamps, or in the hash where these are too coarse."""
    try:
        found, files = identify()
        return found, [_stamp(file) for file in files]
    except OSError as error:
        raise ConfigError(f"{key}: {error.filename} cannot be read ({error.strerror})") from error


def _stamp(file: Path) -> Stamp:
    """Return what is different of a file that was written or replaced: its place, its size and its times."""
    stat = patiently(file.stat)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.lru_cache(maxsize=256)
def _hash_file(file: str, stamp: Stamp) -> str:
    """Hash a file once per process, as long as it is the same one."""
    return _read_hash(file)


def _read_hash(file: str) -> str:
    def read() -> str:
        with open_file(file) as stream:
            return hash_stream(stream)

    return patiently(read)
