"""One JSON file per run, written whole or not at all; the learning curve beside it as JSON lines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wlora.errors import ConfigError, RunFault

SCHEMA = 1
STATUSES = ("running", "success", "diverged", "oom", "interrupted", "failed")


@dataclass
class Record:
    """What is known of a run; the meaning of every key stands in the design under "A record"."""

    run_id: str
    status: str
    config: dict[str, Any]
    schema: int = SCHEMA
    task: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    primary_metric: str = ""
    parameters: dict[str, int] = field(default_factory=dict)
    adapters: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class RecordStore:
    """The records of one study: `<results_dir>/records/<run_id>.json`, and `<run_id>.jsonl` for the curve."""

    def __init__(self, results_dir: str | Path) -> None:
        self.folder = Path(results_dir) / "records"

    def path(self, run_id: str) -> Path:
        """Return where a run's record stands."""
        return self.folder / f"{run_id}.json"

    def read(self, run_id: str) -> Record | None:
        """Return a run's record, None if there is none or it cannot be read (a run then starts over)."""
        try:
            content = json.loads(self.path(run_id).read_text())
            return Record(**content) if content.get("schema") == SCHEMA else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def write(self, record: Record) -> Path:
        """Write a record atomically: the file holds the old content or the new one, never a part.

        Raises:
            RunFault: the disk is full or the folder cannot be written; the old record stays.
        """
        text = json.dumps(asdict(record), indent=1, allow_nan=False) + "\n"
        target = self.path(record.run_id)
        staging = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with open(staging, "w") as stream:
                    stream.write(text)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(staging, target)
            finally:
                staging.unlink(missing_ok=True)
        except OSError as error:
            raise RunFault(
                f"the record {target} cannot be written ({error.strerror}); an older one stays as it was"
            ) from error
        return target

    def curve(self, run_id: str, *, write: bool = True) -> CurveWriter:
        """Return a writer that starts the run's learning curve afresh; with `write=False` one that only remembers."""
        return CurveWriter(self.folder / f"{run_id}.jsonl" if write else None)

    def __iter__(self) -> Iterator[Record]:
        """Iterate over all readable records, by run_id."""
        for file in sorted(self.folder.glob("*.json")):
            record = self.read(file.stem)
            if record is not None:
                yield record


class CurveWriter:
    """Appends points to a learning curve, one JSON object per line.

    Attributes:
        points: all points so far.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.points: list[dict[str, Any]] = []
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("")
        except OSError as error:
            assert path is not None
            raise ConfigError(f"results_dir: {path.parent} cannot be written ({error.strerror})") from error

    def __call__(self, point: dict[str, Any]) -> None:
        """Append one point.

        Raises:
            RunFault: the disk is full.
        """
        self.points.append(point)
        self._write([point], "a")

    def restart(self, points: list[dict[str, Any]]) -> None:
        """Go on from the points of a run that was interrupted; what it wrote after them is dropped."""
        self.points = list(points)
        self._write(self.points, "w")

    def _write(self, points: list[dict[str, Any]], mode: str) -> None:
        if self._path is None:
            return
        try:
            with open(self._path, mode) as stream:
                stream.writelines(json.dumps(point) + "\n" for point in points)
        except OSError as error:
            raise RunFault(f"the learning curve {self._path} cannot be written ({error.strerror})") from error


def peak_memory() -> dict[str, int]:
    """Return peak bytes: `process` (resident), and `device` where a GPU is used."""
    import torch

    found: dict[str, int] = {}
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        found["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        found["device"] = int(torch.cuda.max_memory_allocated())
    return found
