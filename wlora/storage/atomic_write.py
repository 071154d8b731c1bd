"""The files of a results folder: written whole or not at all, read patiently, links in it never followed.

What is written has a name of its own first, which only a killed process leaves behind, and is on the disk before it takes
its place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from wlora.errors import ConfigError

T = TypeVar("T")
# Moves a finished file or folder, the first path, to its place.
Put = Callable[[Path, Path], None]

# The folders that a run writes into.
PARTS = ("records", "checkpoints", "adapters", "models", "locks", "prefix_cache")
# What says that a file is not there, and not that it cannot be read for now.
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Faults that may pass: those of a network's file system, and of too many open files.
_PASSING = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT}
_PAUSES = (0.1, 0.5, 2.0)


def patiently(read: Callable[[], T]) -> T:
    """Return what a function reads; after a fault that may pass it is called again, for a few seconds.

    Raises:
        OSError: the fault stays, or is none that passes.
    """
    for pause in _PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
        time.sleep(pause)
    return read()


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give out a path beside a target, for a file or a folder that the block puts there; what is left of it is removed.

    No two processes get the same one, on whatever machines they run. Missing folders above the target are made.

    Raises:
        OSError: the folder of the target cannot be made.
    """
    make_folder(target.parent)
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:16]}")
    try:
        yield staging
    finally:
        remove_path(staging)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing; each is on the disk with the entry that leads to it.

    Raises:
        OSError: one of them cannot be made.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_entries(folder.parent)


def put(staging: Path, target: Path) -> None:
    """Move a finished file or folder to its place, in which a link is replaced, too; both are on the disk then.

    No other folder is written into than the two that `staging` and `target` stand in, and none is made.

    Raises:
        OSError: the disk is full or the folder cannot be written; what stood there stays.
    """
    _sync_all(staging)
    if staging.is_dir() and os.path.lexists(target):  # no folder takes the place of another in one step
        aside = staging.with_name(f"{staging.name}.old")
        os.replace(target, aside)
        try:
            os.replace(staging, target)
        except OSError:
            os.replace(aside, target)
            raise
        remove_path(aside)
    else:
        os.replace(staging, target)
    _sync_entries(target.parent)


def write_whole(target: Path, content: bytes, put: Put = put) -> None:
    """Write a file so that it holds the old content or the new one, never a part.

    Args:
        put: moves the written file to its place.

    Raises:
        OSError: the disk is full or the folder cannot be written; an older file stays.
    """
    with staged(target) as staging:
        with open(staging, "xb") as stream:
            stream.write(content)
        put(staging, target)


def check_folders(results_dir: str | Path, *parts: str) -> None:
    """Refuse a results folder in which a link, or a file, stands for a folder that is written into.

    A link that stands for a file, or for a folder that is written as a whole, is replaced.

    Raises:
        ConfigError: which one is no folder.
    """
    for folder in (Path(results_dir) / part for part in parts):
        link = os.path.islink(folder)
        if link or (os.path.lexists(folder) and not os.path.isdir(folder)):
            what = "a link" if link else "no folder"
            raise ConfigError(f"results_dir={results_dir}: {folder} is {what}: allowed is a folder of its own")


def leftovers(results_dir: str | Path, run_id: str) -> list[Path]:
    """List what processes of a run have half-written by now beside the places that it is for; nothing reads it."""
    results = Path(results_dir)
    return [path for part in ("models", "adapters", "records") for path in (results / part).glob(f".{run_id}.*")]


def remove_path(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link and not what it points to; what cannot be removed stays."""
    for _ in range(2):  # once more after a fault that has passed; none is waited for
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _sync_all(path: Path) -> None:
    """Make a file, or a folder with all in it, durable."""
    if path.is_dir():
        for entry in path.iterdir():
            _sync_all(entry)
        _sync_entries(path)
    else:
        with open(path, "r+b") as stream:
            os.fsync(stream.fileno())


def _sync_entries(folder: Path) -> None:
    """Make a folder's entries durable, where the file system can; OSError where it can and fails."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders, and a folder may be closed to readers
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)
