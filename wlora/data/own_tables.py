"""Own tables: find the columns, the labels and the validation rows of a task in the user's table.

A task with `benchmark: table` (such as `conf/task/text_classification.yaml`) names no columns and no labels. This module
finds them and writes them into the configuration. From then on, such a task is handled like any benchmark. The validation
rows are determined for every task. This module never imports torch.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wlora.data import local_files as files
from wlora.data.column_names import find_columns, listed
from wlora.data.held_out import ALLOWED, check_split, made_from_train
from wlora.data.labels import (
    class_finder,
    class_parts,
    count_labels,
    name_cells,
    order_names,
    plain,
    refuse_nulls,
    shorten_class,
    stored_names,
    values,
)
from wlora.data.row_checks import LABEL, label_column, merge_label_columns
from wlora.data.sources import find_local, read_raw
from wlora.errors import ConfigError, shorten, wrong_value
from wlora.metrics.entities import TAG_METRICS, mark_entities
from wlora.metrics.squad import UNANSWERABLE_METRICS

if TYPE_CHECKING:
    import pyarrow as pa

    from wlora.config.schema import TaskConfig

BENCHMARK = "table"
SHARE = "0.1"
"""The share of the training rows that is held out if a table has no validation rows."""
_CLASSES_SHOWN = 20
_WITH_CLASSES = ("classification", "multi_label", "token_classification")


def settle(task: TaskConfig, *, offline: bool) -> list[str]:
    """Fill in the keys that follow from `text` and `validation` and, for an own table, from its content.

    Args:
        task: the task; its `text`, `columns`, `label`, `labels`, `validation` and `validation_path` are completed.
        offline: use only the hub's local caches.

    Returns:
        Lines that tell the user what was found.

    Raises:
        ConfigError: a value is wrong, columns cannot be inferred, or the labels differ from the requested ones.
    """
    if task.path is not None and not task.path.strip():
        raise wrong_value("task.path", repr(task.path), "a file, or a folder of files")
    if doubled := [name for name in task.labels if task.labels.count(name) > 1]:
        raise wrong_value("task.labels", f"[{','.join(task.labels)}]", f"each class once; {doubled[0]} is there twice")
    _settle_text(task)
    _settle_label(task)
    told = _settle_validation(task)
    check_split(task)
    _check_weights(task)
    if task.benchmark != BENCHMARK or (task.path is None and task.hub_id is None):
        return told
    find_local(task)
    tables, where = read_raw(task, offline=offline)
    told += _settle_splits(task, list(tables)) + _describe_files(task)
    table = tables["train"]
    if table.num_rows == 0:
        raise ConfigError(f"{where}: there are no rows")
    found = find_columns(table, task, where)
    task.columns, task.label = found.columns, None if found.label == _standard(task) else found.label
    unused = f"; not used: {listed(found.unused)}" if found.unused else ""
    named = f"[{','.join(found.label)}]" if isinstance(found.label, list) else found.label
    texts = ",".join(name for name in found.columns if name != found.label)  # a summary's label is a text column, too
    told.insert(0, f"table      {table.num_rows:,} rows, task.text=[{texts}], task.label={named}{unused}")
    if task.kind in _WITH_CLASSES:
        told.insert(1, _settle_labels(task, table, where))
    elif task.kind == "regression":
        told.insert(1, _describe_values(task, table, where))
    elif task.kind == "question_answering":
        told[1:1] = _settle_answers(task, table)
    return told


def require_source(task: TaskConfig) -> None:
    """Check that an own table has a location, and that the packages for the kind of task are installed.

    Raises:
        ConfigError: neither `task.path` nor `task.hub_id` is set, or seqeval is not installed.
    """
    if task.kind == "token_classification" and importlib.util.find_spec("seqeval") is None:
        raise ConfigError(f"task={task.name}: the package seqeval is not installed\nway out: pip install 'wlora[tokens]'")
    if task.benchmark == BENCHMARK and task.path is None and task.hub_id is None:
        raise ConfigError(
            f"task={task.name} reads your own table: add task.path=FILE (or a folder) or task.hub_id=OWNER/NAME"
        )


def _settle_text(task: TaskConfig) -> None:
    """Move `task.text` to `task.columns`; for a summary the label is the second column."""
    text = task.text
    if text is None:
        return
    names = _column_names(text)
    if names is None:
        raise wrong_value("task.text", text, "NAME, [NAME] or [NAME,NAME], columns of the table")
    if len(set(names)) < len(names) or len(names) > 2:
        raise wrong_value("task.text", f"[{','.join(names)}]", "one column, or two different ones")
    needed = {"question_answering": 2, "token_classification": 1}.get(task.kind, len(names))
    needed = 1 if task.kind == "summarization" and task.label else needed
    if len(names) != needed:
        columns = "[QUESTION,CONTEXT], two columns" if needed == 2 else "one column"
        raise wrong_value("task.text", f"[{','.join(names)}]", f"{columns} for task={task.name}")
    target = [task.label] if task.kind == "summarization" and task.label else []
    task.columns, task.text = [*names, *target], None


def _settle_label(task: TaskConfig) -> None:
    """Check the form of `task.label`: one column, or for classes of which a row may have several, one column for each."""
    if task.label is None:
        return
    names = _column_names(task.label)
    several = task.kind == "multi_label"
    if names is None or len(set(names)) < len(names) or (len(names) > 1 and not several):
        given = f"[{','.join(map(str, task.label))}]" if isinstance(task.label, list) else task.label
        more = ", or [NAME,NAME], different columns of 0 and 1" if several else "; several are for task=multi_label"
        raise wrong_value("task.label", given, f"NAME, a column of the table{more}")
    task.label = names if len(names) > 1 else names[0]


def _column_names(given: object) -> list[str] | None:
    """Return given names of columns, of which YAML reads some as numbers; None if they are something else."""
    items = given if isinstance(given, list) else [given]
    names = [str(item) for item in items if isinstance(item, str | int) and not isinstance(item, bool)]
    return names if items and len(names) == len(items) and all(names) else None


def _settle_validation(task: TaskConfig) -> list[str]:
    """Turn `task.validation` into a list of split names; a file goes to `task.validation_path`."""
    given = task.validation
    single = given[0] if isinstance(given, list) and len(given) == 1 else given
    if isinstance(single, int | float) and not isinstance(single, bool):
        single = f"{single:g}"
    if isinstance(single, str):
        single = single.strip()
        share = single.replace(".", "", 1).replace("e-", "", 1).isdecimal()
        if share and not made_from_train(single):
            raise wrong_value("task.validation", single, ALLOWED)
        if not made_from_train(single) and (os.sep in single or files.extension(Path(single)) in files.EXTENSIONS):
            if not os.path.isfile(Path(single).expanduser()):
                raise ConfigError(f"task.validation={single}: the file does not exist")
            if task.path is None:
                raise ConfigError(f"task.validation={single}: a file is allowed only with task.path")
            task.validation_path, single = single, "validation"
        task.validation = [single]
    elif not isinstance(given, list) or not all(isinstance(name, str) and name for name in given):
        raise wrong_value("task.validation", given, ALLOWED)
    made = any(made_from_train(name) for name in task.validation)
    if made:
        task.validation = [f"{float(n):g}" if not n.startswith("folds=") else n for n in task.validation]
        task.validation_path = None
    elif task.path and os.path.isfile(Path(task.path).expanduser()) and task.validation_path is None:
        if task.validation and task.benchmark == BENCHMARK:  # a benchmark has names of splits that nobody has given
            given = ",".join(task.validation)
            raise wrong_value("task.validation", given, f"{ALLOWED}; task.path={task.path} is a file and has no splits")
        task.validation = [SHARE]
        return [_describe(task)]
    return [_describe(task)] if made else []


def _describe(task: TaskConfig) -> str:
    name = task.validation[0]
    if name.startswith("folds="):
        return f"validation one of {name.removeprefix('folds=')} folds of the training rows (task.validation={name})"
    return f"validation {float(name):.0%} of the training rows, stratified (task.validation={name})"


def _settle_splits(task: TaskConfig, there: Sequence[str]) -> list[str]:
    """Choose the validation rows of an own table: a split with a usual name, otherwise a share of the training rows."""
    if task.validation:
        return []
    if task.path is not None:
        name = files.find_validation(Path(task.path).expanduser())
    else:
        name = next((name for name in files.VALIDATION_NAMES if name in there), None)
    task.validation = [name or SHARE]
    return [f"validation the rows of {name}"] if name else [_describe(task)]


def _describe_files(task: TaskConfig) -> list[str]:
    """Return the line about a folder with several data files: the training files, and the files that no split uses."""
    place = Path(task.path or "").expanduser()
    there = files.data_files(place) if task.path is not None and os.path.isdir(place) else []
    if len(there) < 2:
        return []
    used, training = {file.resolve() for file in find_local(task)}, files.find_files(task, "train")
    unused = [file.name for file in there if file.resolve() not in used]
    left_out = f"; not used: {listed(unused)}" if unused else ""
    return [f"files      training rows from {listed([file.name for file in training])}{left_out}"]


def _standard(task: TaskConfig) -> str | None:
    """Return the default name of the label column, used if `task.label` is null."""
    return label_column(dataclasses.replace(task, label=None))


def _settle_labels(task: TaskConfig, table: pa.Table, where: str) -> str:
    """Find the classes of the label column, or check the given ones; return the line that lists them."""
    name, several = label_column(task) or LABEL, task.label if isinstance(task.label, list) else None
    at = f"{where}: column {name}" if several is None else f"{where}: task.label=[{','.join(several)}]"
    table = merge_label_columns(table, task, where)
    column, names = table.column(name), several or stored_names(table.schema, name)
    if task.kind != "multi_label":
        refuse_nulls(plain(column), at)
    if task.kind == "classification":
        cells = _require_single(name_cells(column, names, at), at)
    else:
        tags, find = task.kind == "token_classification", class_finder(task.labels) if task.labels else None
        cells = class_parts(column, names, at, tags=tags, find=find)
    counted = count_labels(cells, at)
    if names is not None and (several or not all(cell.isdecimal() for cell, _ in counted)):
        counted = order_names(names, counted)
    if task.labels:
        counted = _count_given(task.labels, counted, at)
    else:
        task.labels = [label for label, _ in counted]
    if task.kind == "token_classification" and not mark_entities(task.labels):
        task.metrics, task.primary_metric = list(TAG_METRICS), TAG_METRICS[0]  # entities cannot be counted
    shown = [f"{shorten_class(label)} {number:,}" for label, number in counted[:_CLASSES_SHOWN]]
    more = [f"… {len(counted) - _CLASSES_SHOWN} more"] if len(counted) > _CLASSES_SHOWN else []
    return f"labels     {', '.join([*shown, *more])}"


def _require_single(cells: list[Any], at: str) -> list[Any]:
    """Return the class names of all rows; raise an error for a row with a list of classes, or without a class."""
    listed_cell = next((row for row, cell in enumerate(cells) if isinstance(cell, list) or files.is_list_text(cell)), None)
    if listed_cell is not None:
        raise ConfigError(f"{at}: row {listed_cell} has a list of labels: allowed is task=multi_label or one label per row")
    if number := cells.count(""):
        others = f", one of {number}," if number > 1 else ""
        raise ConfigError(f"{at}: row {cells.index('')}{others} has no label; expected is one in every row")
    return cells


def _count_given(given: Sequence[str], counted: Sequence[tuple[str, int]], at: str) -> list[tuple[str, int]]:
    """Return the given classes with their counts; raise an error if the data have other classes (see `class_finder`)."""
    find, counts = class_finder(given), dict.fromkeys(given, 0)
    strange = [name for name, _ in counted if find(name) < 0]
    if strange:
        there = ", ".join(name for name, _ in counted[:_CLASSES_SHOWN])
        raise ConfigError(
            f"{at}: {shorten(', '.join(strange[:_CLASSES_SHOWN]))} not among task.labels=[{shorten(','.join(given))}]\n"
            f"the column holds {shorten(there)}"
        )
    for name, number in counted:
        counts[given[find(name)]] += number
    return list(counts.items())


def _describe_values(task: TaskConfig, table: pa.Table, where: str) -> str:
    """Return the line about the values of a regression; refuse a column with only one value."""
    name = label_column(task) or LABEL
    at = f"{where}: column {name}"
    found = values(table.column(name), table.schema, name, at)
    if found.min() == found.max():
        raise ConfigError(f"{at}: only the value {found[0]:g} in {len(found):,} rows; expected are at least two values")
    return f"values     {found.min():g} to {found.max():g}, mean {found.mean():.4g}"


def _settle_answers(task: TaskConfig, table: pa.Table) -> list[str]:
    """Use the scores of SQuAD v2.0 if some questions have no answer, and tell so."""
    answers: list[Any] = table.column(label_column(task) or "").to_pylist()
    none = [not (answer["text"] if isinstance(answer, dict) and "text" in answer else answer) for answer in answers]
    if any(none) and not task.unanswerable:
        task.unanswerable, task.metrics = True, list(UNANSWERABLE_METRICS)
    return [f"answers    {sum(none):,} questions have none: scores as for SQuAD v2.0"] if any(none) else []


def _check_weights(task: TaskConfig) -> None:
    values = task.benchmark != BENCHMARK and not task.labels
    if task.class_weights != "none" and (task.kind != "classification" or values):
        raise wrong_value(
            "task.class_weights", task.class_weights, f"none for task={task.name}, which has no single class per row"
        )
