"""Checks of loaded rows by column: all columns exist, texts are strings, and labels are in range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from wlora.data.labels import (
    class_lists,
    class_numbers,
    is_text,
    plain,
    quote,
    refuse_nulls,
    shorten_type,
    values,
)
from wlora.data.local_files import read_lists
from wlora.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

    from wlora.config.schema import TaskConfig

LABEL = "label"
ANSWERS = "answers"
MOST_BYTES = 1 << 20
"""Maximum bytes of a text. A longer text is probably a whole file by mistake, and tokenising it would take minutes."""
_LISTED = ("token_classification", "multi_label")
_INDICATORS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def label_column(task: TaskConfig) -> str | None:
    """Return the name of the column with the labels or answers; None for summaries, whose target is a text column.

    For `task.label=[NAME,NAME]` it is the column of lists that `merge_label_columns` adds.
    """
    standard = {"summarization": None, "question_answering": ANSWERS}.get(task.kind, LABEL)
    return standard and (standard if isinstance(task.label, list) else task.label or standard)


def needed_columns(task: TaskConfig) -> list[str]:
    """Return the columns that a task uses."""
    label = task.label if isinstance(task.label, list) else [label_column(task)]
    return [*task.columns, *(name for name in label if name)]


def are_indicators(column: pa.ChunkedArray) -> bool:
    """Tell whether a column holds nothing but 0 and 1, as numbers, texts or truth values."""
    return all(str(cell).strip().lower() in _INDICATORS for cell in plain(column).unique().to_pylist())


def _merge_indicators(columns: Mapping[str, pa.ChunkedArray], where: str) -> pa.Array:
    """Return the names of the columns that hold 1 in each row, as lists of strings, shape [rows].

    Args:
        columns: one column per class.
        where: the source of the rows, for error messages.

    Raises:
        ConfigError: a cell is neither 0 nor 1.
    """
    import pyarrow as pa

    flags = []
    for name, column in columns.items():
        cells = plain(column).to_pylist()
        found = [_INDICATORS.get(str(cell).strip().lower()) for cell in cells]
        if None in found:
            row = found.index(None)
            raise ConfigError(f"{where}: column {name}: row {row} has {quote(cells[row])}; allowed are 0 and 1")
        flags.append(found)
    rows = [[name for name, flag in zip(columns, row, strict=True) if flag] for row in zip(*flags, strict=True)]
    return pa.array(rows, pa.list_(pa.string()))


def merge_label_columns(table: pa.Table, task: TaskConfig, where: str) -> pa.Table:
    """Return a table whose column `label` lists the classes of each row, from one column of 0 and 1 per class.

    A table of which `task.label` names one column, or none, is returned as it is.

    Raises:
        ConfigError: a column is missing, or a cell is neither 0 nor 1.
    """
    if not isinstance(task.label, list):
        return table
    cells = _merge_indicators({name: _require(table, name, where) for name in task.label}, where)
    kept = table.select([name for name in table.column_names if name not in (*task.label, LABEL)])
    return kept.replace_schema_metadata(None).append_column(LABEL, cells)


def check_rows(table: pa.Table, task: TaskConfig, where: str) -> pa.Table:
    """Return the needed columns in canonical types.

    Texts become strings, and tokens lists of strings. The labels are in the column `label`: int64 class indices, float64
    values, or lists of class indices. Answers are in the column `answers`, in the format of SQuAD.

    Args:
        table: the loaded rows.
        task: defines the text columns and the classes.
        where: the key with its value and the file or split, for error messages.

    Raises:
        ConfigError: there are no rows, a column is missing, or a cell is invalid.
    """
    import pyarrow as pa

    columns = _text_columns(table, task.columns, task, where)
    table, label = merge_label_columns(table, task, where), label_column(task)
    if label is None:
        return pa.table(columns)
    if label in task.columns:
        raise ConfigError(f"{where}: column {label} cannot be both a text and the label: see task.text and task.label")
    cells, at = _require(table, label, where), f"{where}: column {label}"
    if task.kind == "question_answering":
        answers = _locate(cells, columns[task.columns[1]], at) if is_text(plain(cells).type) else cells
        return pa.table({**columns, ANSWERS: _check_answers(answers, columns[task.columns[1]], at, task=task)})
    if task.kind in _LISTED:
        tags = task.kind == "token_classification"
        rows = class_lists(cells, table.schema, task.labels, label, at, tags=tags)
        if tags:
            _check_lengths(columns[task.columns[0]], rows, at)
        return pa.table({**columns, LABEL: pa.array(rows, pa.list_(pa.int64()))})
    if task.labels:
        numbers = class_numbers(cells, table.schema, task.labels, label, at)
    else:
        numbers = values(cells, table.schema, label, at)
    return pa.table({**columns, LABEL: pa.chunked_array([pa.array(numbers)])})


def check_inputs(table: pa.Table, task: TaskConfig, where: str) -> pa.Table:
    """Return the text columns of rows without labels, in the types of `check_rows`, for predictions.

    Raises:
        ConfigError: as `check_rows`.
    """
    import pyarrow as pa

    return pa.table(_text_columns(table, input_columns(task), task, where))


def input_columns(task: TaskConfig) -> list[str]:
    """Return the columns that a prediction needs: those of a row without labels."""
    return task.columns[:1] if task.kind == "summarization" else list(task.columns)


def count_empty(table: pa.Table, task: TaskConfig) -> dict[str, int]:
    """Return the number of texts in each column that are empty or white space. Columns without such texts are left out."""
    import pyarrow.compute as pc

    found: dict[str, int] = {}
    for name in task.columns:
        if name in table.column_names and is_text(table.column(name).type):
            number = pc.sum(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(table.column(name))), 0)).as_py()
            found |= {name: number} if number else {}
    return found


def _require(table: pa.Table, name: str, where: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise ConfigError(f"{where}: no column {name}\nthere is: {', '.join(table.column_names)}")
    return table.column(name)


def _text_columns(table: pa.Table, names: Sequence[str], task: TaskConfig, where: str) -> dict[str, pa.ChunkedArray]:
    found = {name: _require(table, name, where) for name in names}
    if table.num_rows == 0:
        raise ConfigError(f"{where}: there are no rows")
    check = _check_tokens if task.kind == "token_classification" else _check_text
    return {name: check(column, f"{where}: column {name}") for name, column in found.items()}


def _check_text(column: pa.ChunkedArray, at: str) -> pa.ChunkedArray:
    """Return texts as strings. A missing text (null) becomes an empty one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = plain(column)
    if column.null_count == len(column):
        refuse_nulls(column, at)
    if not is_text(column.type):
        raise ConfigError(f"{at} holds {shorten_type(column.type)}; expected is text in every row")
    column = column.fill_null("")
    if not pc.any(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)).as_py():
        raise ConfigError(f"{at}: the texts of all {len(column)} rows are empty; expected are texts")
    sizes = pc.binary_length(column)
    if (longest := pc.max(sizes).as_py() or 0) > MOST_BYTES:
        row = pc.index(sizes, longest).as_py()
        raise ConfigError(f"{at}: row {row} has {longest:,} bytes; allowed is a text of at most {MOST_BYTES:,}")
    return column.cast(pa.string())


