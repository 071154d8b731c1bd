"""Which task and method each record of a study is of, so that `tuned` reads those it may choose from and no others.

A cache, `<results_dir>/records/.index`: it may be deleted at any time. It says of a file, known by its size and time of
change, that it need not be read. Nothing else is taken from it: every run that is chosen from is read from its record.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from wlora.reading import read_file
from wlora.records import RecordStore, seal, unseal
from wlora.staging import write_whole
from wlora.study import Run, read_study

# Reading so many records takes a twentieth of a second: a smaller study has no index, and a new record leaves it as it is.
UNINDEXED = 200


def read_related(results_dir: str | Path, task: str, method: str) -> tuple[list[Run], list[str]]:
    """Read the runs of one task and method; returns them, and what is wrong with files that may hold further ones.

    Args:
        results_dir: the study, an existing folder.
        task: the name of a task, or of rows of one's own under its name (`wlora.study.name_rows`).
        method: the name of a method.
    """
    store = RecordStore(results_dir)
    file, stamps = store.folder / ".index", store.stamps()  # taken first: what changes while it is read is read again
    known = {
        run_id: entry
        for run_id, entry in _read(file).items()
        if isinstance(entry, list) and len(entry) == 4 and entry[:2] == [*stamps.get(run_id, ())]
    }
    names = [[name, method] for name in (task, task.removesuffix("_own"))]
    runs, faults = read_study(results_dir, skip={run_id for run_id, entry in known.items() if entry[2:] not in names})
    found = {run.record.run_id: [run.record.config["task"]["name"], run.method] for run in runs}
    new = {run_id: [*stamps[run_id], *about] for run_id, about in found.items() if run_id in stamps.keys() - known.keys()}
    if len(new) >= UNINDEXED:
        with contextlib.suppress(OSError):  # a folder that cannot be written has none
            write_whole(file, seal(known | new, indent=None).encode())
    return [run for run in runs if found[run.record.run_id] in names], faults


def _read(file: Path) -> dict[str, Any]:
    """Return the index as it was last written, nothing where it is not there or damaged."""
    try:
        return unseal(read_file(file))
    except (OSError, ValueError):
        return {}
