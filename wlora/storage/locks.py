"""A lock per run, so that only one process executes it, also if several machines share a results folder."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from wlora.errors import ConfigError
from wlora.storage.atomic_write import staged

# A holder without a heartbeat for this long is considered dead. On the same machine a dead process is detected at once.
LEASE_SECONDS = 90.0
# A lock file without an owner for this long is considered damaged. filelock's own limit is 2 seconds.
DAMAGED_SECONDS = 5.0
# Attempts and pauses in `confirm`: a process that checks for a dead holder briefly replaces the lock file by its own.
_LOOKS, _BETWEEN_LOOKS = 20, 0.1
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


class RunLock:
    """The lock of one run_id: a file with host, process id and heartbeat.

    Attributes:
        path: `<results_dir>/locks/<run_id>.lock`.
        lost: whether another process has taken over, because this one sent no heartbeat for too long. This process must
            then not write any more.
    """

    def __init__(self, results_dir: str | Path, run_id: str) -> None:
        self.path = Path(results_dir) / "locks" / f"{run_id}.lock"
        self.lost = False
        self._lease = SoftFileLease(
            str(self.path), lease_duration=LEASE_SECONDS, on_compromise=self._lose, timeout=0, thread_local=False
        )

    def acquire(self) -> bool:
        """Take the lock; return False if a living process holds it.

        If the holder is on another machine and its last heartbeat is older than a lease, this method waits for up to one and
        a half leases and then takes over the lock. A lock file without an owner, which a crash of the machine can leave
        behind, is watched for `DAMAGED_SECONDS`.

        Raises:
            ConfigError: the file is damaged in such a way that the lock never expires.
            OSError: the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self._try(0):
                return True
            for _ in range(2):  # an empty file needs one more round
                if self._lease.owner is None and self.path.exists():
                    self._fill_empty()
                    if self._try(DAMAGED_SECONDS):
                        return True
            if self._silent_for() < LEASE_SECONDS:
                return False
            if self._try(1.5 * LEASE_SECONDS):
                return True
        except LeaseSettingsMismatch as error:
            raise self._fault() from error
        if self._silent_for() < LEASE_SECONDS:
            return False  # another process was faster
        raise self._fault()

    def _try(self, seconds: float) -> bool:
        try:
            self._lease.acquire(timeout=seconds)
        except Timeout:
            return False
        return True

    def _fill_empty(self) -> None:
        """Write a text into an old, empty lock file. filelock never breaks an empty lock: its owner may be writing it."""
        if self._silent_for() >= DAMAGED_SECONDS:
            with contextlib.suppress(OSError), open(os.open(self.path, os.O_RDWR | _NO_LINK), "r+b") as stream:
                if not stream.read(1):
                    stream.write(b"damaged\n")

    def _fault(self) -> ConfigError:
        return ConfigError(f"lock {self.path} is damaged\nway out: remove it, if no process runs {self.path.stem}")

    @property
    def token(self) -> str | None:
        """Unique token of the current acquisition, 32 hex digits; None while the lock is not held."""
        return self._lease.token

    def ours(self) -> bool:
        """Tell whether the lock file currently contains this process's token."""
        owner = self._lease.owner
        return owner is not None and owner.token == self.token

    def confirm(self) -> bool:
        """Tell whether this process still holds the lock. It takes up to two seconds if it does not."""
        for _ in range(_LOOKS):
            if self.ours():
                return True
            time.sleep(_BETWEEN_LOOKS)
        return False

    @classmethod
    def all_held(cls, results_dir: str | Path) -> Iterator[tuple[str, RunLock]]:
        """Yield the run_id and the lock of every run that a process holds."""
        for path in sorted(Path(results_dir).glob("locks/*.lock")):
            lock = cls(results_dir, path.stem)
            if lock.is_held():
                yield path.stem, lock

    def release(self) -> None:
        """Release the lock."""
        self._lease.release()

    def is_held(self) -> bool:
        """Tell whether a process holds the lock: a killed one counts for the length of a lease after its last heartbeat."""
        return self.path.exists() and self._silent_for() < LEASE_SECONDS

    def holder(self) -> str:
        """Return the process id and host of the lock's holder as text."""
        with contextlib.suppress(OSError):
            text = self.path.read_text(encoding="utf-8", errors="replace")
            told = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
            return f"process {told.get('pid', '?')} on {told.get('host', '?')}"
        return "another process"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Context manager: release the lock at the end of the block."""
        try:
            yield
        finally:
            self.release()

    def _silent_for(self) -> float:
        """Return the seconds since the holder's last heartbeat; 0 if the lock has been released."""
        try:
            return self._clock() - self.path.lstat().st_mtime
        except OSError:
            return 0.0

    def _clock(self) -> float:
        """Return the time of the file system's clock, or of this machine's if the folder cannot be written."""
        try:
            with staged(self.path) as probe:
                probe.touch(exist_ok=False)
                return probe.stat().st_mtime
        except OSError:
            return time.time()

    def _lose(self, compromise: LeaseCompromise) -> None:
        self.lost = True
