"""File operations in a results folder: atomic writes, reads with retries, and no writing through symbolic links.

A file or folder is first written under a temporary name, synced to disk, and then renamed to its final name. Only a killed
process leaves temporary files behind.
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
# Function that moves a finished file or folder (first path) to its final path (second).
Put = Callable[[Path, Path], None]

# Subfolders of a results folder that a run writes into.
PARTS = ("records", "checkpoints", "adapters", "models", "locks", "prefix_cache")
# Errors which mean that a file does not exist, as opposed to a temporary read error.
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Temporary errors: those of network file systems, and too many open files.
_PASSING = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT}
_PAUSES = (0.1, 0.5, 2.0)


def patiently(read: Callable[[], T]) -> T:
    """Return the result of a read function. After a temporary error it is retried for a few seconds.

    Raises:
        OSError: the error is permanent, or persists after the retries.
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
    """Context manager: yield a unique temporary path in the target's folder, and remove that path at the end.

    The path is unique even across machines. Missing parent folders of the target are created.

    Raises:
        OSError: the target's folder cannot be created.
    """
    make_folder(target.parent)
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:16]}")
    try:
        yield staging
    finally:
        remove_path(staging)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, and sync the new directory entries to disk.

    Raises:
        OSError: a folder cannot be created.
    """
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_entries(folder.parent)


def put(staging: Path, target: Path) -> None:
    """Sync a finished file or folder to disk and move it to its final path, replacing a file, folder or symbolic link there.

    Only the parent folders of `staging` and `target` are modified, and no folder is created.

    Raises:
        OSError: the disk is full or the folder cannot be written; the previous content of the target is kept.
    """
    _sync_all(staging)
    if staging.is_dir() and os.path.lexists(target):  # a folder cannot replace another in one step
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
    """Write a file atomically: it contains either the old or the new content, never a part.

    Args:
        put: moves the written file to its final path.

    Raises:
        OSError: the disk is full or the folder cannot be written; an existing file is kept.
    """
    with staged(target) as staging:
        with open(staging, "xb") as stream:
            stream.write(content)
        put(staging, target)


def check_folders(results_dir: str | Path, *parts: str) -> None:
    """Reject a results folder if one of the given subfolders is a symbolic link or a file.

    Links at other places (files, and folders that are written as a whole) need no check, because they are replaced.

    Raises:
        ConfigError: names the path that is not a real folder.
    """
    for folder in (Path(results_dir) / part for part in parts):
        link = os.path.islink(folder)
        if link or (os.path.lexists(folder) and not os.path.isdir(folder)):
            what = "a link" if link else "not a folder"
            raise ConfigError(f"results_dir={results_dir}: {folder} is {what}: allowed is a real folder")


def leftovers(results_dir: str | Path, run_id: str) -> list[Path]:
    """List the temporary files and folders that processes of a run have left unfinished. No code reads them."""
    results = Path(results_dir)
    return [path for part in ("models", "adapters", "records") for path in (results / part).glob(f".{run_id}.*")]


def remove_path(path: Path) -> None:
    """Remove a file, a folder with its content, or a symbolic link (not its target). Errors are ignored."""
    for _ in range(2):  # one immediate retry after a temporary error
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _sync_all(path: Path) -> None:
    """Sync a file, or a folder with its content, to disk."""
    if path.is_dir():
        for entry in path.iterdir():
            _sync_all(entry)
        _sync_entries(path)
    else:
        with open(path, "r+b") as stream:
            os.fsync(stream.fileno())


def _sync_entries(folder: Path) -> None:
    """Sync the entries of a folder to disk if the file system supports this; OSError if it supports this but fails."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders, or the folder has no read permission
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)
