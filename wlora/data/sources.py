"""Loading of task data from a local folder, a generator or the hub, in this order of priority. Never imports torch."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wlora.data import local_files as files
from wlora.data.row_checks import check_rows, needed_columns
from wlora.errors import ConfigError
from wlora.storage.content_hash import hash_bytes, hash_files, read_as_hashed

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, DatasetBuilder

    from wlora.config.schema import TaskConfig

_SUBSET_SEED = 0
_PARQUET_COPY = "refs/convert/parquet"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Splits:
    """The checked rows of a task.

    Attributes:
        rows: `train` and every validation split by its name. A classification task has its text columns
            (strings) and `label` (int64 class number, or float64 for regression); others keep all columns.
        fingerprint: the value of `fingerprint(task)`; for the hub, `hub_id@commit`.
        revision: resolved commit on the hub; None for local and generated data.
    """

    rows: dict[str, Dataset]
    fingerprint: str
    revision: str | None


def fingerprint(task: TaskConfig) -> str | None:
    """Return a content hash of 16 hex digits for local files or a generator; None for the hub.

    This function only hashes the files' bytes. It parses no rows and needs no network.

    Raises:
        ConfigError: a local file is missing or empty.
    """
    if task.path is not None:
        try:
            return hash_files(find_local(task))
        except OSError as error:
            raise ConfigError(f"task.path={task.path}: {error.filename} cannot be read ({error.strerror})") from error
    if task.generator is not None:
        from wlora.data.synthetic.story import GENERATOR_VERSION

        return hash_bytes(f"{task.generator}@{GENERATOR_VERSION}".encode())
    return None


def find_local(task: TaskConfig) -> list[Path]:
    """Return the files in `task.path` for all splits in order; an empty list if `task.path` is null.

    Raises:
        ConfigError: a folder, file or shard is missing, or empty.
    """
    return [] if task.path is None else [file for split in _split_names(task) for file in _local_files(task, split)]


def load_splits(task: TaskConfig, *, offline: bool) -> Splits:
    """Load and check `train` and the validation splits.

    `task.max_train_rows` selects the first n training rows of one fixed permutation. The subset is the same for every seed
    and method, and a smaller subset is contained in a larger one. `task.max_eval_rows` selects the first n rows of each
    validation split. A limit larger than the number of rows selects all rows.

    Args:
        task: the task to load.
        offline: use only the hub's local caches.

    Raises:
        ConfigError: a file, split, column or cell is invalid, or the data on the hub are not available.
    """
    content, revision = fingerprint(task), None
    if task.path is not None:
        with read_as_hashed(f"task.path={task.path}", content, lambda: (fingerprint(task), find_local(task))):
            tables = {split: _read_local(task, split) for split in _split_names(task)}
    elif task.generator is not None:
        made = {split: _generate(task.generator, split) for split in _split_names(task)}
        tables = _check_all(made, task, f"task.generator={task.generator}")
    else:
        loaded, revision = _load_hub(task, offline=offline)
        tables = _check_all(loaded, task, f"task={task.name}: {task.hub_id}")
    identity = content or f"{task.hub_id}@{revision or task.revision}"
    rows = {}
    for split, table in tables.items():
        chosen = _limit(table, task, split)
        rows[split] = _wrap(chosen, f"{identity}/{task.subset}/{split}/{chosen.num_rows}")
    return Splits(rows=rows, fingerprint=identity, revision=revision)


def _split_names(task: TaskConfig) -> list[str]:
    return ["train", *task.validation]


def _local_files(task: TaskConfig, split: str) -> list[Path]:
    return files.find_files(Path(task.path or "").expanduser(), split)


def _check_all(tables: dict[str, pa.Table], task: TaskConfig, where: str) -> dict[str, pa.Table]:
    return {split: check_rows(table, task, f"{where}: {split}") for split, table in tables.items()}


def _read_local(task: TaskConfig, split: str) -> pa.Table:
    """Read and check the rows of a split. Shards are checked separately, because their class names and types may differ."""
    import pyarrow as pa

    read = {file: files.read_table(file, needed_columns(task)) for file in _local_files(task, split)}
    filled = {file: table for file, table in read.items() if table.num_rows} or read
    return pa.concat_tables(check_rows(table, task, f"task.path={task.path}: {file.name}") for file, table in filled.items())


@functools.cache
def _generate(generator: str, split: str) -> pa.Table:
    import pyarrow as pa

    from wlora.data.synthetic.story import generate

    return pa.table(generate(generator, split))


def _load_hub(task: TaskConfig, *, offline: bool) -> tuple[dict[str, pa.Table], str | None]:
    """Return the tables of all splits and their commit (None for caches of old versions of the datasets library)."""
    if offline:
        from wlora.data.hub import go_offline

        go_offline()
    import datasets

    if offline:
        # The library reads the environment at import, which may have happened earlier.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        builder = _find_builder(task)
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    except Exception as error:  # four libraries raise exceptions without a common base class
        raise ConfigError(
            f"task={task.name}: {task.hub_id} cannot be loaded: {files.line_of(error)}\n"
            "ways out: task.path=DIR with local copies, a filled cache (HF_HOME), experiment=demo"
        ) from error
    commit = builder.hash if _COMMIT.fullmatch(builder.hash or "") else None
    if _COMMIT.fullmatch(task.revision) and commit != task.revision:
        # Offline, the library uses any commit in its cache.
        raise ConfigError(f"task.revision={task.revision}: the cache holds {commit or 'another one'}")
    absent = [split for split in _split_names(task) if split not in loaded]
    if absent:
        there = ", ".join(loaded)
        raise ConfigError(f"task={task.name}: {task.hub_id} has no split {absent[0]}; there is: {there}")
    return {split: loaded[split].data.table for split in _split_names(task)}, commit


def _find_builder(task: TaskConfig) -> DatasetBuilder:
    """Return the dataset builder for the requested revision, or for the hub's Parquet conversion.

    The library no longer supports repositories with a loading script. For these, the hub provides a Parquet conversion of
    `main`.
    """
    import datasets

    try:
        return datasets.load_dataset_builder(task.hub_id, task.subset, revision=task.revision)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error) or task.revision != "main":
            raise
        return datasets.load_dataset_builder(task.hub_id, task.subset, revision=_PARQUET_COPY)


def _limit(table: pa.Table, task: TaskConfig, split: str) -> pa.Table:
    limit = task.max_train_rows if split == "train" else task.max_eval_rows
    if limit is None or limit >= table.num_rows:
        return table
    if split != "train":
        return table.slice(0, limit)
    # Only RandomState guarantees the same random sequence in all versions of numpy.
    return table.take(np.random.RandomState(_SUBSET_SEED).permutation(table.num_rows)[:limit])


def _wrap(table: pa.Table, identity: str) -> Dataset:
    from datasets import Dataset

    # Without an explicit fingerprint the library would hash the whole table.
    return Dataset(table, fingerprint=hash_bytes(identity.encode()))
