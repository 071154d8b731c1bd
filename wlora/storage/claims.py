"""What makes a run one process's own: a folder named by the token of its lock, through which all passes that it writes.

    <results_dir>/checkpoints/<run_id>/<token>/

A process that was stopped for longer than the lock's lease may go on at any instruction, so that no look at the lock before
a write excludes that another one has taken the run over. Whoever takes it over therefore removes the folder of the process
before it. What a process writes has a name of its own until it is moved into its folder, and out of it to its place: two
renames, which fail from then on, over a network's file system, too.
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
# What a folder says in which another process makes and removes files at the same time.
_MOVING = {errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST}
# How often a folder is emptied, into which a process that has woken up may just write.
_TRIES = 100


class Claim:
    """The right of one process to write for a run, which ends for good when another one takes the run over.

    Args:
        results_dir: the study's folder.
        lock: the run's, held by this process or, where several run it, by their main one.
        token: the lock's, as the main process has it.

    Attributes:
        folder: holds the checkpoints while the run is open; before and after they stand in `checkpoints/<run_id>`.
    """

    def __init__(self, results_dir: str | Path, lock: RunLock, token: str) -> None:
        self.lock = lock
        self._results, self._run_id = Path(results_dir), lock.path.stem
        self.folder = self._results / "checkpoints" / self._run_id / token

    @contextlib.contextmanager
    def opened(self, *, afresh: bool = False) -> Iterator[None]:
        """Shut out the processes that had the run before, for the length of the block; for the lock's holder alone.

        Their checkpoints are this process's from here on, and what else they have left is removed.

        Args:
            afresh: their checkpoints are removed, too.

        Raises:
            TakenOver: another process has the lock by now.
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
        """Move a finished file or folder to its place while the run is this process's.

        Raises:
            TakenOver: another process has taken over; what stands in the place is as it was.
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
        """Tell whether another process has taken the run over."""
        return _is_gone(self.folder)

    def _fault(self) -> TakenOver:
        if self.lock.ours():
            return TakenOver(f"{self.folder} was removed, through which a run writes\nway out: the same command, once more")
        return TakenOver(f"{self.lock.holder()} has taken over the run, since this one gave no sign of life")

    def _make(self) -> None:
        for _ in range(_TRIES):
            try:
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                self.folder.mkdir()
                return
            except OSError as error:
                fault = error
                if error.errno not in _MOVING:  # else a process that has just ended has removed the folders above
                    break
        raise RunFault(f"{self.folder} cannot be made ({fault.strerror})") from fault

    def _shut_out_others(self) -> list[Path]:
        """Shut out the processes that had the run before; returns what they have half-written elsewhere."""
        base = self.folder.parent
        try:
            names = sorted(os.listdir(base))
            half_written = leftovers(self._results, self._run_id)
            # Who takes the lock over after this look finds this process's folder; who had it before is in the lists.
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
        """Take an earlier process's checkpoints and remove its folder, in which nothing can be made from then on."""
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
                if error.errno not in _MOVING:  # else that process has woken up and writes or removes there
                    raise
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(other))

    def _take(self, path: Path, *, keep: bool) -> None:
        """Move a checkpoint into the own folder; what is none, or is there already, under a name that is to be removed.

        It is moved out first, since a network's file system keeps a removed file in the folder while a process has it open.
        """
        target = self.folder / path.name
        if not keep or os.path.lexists(target):
            target = self.folder / f".{uuid.uuid4().hex}"
        os.rename(path, target)

    def _close(self) -> None:
        """Put the checkpoints where they stand while no process has the run, and remove the folder."""
        with contextlib.suppress(OSError):  # another process has it, or what stays is the next one's
            for step in self.folder.glob("step-*"):
                os.rename(step, self.folder.parent / step.name)
            for path in self.folder.glob(".*"):
                remove_path(path)
            self.folder.rmdir()
        with contextlib.suppress(OSError):  # checkpoints stand there, or it was not the last run's
            self.folder.parent.rmdir()
            self.folder.parent.parent.rmdir()


def _is_gone(folder: Path) -> bool:
    """Tell whether a folder is certainly not there, and not only out of reach for now."""
    try:
        os.stat(folder)
    except OSError as error:
        return error.errno in _GONE
    return False
