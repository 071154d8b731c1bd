"""Content hashes of files: what identifies local data and weights, wherever they lie."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

from wlora.reading import open_file


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits; OSError if it cannot be read."""
    stat = file.stat()
    return _hash_file(str(file), stat.st_size, stat.st_mtime_ns)


def hash_files(files: Iterable[Path]) -> str:
    """Return 16 hex digits of SHA-256 over the names and bytes of files; their folder has no part in it."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{hash_file(file)}\n".encode())
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def _hash_file(file: str, size: int, modified: int) -> str:
    """Hash a file once per process; its size and time of change are part of the key."""
    digest = hashlib.sha256()
    with open_file(file) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
