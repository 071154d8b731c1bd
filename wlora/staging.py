"""What is written whole or not at all: under a name of its own first, which only a killed process leaves behind."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give out a path beside a target, for a file or a folder that the block moves there; what is left of it is removed.

    No two processes get the same one, on whatever machines they run. Missing folders above the target are made.

    Raises:
        OSError: the folder of the target cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:16]}")
    try:
        yield staging
    finally:
        remove_path(staging)


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
