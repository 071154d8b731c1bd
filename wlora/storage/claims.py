"""Exclusive write access of one process to a run, by a folder named after the token of its lock:

    <results_dir>/checkpoints/<run_id>/<token>/

Checking the lock before each write is not enough: a process can be suspended between the check and the write for longer than
the lock's lease, while another process takes over the run. Therefore every output is first written under a temporary name,
then renamed into the token folder, and then renamed to its final path. A process that takes over a run removes the token
folder of the previous process. From then on the renames of the previous process fail, on network file systems, too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from wlora.errors import RunFault, TakenOver
from wlora.storage.atomic_write import leftovers, put, remove_path
from wlora.storage.locks import RunLock

_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
# Errors that occur if another process creates or removes files in the same folder at the same time.
_MOVING = {errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST}
# Maximum attempts to create or empty a folder while a resumed process may still write into it.
_TRIES = 100


class Claim:
    """The right of one process to write the files of a run. It ends permanently when another process takes over the run.

    Args:
        results_dir: folder of the study.
        lock: lock of the run, held by this process or, in a multi-process run, by the main process.
        token: token of the lock, as known to the main process.

    Attributes:
        folder: contains the checkpoints while the claim is open; otherwise they are in `checkpoints/<run_id>`.
    """

    def __init__(self, results_dir: str | Path, lock: RunLock, token: str) -> None:
        self.lock = lock
        self._results, self._run_id = Path(results_dir), lock.path.stem
        self.folder = self._results / "checkpoints" / self._run_id / token

    @contextlib.contextmanager
    def opened(self, *, afresh: bool = False) -> Iterator[None]:
        """Context manager: open the claim and end the claims of earlier processes. Only the lock's holder may call it.

        The checkpoints of earlier processes are moved into this process's folder; their other leftovers are removed.

        Args:
            afresh: also remove the checkpoints of earlier processes.

        Raises:
            TakenOver: another process has taken the lock.
            RunFault: the folder cannot be written; no checkpoint was removed.
        """
        try:
            self._make()
            half_written = self._shut_out_others()
            for path in [*half_written, *self.folder.glob(".*"), *(self.folder.glob("step-*") if afresh else ())]:
                remove_path(path)
            yield
        finally:
            self._close()

    def put(self, staging: Path, target: Path) -> None:
        """Move a finished file or folder to its final path, if this process still owns the run.

        Raises:
            TakenOver: another process has taken over the run; the target is unchanged.
            OSError: the disk is full or the folder cannot be written.
        """
        inside = self.folder / staging.name
        try:
            os.rename(staging, inside)
            put(inside, target)
        except OSError as error:
            if self.lost():
                raise self._fault() from error
            raise
        finally:
            remove_path(inside)

    def lost(self) -> bool:
        """Tell whether another process has taken over the run."""
        return _is_gone(self.folder)

    def _fault(self) -> TakenOver:
        if self.lock.ours():
            return TakenOver(f"{self.folder} was removed while the run needed it\nway out: run the same command again")
        return TakenOver(f"{self.lock.holder()} has taken over the run, because this one sent no heartbeat for too long")

    def _make(self) -> None:
        for _ in range(_TRIES):
            try:
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                self.folder.mkdir()
                return
            except OSError as error:
                fault = error
                if error.errno not in _MOVING:  # otherwise a process that has just ended removed the parent folders: retry
                    break
        raise RunFault(f"{self.folder} cannot be created ({fault.strerror})") from fault

    def _shut_out_others(self) -> list[Path]:
        """End the claims of earlier processes; return the temporary files that they have left outside their folders."""
        base = self.folder.parent
        try:
            names = sorted(os.listdir(base))
            half_written = leftovers(self._results, self._run_id)
            # A process that takes the lock after this check will find our folder. Earlier holders are in the lists above.
            if not self.lock.confirm():
                raise self._fault()
            for name in names:
                if name != self.folder.name and not name.startswith("step-"):
                    self._shut_out(base / name)
            for step in base.glob("step-*"):
                self._take(step, keep=True)
            if self.lost():
                raise self._fault()
        except OSError as error:
            if self.lost():
                raise self._fault() from error
            reason = error.strerror or error
            raise RunFault(f"{base}: the checkpoints there cannot be taken over ({reason}); none was removed") from error
        return half_written

    def _shut_out(self, other: Path) -> None:
        """Take over the checkpoints of an earlier process and remove its folder, so that it can no longer write."""
        if other.is_symlink() or not other.is_dir():
            remove_path(other)
            return
        for _ in range(_TRIES):
            try:
                for name in os.listdir(other):
                    self._take(other / name, keep=name.startswith("step-"))
                other.rmdir()
                return
            except OSError as error:
                if _is_gone(other):
                    return
                if error.errno not in _MOVING:  # otherwise that process has resumed and changes the folder: retry
                    raise
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(other))

    def _take(self, path: Path, *, keep: bool) -> None:
        """Move a checkpoint into this process's folder. Other files and duplicates get a hidden name and are removed later.

        Files are moved before they are removed, because a network file system keeps a removed file in its folder as long as
        a process has it open.
        """
        target = self.folder / path.name
        if not keep or os.path.lexists(target):
            target = self.folder / f".{uuid.uuid4().hex}"
        os.rename(path, target)

    def _close(self) -> None:
        """Move the checkpoints back to `checkpoints/<run_id>` and remove the token folder."""
        with contextlib.suppress(OSError):  # another process owns the run, or the next process will take over the rest
            for step in self.folder.glob("step-*"):
                os.rename(step, self.folder.parent / step.name)
            for path in self.folder.glob(".*"):
                remove_path(path)
            self.folder.rmdir()
        with contextlib.suppress(OSError):  # the folders still contain checkpoints or other runs
            self.folder.parent.rmdir()
            self.folder.parent.parent.rmdir()


def _is_gone(folder: Path) -> bool:
    """Tell whether a folder certainly does not exist, as opposed to being temporarily unreachable."""
    try:
        os.stat(folder)
    except OSError as error:
        return error.errno in _GONE
    return False
