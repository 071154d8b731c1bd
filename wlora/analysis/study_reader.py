"""Reads the records of a results folder as the runs of a study. Never imports torch.

Damaged files are reported and left out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from wlora.analysis.study import Run, setting_of
from wlora.distributed import first_time
from wlora.errors import ConfigError, wrong_value
from wlora.reading import find_misfit
from wlora.storage.index import Entry, Index
from wlora.storage.packing import Packed, Unpacker, pack
from wlora.storage.recorded import Finished
from wlora.storage.records import MissingFile, Record, RecordStore

# Errors that reading a damaged record can cause.
_DAMAGES = (KeyError, TypeError, ValueError, AttributeError, RecursionError)


def read_study(results_dir: str | Path, kinds: Collection[tuple[str, str]] | None = None) -> tuple[list[Run], list[str]]:
    """Read the records of a study; return the runs sorted by run_id, and one message per damaged file.

    Files with a valid entry in `wlora.storage.index` are not read. Runs of one setting share the same setting object and
    equal parts of their records, which must not be modified.

    Args:
        results_dir: folder of the study.
        kinds: return only runs with these pairs of task and method, named as in the configuration; None for all.

    Raises:
        ConfigError: the folder does not exist.
    """
    if not os.path.isdir(results_dir):
        raise wrong_value("results_dir", results_dir, "a folder with the records of a study")
    store = RecordStore(results_dir)
    index, unpack, wanted = Index(store, ".json"), _Unpacking(), None if kinds is None else {_kind(*kind) for kind in kinds}
    runs, known, faults = [], set(), []
    for name, frame, columns in index:
        try:
            kind, own, *long = columns
            if wanted is None or kind in wanted:
                runs.append(unpack(Packed(frame, own, tuple(long))))
        except _DAMAGES:
            continue  # the entry was written by another version: read the file instead
        known.add(name)
    for found in store.scan(known):
        if isinstance(found, ConfigError):
            faults.append(str(found))
            continue
        try:
            packed = pack(found)
            run = _whole(unpack(packed))
            _check_types(found)
        except _DAMAGES as error:
            # Only for records without a checksum: `scan` reports the damage of all others.
            faults.append(f"record {store.path(found.run_id)} is damaged: {type(error).__name__} {error}")
            continue
        kind = _kind(str(found.config["task"]["name"]), run.method)
        index.add(Entry(found.run_id, packed.frame, (kind, packed.own, *packed.long)))
        if wanted is None or kind in wanted:
            runs.append(run)
    index.write()
    return sorted(runs, key=lambda run: f"{run.record.run_id}.json"), faults


def _kind(task: str, method: str) -> bytes:
    return json.dumps([task, method]).encode()


def read_run(record: Record) -> Run:
    """Return the run of a record: the record with its setting.

    Raises:
        ValueError: the record is damaged. This is possible only for a record without a checksum.
    """
    try:
        run = _whole(Run(record, setting_of(record)))
        _check_types(record)
    except _DAMAGES as error:
        raise ValueError(f"{type(error).__name__} {error}") from None
    return run


class _Unpacking:
    """Converts packed records to runs. Records with the same frame have the same setting, which is computed once."""

    def __init__(self) -> None:
        self._unpack = Unpacker()
        self._settings: dict[bytes, dict[str, Any]] = {}

    def __call__(self, packed: Packed) -> Run:
        record = self._unpack(packed)
        if packed.frame not in self._settings:
            self._settings[packed.frame] = setting_of(record)
        return Run(record, self._settings[packed.frame])


def _whole(run: Run) -> Run:
    """Return the run if all its properties can be computed; otherwise raise KeyError, TypeError or ValueError."""
    for name in ("task", "model", "method", "seed", "point", "rank", "k", "n"):
        getattr(run, name)
    if run.status == "success":
        float(run.score)
    return run


def _check_types(record: Record) -> None:
    """Raise ValueError if a part of a successful run's record has a wrong type."""
    if record.status == "success" and (misfit := find_misfit(vars(record), Finished)):
        raise ValueError(misfit)


def read_runs(results_dir: str | Path) -> list[Run]:
    """Read all records of a study. For each damaged file, print a notice and leave it out.

    Raises:
        ConfigError: the folder does not exist.
    """
    runs, faults = read_study(results_dir)
    for fault in faults:
        print(f"notice: {fault}; it is left out", file=sys.stderr)
    return runs


def read_curve(store: RecordStore, run: Run, *, key: str = "") -> list[dict[str, Any]]:
    """Read a run's learning curve (`RecordStore.read_curve`). If it is damaged, print a notice and return no points."""
    try:
        return store.read_curve(run.record, key=key)
    except ConfigError as damage:
        leave_out(damage, "learning curves")
        return []


def leave_out(damage: ConfigError, files: str) -> None:
    """Print a notice, once per command, that a file of a run is left out.

    Of missing files only the first one is named: often the records of a whole study were copied without them.

    Args:
        damage: the error that names the file.
        files: what the file contains, in the plural.
    """
    missing = isinstance(damage, MissingFile)
    if first_time(f"missing {files}" if missing else str(damage)):
        print(f"notice: {damage}; {'all missing ' + files + ' are' if missing else 'it is'} left out", file=sys.stderr)
