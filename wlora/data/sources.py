"""Loading of task data from a local folder, a generator or the hub, in this order of priority. Never imports torch."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wlora.data import local_files as files
from wlora.data.held_out import count_folds, hold_out, made_from_train
from wlora.data.row_checks import ANSWERS, LABEL, check_rows, count_empty, needed_columns
from wlora.errors import ConfigError
from wlora.storage.content_hash import hash_bytes, hash_file, hash_files, read_as_hashed

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
        rows: `train` and every validation split by its name, with the columns of `check_rows`.
        empty: number of empty texts by split and column, without columns that have none.
        fingerprint: the value of `fingerprint(task)`; for the hub, `hub_id@commit`.
        revision: resolved commit on the hub; None for local and generated data.
    """

    rows: dict[str, Dataset]
    fingerprint: str
    revision: str | None
    empty: dict[str, dict[str, int]]


def fingerprint(task: TaskConfig) -> str | None:
    """Return a content hash of 16 hex digits for local files or a generator; None for the hub.

    This function only hashes the files' bytes. It parses no rows and needs no network.

    Raises:
        ConfigError: a local file is missing or empty.
    """
    if task.path is not None:
        try:
            return _hash_local(task)
        except OSError as error:
            raise ConfigError(f"task.path={task.path}: {error.filename} cannot be read ({error.strerror})") from error
    if task.generator is not None:
        from wlora.data.synthetic.story import GENERATOR_VERSION

        return hash_bytes(f"{task.generator}@{GENERATOR_VERSION}".encode())
    return None


def _hash_local(task: TaskConfig) -> str:
    """Hash the local files. The name of a single file is not hashed, because it is arbitrary."""
    place = Path(task.path or "").expanduser()
    if not place.is_file() and task.validation_path is None:
        return hash_files(find_local(task))
    named = [(split, file) for split in _loaded_names(task) for file in files.find_files(task, split)]
    single = {place, Path(task.validation_path or "").expanduser()}
    lines = [
        f"{f'{split}.{files.extension(file)}' if file in single else file.name}:{hash_file(file)}\n" for split, file in named
    ]
    return hash_bytes("".join(lines).encode())


def find_local(task: TaskConfig) -> list[Path]:
    """Return the files in `task.path` for all splits in order; an empty list if `task.path` is null.

    Raises:
        ConfigError: a folder, file or shard is missing, or empty.
    """
    return [] if task.path is None else [file for split in _loaded_names(task) for file in files.find_files(task, split)]


def load_splits(task: TaskConfig, *, offline: bool) -> Splits:
    """Load and check `train` and the validation splits.

    `task.max_train_rows` selects the first n training rows of one fixed permutation. The subset is the same for every seed
    and method, and a smaller subset is contained in a larger one. `task.max_eval_rows` selects the first n rows of each
    validation split. A limit larger than the number of rows selects all rows.

    A share or fold of the training rows (`wlora.data.held_out`) is taken before the limits apply.

    Args:
        task: the task to load.
        offline: use only the hub's local caches.

    Raises:
        ConfigError: a file, split, column or cell is invalid, or the data on the hub are not available.
    """
    content, revision = fingerprint(task), None
    if task.path is not None:
        with read_as_hashed(f"task.path={task.path}", content, lambda: (fingerprint(task), find_local(task))):
            tables = {split: _read_local(task, split) for split in _loaded_names(task)}
    elif task.generator is not None:
        generated = {split: _generate(task.generator, split) for split in _loaded_names(task)}
        tables = _check_all(generated, task, _where(task))
    else:
        loaded, revision = load_hub(task, _loaded_names(task), offline=offline)
        tables = _check_all({split: loaded[split] for split in _loaded_names(task)}, task, _where(task))
    made = [name for name in task.validation if made_from_train(name)]
    for name in made:
        groups = _groups(tables["train"], task)
        tables["train"], tables[name] = hold_out(tables["train"], groups, task, _where(task))
    identity = content or f"{task.hub_id}@{revision or task.revision}"
    rows = {}
    for split, table in tables.items():
        chosen = _limit(table, task, split)
        part = f"{split}/{made[0]}/{task.fold}/{task.split_seed}" if made else split
        rows[split] = wrap(chosen, f"{identity}/{task.subset}/{part}/{chosen.num_rows}")
    empty = {split: texts for split, table in tables.items() if (texts := count_empty(table, task))}
    return Splits(rows=rows, fingerprint=identity, revision=revision, empty=empty)


def count_train_rows(task: TaskConfig) -> int | None:
    """Return the number of training rows of a task on the hub, without loading it; None if `task.train_rows` is not set.

    Held-out rows and `task.max_train_rows` are subtracted, as by `load_splits`.
    """
    rows = task.train_rows
    if rows is None:
        return None
    if any(map(made_from_train, task.validation)):
        rows -= _count_held_out(task, rows)
    return min(rows, task.max_train_rows or rows)


