"""Content hashes of files. They identify local data and weights independently of their path, and detect later changes."""

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

# On file systems with coarse timestamps, two changes within this many seconds may leave the same timestamps.
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
    """Return 16 hex digits of SHA-256 over the names and bytes of files, independent of their folder."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{hash_file(file)}\n".encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def read_as_hashed(
    key: str, expected: str | None, identify: Callable[[], tuple[str | None, Sequence[Path]]]
) -> Iterator[None]:
    """Context manager: check before and after the block that the files read in it still have the expected hash.

    Args:
        key: names the files in error messages, as the user wrote them.
        expected: hash of the files, as used in the run's identity; None if no local files are read.
        identify: returns the current hash and the list of files.

    Raises:
        ConfigError: the files have changed. The block may have read old or new content.
    """
    if expected is None:
        yield
        return
    before = _observe(key, identify)
    if before[0] != expected:
        raise changed(key)
    yield
    if _observe(key, identify) != before:
        raise changed(key)


def changed(key: str) -> ConfigError:
    """Build the error for files that have changed since they were hashed."""
    return ConfigError(f"{key}: the files changed between being hashed and being read\nway out: run the same command again")


def _observe(key: str, identify: Callable[[], tuple[str | None, Sequence[Path]]]) -> tuple[str | None, list[Stamp]]:
    """Return the hash and the stamps of files. A change shows in the stamps, or in the hash if timestamps are too coarse."""
    try:
        found, files = identify()
        return found, [_stamp(file) for file in files]
    except OSError as error:
        raise ConfigError(f"{key}: {error.filename} cannot be read ({error.strerror})") from error


def _stamp(file: Path) -> Stamp:
    """Return metadata that changes when a file is written or replaced: device, inode, size and times."""
    stat = patiently(file.stat)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@functools.lru_cache(maxsize=256)
def _hash_file(file: str, stamp: Stamp) -> str:
    """Hash a file once per process, as long as its stamp does not change."""
    return _read_hash(file)


def _read_hash(file: str) -> str:
    def read() -> str:
        with open_file(file) as stream:
            return hash_stream(stream)

    return patiently(read)
