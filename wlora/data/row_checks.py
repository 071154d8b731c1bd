"""Checks of loaded rows by column: all columns exist, texts are strings, and labels are in range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wlora.errors import ConfigError
from wlora.reading import read_json

if TYPE_CHECKING:
    import pyarrow as pa

    from wlora.config.schema import TaskConfig

LABEL = "label"
ANSWERS = "answers"
MOST_BYTES = 1 << 20
"""Maximum bytes of a text. A longer text is probably a whole file by mistake, and tokenising it would take minutes."""
_SHOWN = 40
_LIST_SHOWN = 80


def needed_columns(task: TaskConfig) -> list[str] | None:
    """Return the columns that a task uses; None for all."""
    further = {"classification": [LABEL], "question_answering": [ANSWERS], "summarization": []}
    return [*task.columns, *further[task.kind]] if task.kind in further else None


def check_rows(table: pa.Table, task: TaskConfig, where: str) -> pa.Table:
    """Return the needed columns in canonical types.

    Texts become strings. Labels become int64 class indices or float64 values. Answers get the format of SQuAD.

    Args:
        table: the loaded rows.
        task: defines the text columns and the classes.
        where: the key with its value and the file or split, for error messages.

    Raises:
        ConfigError: there are no rows, a column is missing, or a cell is invalid.
    """
    import pyarrow as pa

    kept = needed_columns(task) or table.column_names
    missing = [name for name in [*task.columns, *kept] if name not in table.column_names]
    if missing:
        raise ConfigError(f"{where}: no column {missing[0]}\nthere is: {', '.join(table.column_names)}")
    if table.num_rows == 0:
        raise ConfigError(f"{where}: there are no rows")
    columns = {name: table.column(name) for name in kept}
    for name in task.columns:
        columns[name] = _check_text(columns[name], f"{where}: column {name}")
    if task.kind == "classification":
        at = f"{where}: column {LABEL}"
        labels = _plain(columns[LABEL])
        _refuse_nulls(labels, at)
        labels = _name_classes(labels, table.schema)
        is_regression = not task.labels
        numbers = _values(labels, at) if is_regression else _classes(labels, task.labels, at)
        columns[LABEL] = pa.chunked_array([pa.array(numbers)])
    elif task.kind == "question_answering":
        at = f"{where}: column {ANSWERS}"
        columns[ANSWERS] = _check_answers(columns[ANSWERS], columns[task.columns[1]], at, required=not task.unanswerable)
    return pa.table(columns)


def _check_text(column: pa.ChunkedArray, at: str) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = _plain(column)
    _refuse_nulls(column, at)
    if not _is_text(column):
        raise ConfigError(f"{at} holds {column.type}; expected is text in every row")
    sizes = pc.binary_length(column)
    if (longest := pc.max(sizes).as_py() or 0) > MOST_BYTES:
        row = pc.index(sizes, longest).as_py()
        raise ConfigError(f"{at}: row {row} has {longest:,} bytes; allowed is a text of at most {MOST_BYTES:,}")
    return column.cast(pa.string())


def _check_answers(column: pa.ChunkedArray, contexts: pa.ChunkedArray, at: str, *, required: bool) -> pa.ChunkedArray:
    """Return answers as `{text: [strings], answer_start: [int64]}`, after checking that each occurs in its context.

    Args:
        column: the answers.
        contexts: the texts that contain the answers.
        at: location for error messages.
        required: whether every row must have an answer.
    """
    import pyarrow as pa

    _refuse_nulls(column, at)
    try:
        column = column.cast(pa.struct({"text": pa.list_(pa.string()), "answer_start": pa.list_(pa.int64())}))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, ValueError) as error:
        raise ConfigError(
            f"{at} holds {_shorten(str(column.type))}; expected is {{text: [strings], answer_start: [integers]}} in every "
            "row, which parquet, json and jsonl can hold"
        ) from error
    for row, (answers, context) in enumerate(zip(column.to_pylist(), contexts.to_pylist(), strict=True)):
        fault = _find_fault(answers["text"], answers["answer_start"], context)
        if fault is None and required and not answers["text"]:
            fault = "has no answer; allowed where task.unanswerable=true, as in SQuAD v2"
        if fault is not None:
            raise ConfigError(f"{at}: row {row} {fault}")
    return column


def _find_fault(texts: list[str] | None, starts: list[int] | None, context: str) -> str | None:
    """Return a description of the first error in the answers of one row; None if they are valid."""
    if not context.strip():
        return "has an empty context; expected is the text that contains the answers"
    if texts is None or starts is None or None in texts or None in starts:
        return "is empty (null); expected are text and answer_start, both [] where there is no answer"
    if len(texts) != len(starts):
        return f"has {len(texts)} texts and {len(starts)} values of answer_start; expected is one for each"
    for text, start in zip(texts, starts, strict=True):
        there = context[max(start, 0) : max(start, 0) + len(text)]
        if not text.strip():
            return "has an answer without text"
        if not 0 <= start < len(context):
            return f"has answer_start {start}; allowed is 0 to {len(context) - 1}, the characters of its context"
        if there != text:
            return f"has the answer {_quote(text)} at {start}, where the context has {_quote(there)}"
    return None


def _name_classes(labels: pa.ChunkedArray, schema: pa.Schema) -> pa.ChunkedArray:
    """Replace class indices by names if the file's schema contains class names.

    The order and spelling of classes in the file may differ from those of the task or of other files.
    """
    import pyarrow as pa

    names = _stored_names(schema)
    if names is None or not pa.types.is_integer(labels.type):
        return labels
    known = dict(enumerate(names))
    return pa.chunked_array([[known.get(number, f"{number} (no class of the file)") for number in labels.to_pylist()]])


def _classes(labels: pa.ChunkedArray, names: Sequence[str], at: str) -> np.ndarray:
    """Return class indices of shape [rows], int64, from integers, class names, or integers as text."""
    import pyarrow as pa

    allowed = f"allowed is 0..{len(names) - 1} ({', '.join(names)})"
    as_text = _is_text(labels)
    if not as_text and not pa.types.is_integer(labels.type):
        raise ConfigError(f"{at} holds {labels.type}\n{allowed}, as numbers or names")
    numbers = _parse_classes(labels, names) if as_text else labels.to_numpy().astype(np.int64)
    wrong = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
    if len(wrong):
        row = int(wrong[0])
        hint = ", as hidden test labels do" if str(labels[row]).split()[:1] == ["-1"] else ""
        there = f"; the column holds {_shorten(', '.join(sorted(labels.unique().to_pylist())))}" if as_text else ""
        raise ConfigError(f"{at}: row {row} has {_show(labels[row])}{hint}{there}\n{allowed}")
    return numbers


def _parse_classes(labels: pa.ChunkedArray, names: Sequence[str]) -> np.ndarray:
    """Return class indices of shape [rows], int64. Names are compared case-insensitively; -1 marks unknown values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def fold(texts: Any) -> Any:
        return pc.utf8_lower(pc.utf8_trim_whitespace(texts))

    texts, known = labels.cast(pa.string()), pa.array(names, pa.string())
    numbers = pa.array([str(number) for number in range(len(names))])
    found = pc.index_in(texts, value_set=known)  # exact matches first: two classes may differ only in case
    for values in (fold(known), numbers):
        found = pc.coalesce(found, pc.index_in(fold(texts), value_set=values))
    return np.asarray(found.fill_null(-1).to_numpy(), dtype=np.int64)


