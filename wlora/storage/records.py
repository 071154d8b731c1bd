"""One JSON file per run, written whole or not at all; beside it the learning curve and the predictions of the dev set.

A record carries a checksum of its content, and of a run that has succeeded those of the two files, so that damage on the
disk is seen even where what is left is still JSON. Records from before there were checksums are read without.
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
    """What is known of a run; the meaning of every key stands in the design under "A record".

    Attributes:
        classes: scores of every class on the reported split (`wlora.metrics.classes`); empty for tasks without classes.
        error: what ended a run that did not succeed; of one that did, which of its files could not be written.
        packed: of a run that trained in a pack, `with`: the run_ids of the others, and `dropout`: how masks were made.
        trained: whether this process trained it to the end, rather than found it recorded. Not written.
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
    """Return what of a record's content is not of the type that its readers rely on, None if all is."""
    misfit = (
        find_misfit(content, Record) or find_misfit(content, Content) or find_misfit(content["config"], Chosen, "config")
    )
    primary = content.get("primary_metric")
    if misfit is None and content["status"] == "success" and primary and primary not in content.get("metrics", {}):
        return f"metrics has no {primary}"
    return misfit


class RecordStore:
    """The records of one study: `<results_dir>/records/<run_id>.json`; `.jsonl` is the curve, `.parquet` the predictions.

    Args:
        put: moves what is written to its place; a run's own (`wlora.storage.claims.Claim`) where others may run it, too.
    """

    def __init__(self, results_dir: str | Path, put: Put = put) -> None:
        self.folder = Path(results_dir) / "records"
        self._put = put

    def path(self, run_id: str) -> Path:
        """Return where a run's record stands."""
        return self.folder / f"{run_id}.json"

    def load(self, run_id: str) -> Record | None:
        """Return a run's record, None if there is none.

        Raises:
            ConfigError: the file is damaged, with what is wrong.
            RunFault: the file cannot be read, which says nothing of what it holds.
        """
        path = self.path(run_id)
        try:
            content = unseal(patiently(lambda: read_file(path)))
            if content.get("schema") != SCHEMA:
                raise ValueError(f"it is of schema {content.get('schema')}, not {SCHEMA}")
            record = Record(**content)
            if record.run_id != run_id or record.status not in STATUSES:
                raise ValueError(f"it is of run {record.run_id} with status {record.status}")
            if misfit := _find_misfit(content):
                raise ValueError(misfit)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunFault(f"record {path} cannot be read ({error.strerror}); it stays as it is") from None
        except ValueError as error:
            raise ConfigError(f"record {path} is damaged: {error}") from None
        except TypeError:
            raise ConfigError(f"record {path} is damaged: its keys are not those of a record") from None
        return record

    def read(self, run_id: str) -> Record | None:
        """Return a run's record, None if there is none or it is damaged (a run then starts over).

        Raises:
            RunFault: the file cannot be read.
        """
        try:
            return self.load(run_id)
        except ConfigError:
            return None

    def read_curve(self, record: Record, *, key: str = "") -> list[dict[str, Any]]:
        """Return the points of a run's learning curve.

        Of a run that has not succeeded, or of a record without a checksum, a curve that is not there has no points, and
        what a crash left of the last line is skipped.

        Args:
            record: the run's.
            key: what the wanted points have; others are left out where a checksum says that nobody need look at them.

        Raises:
            ConfigError: the file is damaged or cannot be read.
        """
        path = self.path(record.run_id).with_suffix(".jsonl")
        try:
            content = patiently(lambda: read_file(path))
            if record.curve is not None and hash_bytes(content) != record.curve:
                raise ValueError("its checksum, which is in the record, does not hold")
            lines = content.decode().splitlines()
        except FileNotFoundError:
            if record.curve is None:
                return []
            raise ConfigError(f"learning curve {path} is damaged: it is not there") from None
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
                    raise ConfigError(f"learning curve {path} is damaged: line {number} is no JSON") from None
        if misfit := find_misfit(points, list[Point], "points"):
            raise ConfigError(f"learning curve {path} is damaged: {misfit}")
        return points

    def write_predictions(self, run_id: str, table: pa.Table) -> str:
        """Write a run's predictions as `<run_id>.parquet`, whole or not at all; returns 16 hex digits for the content.

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
        """Return what a run predicted of the dev set (`Task.tabulate`), None where its record tells of none.

        Raises:
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
                raise ValueError("their checksum, which is in the record, does not hold")
            return parquet.read_table(pa.BufferReader(content))
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(f"predictions {path} are damaged: {error}") from None
        except OSError as error:
            raise ConfigError(f"predictions {path} cannot be read ({error.strerror or error})") from None

    def write(self, record: Record) -> Path:
        """Write a record atomically: the file holds the old content or the new one, never a part.

        Raises:
            RunFault: the disk is full, the folder cannot be written, or the run is another's by now; the old record stays.
        """
        text = seal(asdict(record))
        target = self.path(record.run_id)
        try:
            write_whole(target, text.encode(), self._put)
        except OSError as error:
            raise RunFault(
                f"the record {target} cannot be written ({error.strerror}); an older one stays as it was"
            ) from error
        return target

    def curve(self, run_id: str, *, write: bool = True) -> CurveWriter:
        """Return a writer that starts the run's learning curve afresh; with `write=False` one that only remembers."""
        return CurveWriter(self.folder / f"{run_id}.jsonl" if write else None, self._put)

    def scan(self, skip: Container[str] = ()) -> Iterator[Record | ConfigError]:
        """Iterate over all files, by name: each as its record, or as what is wrong with it.

        Args:
            skip: the run_ids of records that need not be read.
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
                    if record is not None:  # not removed since
                        yield record
            elif kind == ".jsonl" and f"{run_id}.json" not in names and not self.path(run_id).exists():
                yield ConfigError(f"record {self.path(run_id)} is not there, but its learning curve is")

    def stamps(self, suffix: str = ".json") -> dict[str, tuple[int, int, int]]:
        """Return, by run_id, the size of each file, when it was changed (nanoseconds) and its inode, without reading any.

        Args:
            suffix: `.json` for the records, `.jsonl` for the learning curves.
        """
        found = {}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.folder) as entries:
            for entry in entries:
                run_id, kind = os.path.splitext(entry.name)
                if kind == suffix:
                    with contextlib.suppress(OSError):  # removed since
                        stat = entry.stat()
                        found[run_id] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        return found

    def __iter__(self) -> Iterator[Record]:
        """Iterate over all readable records, by run_id."""
        return (found for found in self.scan() if isinstance(found, Record))
