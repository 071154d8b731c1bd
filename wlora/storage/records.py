"""One JSON file per run, written atomically, with the learning curve and the dev set's predictions in two more files.

A record contains a checksum of its content. The record of a successful run also contains the checksums of the two other
files. Damage is therefore detected even if a damaged file is still valid JSON. Older records without checksums are accepted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wlora.errors import ConfigError, RunFault
from wlora.reading import find_misfit, read_file, read_json
from wlora.storage.atomic_write import Put, patiently, put, write_whole
from wlora.storage.content_hash import hash_bytes
from wlora.storage.curve_writer import CurveWriter
from wlora.storage.recorded import Chosen, Content, Point
from wlora.storage.sealing import seal, unseal

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = 1
STATUSES = ("running", "success", "diverged", "oom", "interrupted", "failed", "stopped")


@dataclass
class Record:
    """The record of a run; docs/records.md describes the keys.

    Attributes:
        classes: scores of every class on the reported split (`wlora.metrics.classes`); empty for tasks without classes.
        error: why the run did not succeed; for a successful run, which of its files could not be written.
        packed: for a run trained in a pack, `with`: the run_ids of the others, and `dropout`: how masks were made.
        trained: whether this process trained the run, rather than finding its record. Not written to the file.
    """

    trained = False

    run_id: str
    status: str
    config: dict[str, Any]
    schema: int = SCHEMA
    task: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    classes: dict[str, Any] = field(default_factory=dict)
    primary_metric: str = ""
    parameters: dict[str, int] = field(default_factory=dict)
    adapters: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, float] = field(default_factory=dict)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    curve: str | None = None
    predictions: str | None = None
    packed: dict[str, Any] = field(default_factory=dict)


def _find_misfit(content: dict[str, Any]) -> str | None:
    """Return a message about the first part of a record whose type is wrong; None if all types are right."""
    misfit = (
        find_misfit(content, Record) or find_misfit(content, Content) or find_misfit(content["config"], Chosen, "config")
    )
    primary = content.get("primary_metric")
    if misfit is None and content["status"] == "success" and primary and primary not in content.get("metrics", {}):
        return f"metrics has no {primary}"
    return misfit


class MissingFile(ConfigError):
    """A file that belongs to a record does not exist: it was removed, or the record was copied without it."""


class RecordStore:
    """The records of one study: `<results_dir>/records/<run_id>.json`; `.jsonl` is the curve, `.parquet` the predictions.

    Args:
        put: moves written files to their final path. Pass `Claim.put` if other processes may execute the same run.
    """

    def __init__(self, results_dir: str | Path, put: Put = put) -> None:
        self.folder = Path(results_dir) / "records"
        self._put = put

    def path(self, run_id: str) -> Path:
        """Return the path of a run's record."""
        return self.folder / f"{run_id}.json"

    def load(self, run_id: str) -> Record | None:
        """Return a run's record; None if it has none.

        Raises:
            ConfigError: the file is damaged; the message says how.
            RunFault: the file cannot be read, so its content is unknown.
        """
        path = self.path(run_id)
        try:
            content = unseal(patiently(lambda: read_file(path)))
            if content.get("schema") != SCHEMA:
                raise ValueError(f"its schema is {content.get('schema')}, not {SCHEMA}")
            record = Record(**content)
            if record.run_id != run_id or record.status not in STATUSES:
                raise ValueError(f"its run_id is {record.run_id} and its status {record.status}")
            if misfit := _find_misfit(content):
                raise ValueError(misfit)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunFault(f"record {path} cannot be read ({error.strerror}); the file is kept") from None
        except ValueError as error:
            raise ConfigError(f"record {path} is damaged: {error}") from None
        except TypeError:
            raise ConfigError(f"record {path} is damaged: its keys are not those of a record") from None
        return record

    def read(self, run_id: str) -> Record | None:
        """Return a run's record; None if it has none or if it is damaged. The run is then repeated.

        Raises:
            RunFault: the file cannot be read.
        """
        try:
            return self.load(run_id)
        except ConfigError:
            return None

    def read_curve(self, record: Record, *, key: str = "") -> list[dict[str, Any]]:
        """Return the points of a run's learning curve.

        If the run has not succeeded, or its record has no checksum, a missing curve counts as empty, and an incomplete last
        line is skipped.

        Args:
            record: record of the run.
            key: return only points that have this key; applied only if the record has a checksum of the curve.

        Raises:
            MissingFile: the record has a checksum of the curve, but the file does not exist.
            ConfigError: the file is damaged or cannot be read.
        """
        path = self.path(record.run_id).with_suffix(".jsonl")
        try:
            content = patiently(lambda: read_file(path))
            if record.curve is not None and hash_bytes(content) != record.curve:
                raise ValueError("it does not match its checksum in the record")
            lines = content.decode().splitlines()
        except FileNotFoundError:
            if record.curve is None:
                return []
            raise MissingFile(f"learning curve {path} is missing") from None
        except OSError as error:
            raise ConfigError(f"learning curve {path} cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise ConfigError(f"learning curve {path} is damaged: {error}") from None
        points = []
        for number, line in enumerate(lines, start=1):
            if record.curve is not None and key not in line:
                continue
            try:
                points.append(read_json(line))
            except ValueError:
                if number < len(lines):
                    raise ConfigError(f"learning curve {path} is damaged: line {number} is not JSON") from None
        if misfit := find_misfit(points, list[Point], "points"):
            raise ConfigError(f"learning curve {path} is damaged: {misfit}")
        return points

    def write_predictions(self, run_id: str, table: pa.Table) -> str:
        """Write a run's predictions atomically as `<run_id>.parquet`; return a checksum of the file as 16 hex digits.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        import pyarrow as pa
        import pyarrow.parquet as parquet

        stream = pa.BufferOutputStream()
        parquet.write_table(table, stream, compression="zstd", compression_level=9)
        content = stream.getvalue().to_pybytes()
        write_whole(self.path(run_id).with_suffix(".parquet"), content, self._put)
        return hash_bytes(content)

    def read_predictions(self, record: Record) -> pa.Table | None:
        """Return a run's predictions on the dev set (`Task.tabulate`); None if its record mentions none.

        Raises:
            MissingFile: the file does not exist.
            ConfigError: the file is damaged or cannot be read.
        """
        if record.predictions is None:
            return None
        import pyarrow as pa
        import pyarrow.parquet as parquet

        path = self.path(record.run_id).with_suffix(".parquet")
        try:
            content = patiently(lambda: read_file(path))
            if hash_bytes(content) != record.predictions:
                raise ValueError("they do not match their checksum in the record")
            return parquet.read_table(pa.BufferReader(content))
        except FileNotFoundError:
            raise MissingFile(f"predictions {path} are missing") from None
        except ValueError as error:
            raise ConfigError(f"predictions {path} are damaged: {error}") from None
        except OSError as error:
            raise ConfigError(f"predictions {path} cannot be read ({error.strerror or error})") from None

    def write(self, record: Record) -> Path:
        """Write a record atomically: the file holds the old content or the new one, never a part.

        Raises:
            RunFault: the disk is full, the folder cannot be written, or another process has taken over the run. The old
                record is kept.
        """
        text = seal(asdict(record))
        target = self.path(record.run_id)
        try:
            write_whole(target, text.encode(), self._put)
        except OSError as error:
            raise RunFault(f"the record {target} cannot be written ({error.strerror}); an older record is kept") from error
        return target

    def curve(self, run_id: str, *, write: bool = True) -> CurveWriter:
        """Return a writer that starts a new learning curve of the run; with `write=False` it keeps points in memory only."""
        return CurveWriter(self.folder / f"{run_id}.jsonl" if write else None, self._put)

    def scan(self, skip: Container[str] = ()) -> Iterator[Record | ConfigError]:
        """Iterate over all files sorted by name: yield the record, or the error for a damaged file.

        Args:
            skip: run_ids of records that are not read.
        """
        try:
            names = set(os.listdir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in sorted(names):
            run_id, kind = os.path.splitext(name)
            if kind == ".json" and run_id not in skip:
                try:
                    record = self.load(run_id)
                except ConfigError as damage:
                    yield damage
                except RunFault as fault:
                    yield ConfigError(str(fault))
                else:
                    if record is not None:  # None: removed in the meantime
                        yield record
            elif kind == ".jsonl" and f"{run_id}.json" not in names and not self.path(run_id).exists():
                yield ConfigError(f"record {self.path(run_id)} is missing, but its learning curve exists")

    def stamps(self, suffix: str = ".json") -> dict[str, tuple[int, int, int]]:
        """Return size, modification time in nanoseconds and inode of each file, by run_id, without reading the files.

        Args:
            suffix: `.json` for the records, `.jsonl` for the learning curves.
        """
        found = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.folder) as entries:
            for entry in entries:
                run_id, kind = os.path.splitext(entry.name)
                if kind == suffix:
                    with contextlib.suppress(OSError):  # removed in the meantime
                        stat = entry.stat()
                        found[run_id] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        return found

    def __iter__(self) -> Iterator[Record]:
        """Iterate over all readable records, by run_id."""
        return (found for found in self.scan() if isinstance(found, Record))
