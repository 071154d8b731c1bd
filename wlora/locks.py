"""One process at a time per run, also where several machines share a results folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

# A holder whose heartbeat is not seen for this long is taken to be dead; on the same machine a dead one shows at once.
LEASE_SECONDS = 90.0


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

        A holder on another machine whose file is older than a lease is watched for one lease, and then taken over.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lease.acquire()
        except Timeout:
            if self._silent_for() < LEASE_SECONDS:
                return False
            try:
                self._lease.acquire(timeout=1.5 * LEASE_SECONDS)
            except Timeout:
                return False
        return True

    def release(self) -> None:
        """Give the lock back."""
        self._lease.release()

    def holder(self) -> str:
        """Name the process that holds the lock, as host and process number."""
        with contextlib.suppress(OSError):
            told = dict(line.split("=", 1) for line in self.path.read_text().splitlines() if "=" in line)
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
        probe = self.path.with_suffix(".probe")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except OSError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _lose(self, compromise: LeaseCompromise) -> None:
        self.lost = True


def remove_leftovers(results_dir: str | Path, run_id: str) -> None:
    """Remove what killed processes of a run have left half-written, which nothing reads.

    Only for the holder of the run's lock: nobody else writes for the run, so no living process owns any of it.
    """
    results = Path(results_dir)
    found = [path for part in ("models", "adapters", "records") for path in (results / part).glob(f".{run_id}.*")]
    for path in [*found, *(results / "checkpoints" / run_id).glob(".step-*")]:
        remove_path(path)


def remove_path(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link and not what it points to; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