def _values(labels: pa.ChunkedArray, at: str) -> np.ndarray:
    """Return finite values of shape [rows], float64, from integers, floats, or numbers as text."""
    import pyarrow as pa

    if _is_text(labels):
        values = np.array([_parse_float(text) for text in labels.to_pylist()])
    elif pa.types.is_integer(labels.type) or pa.types.is_floating(labels.type):
        values = labels.to_numpy().astype(np.float64)
    else:
        raise ConfigError(f"{at} holds {labels.type}; allowed are finite numbers")
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        row = int(wrong[0])
        raise ConfigError(f"{at}: row {row} has {_show(labels[row])}; allowed are finite numbers")
    return values


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Decode a dictionary-encoded column, which pandas writes for categories."""
    import pyarrow as pa

    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _is_text(column: pa.ChunkedArray) -> bool:
    from pyarrow import types

    return bool(types.is_string(column.type) or types.is_large_string(column.type))


def _refuse_nulls(column: pa.ChunkedArray, at: str) -> None:
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise ConfigError(f"{at}: row {row} is empty (null); expected is a value in every row")


def _stored_names(schema: pa.Schema) -> list[str] | None:
    """Return the class names that the datasets library stores in the schema of its files; None if there are none."""
    try:
        info: Any = read_json((schema.metadata or {})[b"huggingface"])
        return [str(name) for name in info["info"]["features"][LABEL]["names"]]
    except (KeyError, TypeError, ValueError):
        return None


def _show(cell: Any) -> str:
    return _quote(cell.as_py())


def _quote(value: Any) -> str:
    return repr(value)[:_SHOWN]


def _shorten(text: str) -> str:
    return text if len(text) <= _LIST_SHOWN else text[:_LIST_SHOWN] + "…"
