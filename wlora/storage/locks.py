"""One process at a time per run, also where several machines share a results folder."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from wlora.errors import ConfigError
from wlora.storage.atomic_write import staged

# A holder whose heartbeat is not seen for this long is taken to be dead; on the same machine a dead one shows at once.
LEASE_SECONDS = 90.0
# A file that names no holder is a damaged one if it stays so for this long; filelock's own patience is 2 seconds.
DAMAGED_SECONDS = 5.0
# A contender that looks whether a lock is a dead process's puts its own in the place for an instant.
_LOOKS, _BETWEEN_LOOKS = 20, 0.1
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


class RunLock:
    """The right to run one run_id: a file with host, process and heartbeat.

    Attributes:
        path: `<results_dir>/locks/<run_id>.lock`.
        lost: another process has taken over, since this one was silent for too long; nothing may be written any more.
    """

    def __init__(self, results_dir: str | Path, run_id: str) -> None:
        self.path = Path(results_dir) / "locks" / f"{run_id}.lock"
        self.lost = False
        self._lease = SoftFileLease(
            str(self.path), lease_duration=LEASE_SECONDS, on_compromise=self._lose, timeout=0, thread_local=False
        )

    def acquire(self) -> bool:
        """Take the lock; False if a living process holds it.

        A holder on another machine whose file is older than a lease is watched for one lease, and then taken over. A file
        that names no holder, as a crash of the machine leaves one behind, is watched for a few seconds.

        Raises:
            ConfigError: the file is damaged so that it never ends by itself.
            OSError: the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self._try(0):
                return True
            for _ in range(2):  # an empty file is one more time to wait for
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
            return False  # somebody else was faster
        raise self._fault()

    def _try(self, seconds: float) -> bool:
        try:
            self._lease.acquire(timeout=seconds)
        except Timeout:
            return False
        return True

    def _fill_empty(self) -> None:
        """Write into an empty file that is older than the instant in which a holder fills it: only then is it ever ended."""
        if self._silent_for() >= DAMAGED_SECONDS:
            with contextlib.suppress(OSError), open(os.open(self.path, os.O_RDWR | _NO_LINK), "r+b") as stream:
                if not stream.read(1):
                    stream.write(b"damaged\n")

    def _fault(self) -> ConfigError:
        return ConfigError(f"lock {self.path} is damaged\nway out: remove it, if nothing runs {self.path.stem} any more")

    @property
    def token(self) -> str | None:
        """The name of this hold, 32 hex digits; None while the lock is not held."""
        return self._lease.token

    def ours(self) -> bool:
        """Tell whether the lock file names this hold by now."""
        owner = self._lease.owner
        return owner is not None and owner.token == self.token

    def confirm(self) -> bool:
        """Tell whether the lock is still this process's; takes up to two seconds where it is not."""
        for _ in range(_LOOKS):
            if self.ours():
                return True
            time.sleep(_BETWEEN_LOOKS)
        return False

    def release(self) -> None:
        """Give the lock back."""
        self._lease.release()

    def holder(self) -> str:
        """Name the process that holds the lock, as host and process number."""
        with contextlib.suppress(OSError):
            text = self.path.read_text(encoding="utf-8", errors="replace")
            told = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
            return f"process {told.get('pid', '?')} on {told.get('host', '?')}"
        return "another process"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Release the lock at the end of the block."""
        try:
            yield
        finally:
            self.release()

    def _silent_for(self) -> float:
        """Return the seconds since the holder's last heartbeat, by the file system's clock."""
        try:
            with staged(self.path) as probe:
                probe.touch(exist_ok=False)
                return probe.stat().st_mtime - self.path.lstat().st_mtime
        except OSError:
            return 0.0

    def _lose(self, compromise: LeaseCompromise) -> None:
        self.lost = True
