"""Validation rows made from the training rows: a share (`task.validation=0.1`) or a fold (`task.validation=folds=5`).

The split is stratified and depends only on the rows, `task.split_seed` and the share or fold. It never imports torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wlora.errors import ConfigError, wrong_value

if TYPE_CHECKING:
    import pyarrow as pa

    from wlora.config.schema import TaskConfig

LARGEST_SHARE, MOST_FOLDS = 0.5, 100
ALLOWED = f"a file, a share up to {LARGEST_SHARE}, folds=N (2 to {MOST_FOLDS}), or names of splits"
_BINS = 10  # groups of values in a regression


def made_from_train(name: str) -> bool:
    """Tell whether the name of a validation split is a share or a number of folds, as in `0.1` or `folds=5`."""
    return bool(re.fullmatch(r"0?\.\d+|folds=\d+", str(name)))


def count_folds(task: TaskConfig) -> int | None:
    """Return N of `task.validation=folds=N`; None for any other validation."""
    name = task.validation[0] if task.validation else ""
    return int(name.removeprefix("folds=")) if name.startswith("folds=") else None


def check_split(task: TaskConfig) -> None:
    """Check the share, the number of folds and the fold of a task.

    Raises:
        ConfigError: a value is out of range, or a share or folds are combined with other splits.
    """
    made = [name for name in task.validation if made_from_train(name)]
    folds = count_folds(task)
    if made and len(task.validation) > 1:
        raise wrong_value("task.validation", f"[{','.join(task.validation)}]", f"{made[0]} alone")
    if folds is not None and not 2 <= folds <= MOST_FOLDS:
        raise wrong_value("task.validation", made[0], ALLOWED)
    if made and folds is None and not 0 < float(made[0]) <= LARGEST_SHARE:
        raise wrong_value("task.validation", made[0], ALLOWED)
    if task.fold is not None and (folds is None or task.fold >= folds):
        allowed = "null without task.validation=folds=N" if folds is None else f"0 to {folds - 1}, or null for all"
        raise wrong_value("task.fold", task.fold, allowed)


def hold_out(table: pa.Table, labels: Sequence[Any] | None, task: TaskConfig, where: str) -> tuple[pa.Table, pa.Table]:
    """Split checked training rows into training and validation rows. Both keep the order of the file.

    Args:
        table: the rows.
        labels: the criterion for stratification: a class, a value or a list of classes per row; None for no stratification.
        task: a task whose validation is a share or folds. Without `task.fold` it is fold 0.
        where: the source of the rows, for error messages.

    Raises:
        ConfigError: a class occurs only once, or one of the two parts would be empty.
    """
    spec, rows = str(task.validation[0]), table.num_rows
    groups = np.zeros(rows, dtype=np.int64) if labels is None else _group(labels, task, f"{where}: task.validation={spec}")
    order = _deal(groups, task.split_seed)
    folds, position = count_folds(task), np.arange(rows)
    if folds is not None:
        chosen = position % folds == (task.fold or 0)
    else:
        share = float(spec)
        # Every position at which the rounded running total increases by one.
        chosen = np.floor((position + 1) * share + 0.5) > np.floor(position * share + 0.5)
    held = np.zeros(rows, dtype=bool)
    held[order[chosen]] = True
    if not held.any() or held.all():
        raise ConfigError(
            f"{where}: task.validation={spec} of {rows} rows leaves one part without rows; expected are more rows"
        )
    return table.filter(~held), table.filter(held)


def _deal(groups: np.ndarray, seed: int) -> np.ndarray:
    """Return all row indices sorted by group, in random order within each group.

    Taking every n-th row of this order gives about an n-th part of every group.
    """
    # Only RandomState guarantees the same random sequence in all versions of numpy.
    shuffled = np.random.RandomState(seed).permutation(len(groups))
    return shuffled[np.argsort(groups[shuffled], kind="stable")]


def _group(labels: Sequence[Any], task: TaskConfig, at: str) -> np.ndarray:
    """Return the group of each row: its class, its tenth of the values, or the rarest of its classes."""
    if labels and isinstance(labels[0], float):
        ranks = np.argsort(np.argsort(np.asarray(labels), kind="stable"), kind="stable")
        return ranks * _BINS // len(labels)
    if labels and isinstance(labels[0], list | tuple):
        counts = Counter(name for row in labels for name in set(row))
        return np.array([min(set(row), key=lambda name: (counts[name], name), default=-1) for row in labels])
    single: Counter[Hashable] = Counter(labels)
    for number, count in single.items():
        if count == 1:
            row = list(labels).index(number)
            name = task.labels[int(number)] if task.labels else number  # type: ignore[call-overload]
            raise ConfigError(
                f"{at}: the label {name} occurs once (row {row}), so it cannot be in both parts\n"
                "way out: merge or remove it, add rows, or give a file: task.validation=FILE"
            )
    return np.asarray(labels)
