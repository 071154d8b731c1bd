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
    text = text if isinstance(text, str) else text.decode()  # UTF-8; json would guess
    try:
        content = json.loads(text)
    except RecursionError:
        content = None
    else:
        # Every level needs a bracket; the lines of curves have too few to be deep.
        if text.count("[") + text.count("{") <= MOST_LEVELS or _is_shallow(content, MOST_LEVELS):
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
    if (misfit := _checker(kind)(value)) is None:
        return None
    path, found, expected = misfit
    where = f"{at}{path}".lstrip(".")
    return f"{where} is missing" if found is _MISSING else _mismatch(found, expected, where)


# The first mismatch within a value: where it is, what is there, and the expected type.
_Misfit = tuple[str, Any, Any]
_MISSING = object()


@functools.cache
def _checker(kind: Any) -> Callable[[Any], _Misfit | None]:
    """Return the check of a type. It is built once, because a study has millions of values."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value: None
    if origin in (Union, UnionType):
        return _checker_of_options(kind, [_checker(one) for one in inner])
    if kind in (int, float):
        numbers = int if kind is int else (int, float)
        return lambda value: (
            None if isinstance(value, numbers) and not isinstance(value, bool) and _is_bounded(value) else ("", value, kind)
        )
    if dataclasses.is_dataclass(kind) or is_typeddict(kind):
        return _checker_of_keys(kind)
    if origin in (dict, list):
        return _checker_of_items(kind, origin, _checker(inner[-1]))
    return lambda value: None if isinstance(value, origin or kind) else ("", value, kind)


def _checker_of_options(kind: Any, options: list[Callable[[Any], _Misfit | None]]) -> Callable[[Any], _Misfit | None]:
    def check_options(value: Any) -> _Misfit | None:
        for option in options:
            if option(value) is None:
                return None
        return "", value, kind

    return check_options


def _checker_of_items(kind: Any, container: Any, check: Callable[[Any], _Misfit | None]) -> Callable[[Any], _Misfit | None]:
    def check_items(value: Any) -> _Misfit | None:
        if not isinstance(value, container):
            return "", value, kind
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            if misfit := check(one):
                return (f".{key}" if container is dict else f"[{key}]") + misfit[0], *misfit[1:]
        return None

    return check_items


def _checker_of_keys(kind: Any) -> Callable[[Any], _Misfit | None]:
    checks = {key: _checker(hint) for key, hint in get_type_hints(kind).items()}
    required = getattr(kind, "__required_keys__", ())

    def check_keys(value: Any) -> _Misfit | None:
        if not isinstance(value, dict):
            return "", value, dict
        for key in required:
            if key not in value:
                return f".{key}", _MISSING, None
        for key, check in checks.items():
            if key in value and (misfit := check(value[key])):
                return f".{key}{misfit[0]}", *misfit[1:]
        return None

    return check_keys


def _is_bounded(value: float) -> bool:
    return abs(value) < _MOST if isinstance(value, int) else math.isfinite(value)


def _mismatch(value: Any, kind: Any, at: str) -> str:
    return f"{at} is {repr(value)[:40]}, not {getattr(kind, '__name__', kind)}"


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