def _check_tokens(column: pa.ChunkedArray, at: str) -> pa.ChunkedArray:
    """Return lists of strings, from lists, or from texts: lists (`read_lists`), or tokens separated by white space."""
    import pyarrow as pa

    column = plain(column)
    refuse_nulls(column, at)
    if is_text(column.type):
        column = pa.chunked_array([pa.array(_split_tokens(column.to_pylist(), at), pa.list_(pa.string()))])
    try:
        column = column.cast(pa.list_(pa.string())) if is_text(column.type.value_type) else None
    except (AttributeError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        column = None
    if column is None:
        raise ConfigError(f"{at}: expected are lists of texts, or texts with tokens separated by spaces")
    for row, tokens in enumerate(column.to_pylist()):
        if not tokens or None in tokens:
            raise ConfigError(f"{at}: row {row} has {'an empty (null) token' if tokens else 'no tokens'}")
    return column


def _split_tokens(texts: Sequence[str], at: str) -> list[list[str | None]]:
    rows = [cell if isinstance(cell, list) else cell.split() for cell in read_lists(texts, at, words=True)]
    for row, tokens in enumerate(rows):
        wrong = [token for token in tokens if not isinstance(token, str | None)]
        if wrong:
            raise ConfigError(f"{at}: row {row} has the token {quote(wrong[0])} in its list; expected are texts in quotes")
    return rows


def _check_lengths(tokens: pa.ChunkedArray, tags: Sequence[Sequence[int]], at: str) -> None:
    for row, (length, own) in enumerate(zip(_lengths(tokens), tags, strict=True)):
        if length != len(own):
            raise ConfigError(f"{at}: row {row} has {len(own)} labels for {length} tokens; expected is one for each")


def _lengths(column: pa.ChunkedArray) -> list[int]:
    import pyarrow.compute as pc

    return list(pc.list_value_length(column).to_pylist())


def _locate(column: pa.ChunkedArray, contexts: pa.ChunkedArray, at: str) -> pa.ChunkedArray:
    """Convert answers given as texts to SQuAD's format, at their first position in the context. "" means no answer."""
    import pyarrow as pa

    found = []
    for row, (answer, context) in enumerate(zip(plain(column).to_pylist(), contexts.to_pylist(), strict=True)):
        text = (answer or "").strip()
        start = context.find(text)
        if start < 0:
            raise ConfigError(f"{at}: row {row} has the answer {quote(text)}, which is not in its context")
        found.append({"text": [text] if text else [], "answer_start": [start] if text else []})
    return pa.chunked_array([pa.array(found)])


def _check_answers(column: pa.ChunkedArray, contexts: pa.ChunkedArray, at: str, *, task: TaskConfig) -> pa.ChunkedArray:
    """Return answers as `{text: [strings], answer_start: [int64]}`, after checking that each occurs in its context.

    Args:
        column: the answers.
        contexts: the texts that contain the answers.
        at: location for error messages.
        task: tells whether every row must have an answer.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    refuse_nulls(column, at)
    try:
        # Field by field, because older versions of pyarrow (20, for example) cast no struct with another order.
        kinds = {"text": pa.list_(pa.string()), "answer_start": pa.list_(pa.int64())}
        parts = [pc.struct_field(column, name).cast(kind).combine_chunks() for name, kind in kinds.items()]
        column = pa.chunked_array([pa.StructArray.from_arrays(parts, names=list(kinds))])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, ValueError) as error:
        raise ConfigError(
            f"{at} holds {shorten_type(column.type)}; expected is {{text: [strings], answer_start: [integers]}} in every "
            "row, which parquet, json and jsonl can hold"
        ) from error
    for row, (answers, context) in enumerate(zip(column.to_pylist(), contexts.to_pylist(), strict=True)):
        fault = _find_fault(answers["text"], answers["answer_start"], context)
        if fault is None and not task.unanswerable and not answers["text"]:
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
            return f"has the answer {quote(text)} at {start}, where the context has {quote(there)}"
    return None
