"""Safe reading of files from untrusted sources: only regular files, and JSON of limited depth and checked types.

Opening a named pipe blocks until there is a writer, and reading a device may never end. JSON with very deep nesting can
overflow the stack of code that traverses it. This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, Union, get_args, get_origin, get_type_hints, is_typeddict

MOST_LEVELS = 64
_MOST = 1 << 100  # bound of integers, so that they can be converted to float


def open_file(path: str | Path) -> BinaryIO:
    """Open a regular file for reading bytes.

    Raises:
        OSError: the file cannot be opened, or is a pipe, a socket or a device; `IsADirectoryError` for a folder.
    """
    return open(path, "rb", opener=_open_regular)


def read_file(path: str | Path) -> bytes:
    """Return the bytes of a regular file; OSError as for `open_file`."""
    with open_file(path) as stream:
        return stream.read()


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # do not block if the file is a pipe
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise OSError(errno.EINVAL, "not a regular file", path)


def read_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: the text is not valid JSON, or is nested deeper than `MOST_LEVELS`.
    """
    try:
        content = json.loads(text if isinstance(text, str) else text.decode())  # UTF-8; json would guess
    except RecursionError:
        content = None
    else:
        if _is_shallow(content, MOST_LEVELS):
            return content
    raise ValueError(f"nested deeper than {MOST_LEVELS} levels")


def _is_shallow(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(one, levels - 1) for one in inner if isinstance(one, dict | list))


def find_misfit(value: Any, kind: Any, at: str = "") -> str | None:
    """Check a JSON value against a type; return a description of the first mismatch, or None.

    Args:
        value: the value, as parsed by `json`.
        kind: a type annotation of built-in types, unions, dataclasses and typed dictionaries. Unknown keys of dataclasses
            and typed dictionaries are not checked. Only the required keys of typed dictionaries must exist. A `float` must
            be finite and may be written as an integer.
        at: name of the value, for the description.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return None
    if origin in (Union, UnionType):
        return None if any(find_misfit(value, one) is None for one in inner) else _mismatch(value, kind, at)
    if kind in (int, float):
        numbers = int if kind is int else (int, float)
        fits = isinstance(value, numbers) and not isinstance(value, bool) and _is_bounded(value)
        return None if fits else _mismatch(value, kind, at)
    if dataclasses.is_dataclass(kind) or is_typeddict(kind):
        return _find_misfit_of_key(value, kind, at)
    if not isinstance(value, origin or kind):
        return _mismatch(value, kind, at)
    if origin is dict:
        found = (find_misfit(one, inner[1], f"{at}.{key}") for key, one in value.items())
    elif origin is list:
        found = (find_misfit(one, inner[0], f"{at}[{index}]") for index, one in enumerate(value))
    else:
        return None
    return next(filter(None, found), None)


def _find_misfit_of_key(value: Any, kind: Any, at: str) -> str | None:
    if not isinstance(value, dict):
        return _mismatch(value, dict, at)
    for key in getattr(kind, "__required_keys__", ()):
        if key not in value:
            return f"{at}.{key} is missing".lstrip(".")
    hints = _hints(kind)
    return next(filter(None, (find_misfit(value[key], hints[key], f"{at}.{key}") for key in hints if key in value)), None)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_bounded(value: float) -> bool:
    return abs(value) < _MOST if isinstance(value, int) else math.isfinite(value)


def _mismatch(value: Any, kind: Any, at: str) -> str:
    return f"{at.lstrip('.')} is {repr(value)[:40]}, not {getattr(kind, '__name__', kind)}"


# With one of these errors a file counts as absent, as in `os.path`.
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EACCES}


@contextmanager
def strict_lookups() -> Iterator[None]:
    """Within this block, `os.path.isfile`, `isdir` and `exists` raise OSError if a file cannot be accessed.

    Usually they return False in this case. A library that reads a folder would then skip the file and load something else.
    """

    def strictly(found: Callable[[int], bool]) -> Callable[[Any], bool]:
        def look(path: Any) -> bool:
            try:
                return found(os.stat(path).st_mode)
            except ValueError:
                return False
            except OSError as error:
                if error.errno in _ABSENT:
                    return False
                raise

        return look

    tests = {"isfile": stat.S_ISREG, "isdir": stat.S_ISDIR, "exists": lambda mode: True}
    before = {name: getattr(os.path, name) for name in tests}
    for name, found in tests.items():
        setattr(os.path, name, strictly(found))
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(os.path, name, original)