def _count_held_out(task: TaskConfig, rows: int) -> int:
    """Return how many of the training rows `hold_out` takes as validation rows."""
    folds = count_folds(task)
    return math.floor(rows * float(task.validation[0]) + 0.5) if folds is None else len(range(task.fold or 0, rows, folds))


def load_inputs(task: TaskConfig, split: str, *, offline: bool) -> pa.Table:
    """Load the rows of any split without checks, for predictions, because the test split of a benchmark has no labels.

    Raises:
        ConfigError: the split does not exist, or cannot be read.
    """
    if task.path is not None:
        return _read_all(task, split, check=False)
    if task.generator is not None:
        return _generate(task.generator, split)
    return load_hub(task, [split], offline=offline)[0][split]


def read_raw(task: TaskConfig, *, offline: bool) -> tuple[dict[str, pa.Table], str]:
    """Load `train`, and from the hub every other split, without checks. Also return a name of the rows for messages.

    Raises:
        ConfigError: a file or split is missing or cannot be read, or two files have different columns.
    """
    if task.path is not None:
        return {"train": _read_all(task, "train", check=False)}, _where(task)
    return load_hub(task, ["train"], offline=offline)[0], _where(task)


def _loaded_names(task: TaskConfig) -> list[str]:
    """Return the splits that are loaded: all except a validation split made from training rows."""
    return ["train", *(name for name in task.validation if not made_from_train(name))]


def _where(task: TaskConfig) -> str:
    if task.path is not None:
        return f"task.path={task.path}"
    return f"task={task.name}: {task.hub_id}" if task.generator is None else f"task.generator={task.generator}"


def _groups(table: pa.Table, task: TaskConfig) -> list[Any] | None:
    """Return the criterion for stratification: labels, or whether a question has an answer; None for summaries."""
    if LABEL in table.column_names:
        return list(table.column(LABEL).to_pylist())
    if ANSWERS in table.column_names and task.unanswerable:
        return [[bool(answer["text"])] for answer in table.column(ANSWERS).to_pylist()]
    return None


def _check_all(tables: dict[str, pa.Table], task: TaskConfig, where: str) -> dict[str, pa.Table]:
    return {split: check_rows(table, task, f"{where}: {split}") for split, table in tables.items()}


def _read_local(task: TaskConfig, split: str) -> pa.Table:
    return _read_all(task, split, check=True)


def _read_all(task: TaskConfig, split: str, *, check: bool) -> pa.Table:
    """Read the files of a split. Shards are checked separately, because their class names and types may differ."""
    import pyarrow as pa

    named = {files.location(task, file): file for file in files.find_files(task, split)}
    read = {at: files.read_table(file, needed_columns(task) if check else None, at) for at, file in named.items()}
    filled = {at: table for at, table in read.items() if table.num_rows} or read
    if check:
        return pa.concat_tables(check_rows(table, task, at) for at, table in filled.items())
    (first, schema), *others = ((at, table.schema) for at, table in filled.items())
    for at, other in others:
        missing = [name for name in schema.names if name not in other.names] or [
            name for name in other.names if name not in schema.names
        ]
        if missing:
            owner, lacking = (first, at) if missing[0] in schema.names else (at, first)
            raise ConfigError(
                f"{lacking}: no column {missing[0]}, which {owner.rpartition(': ')[2]} has\n"
                "expected are files with the same columns"
            )
    try:
        return pa.concat_tables(filled.values(), promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        what = f"the files have columns of different types: {files.line_of(error)}"
        raise ConfigError(f"task.path={task.path}: {what}") from error


@functools.cache
def _generate(generator: str, split: str) -> pa.Table:
    import pyarrow as pa

    from wlora.data.synthetic.story import generate

    return pa.table(generate(generator, split))


def load_hub(task: TaskConfig, needed: Sequence[str], *, offline: bool) -> tuple[dict[str, pa.Table], str | None]:
    """Return the tables of all splits and their commit (None for caches of old versions of the datasets library).

    Args:
        task: its keys determine repository, subset and revision.
        needed: splits that must exist.
        offline: use only the local caches.

    Raises:
        ConfigError: the data set cannot be loaded, has another commit, or lacks a split.
    """
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
    absent = [split for split in needed if split not in loaded]
    if absent:
        there = ", ".join(loaded)
        raise ConfigError(f"task={task.name}: {task.hub_id} has no split {absent[0]}; there is: {there}")
    return {split: rows.data.table for split, rows in loaded.items()}, commit


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


def wrap(table: pa.Table, identity: str) -> Dataset:
    """Return rows as a data set, whose fingerprint is a hash of `identity`."""
    from datasets import Dataset

    # Without an explicit fingerprint the library would hash the whole table.
    return Dataset(table, fingerprint=hash_bytes(identity.encode()))
