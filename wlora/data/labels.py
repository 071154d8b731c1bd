"""Reading of label columns: class numbers, class names, truth values, lists of classes, tags of tokens, and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wlora.errors import ConfigError
from wlora.reading import read_json

if TYPE_CHECKING:
    import pyarrow as pa

MOST_LABELS = 1000
"""Maximum number of classes that are found in a column. More are probably identifiers or texts."""
DELIMITERS = "|;,"
"""Characters that may separate the classes of a row in a text column, in the order in which they are tried."""
_SHOWN = 40
_LIST_SHOWN = 80


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Decode a dictionary-encoded column, which pandas writes for categories."""
    import pyarrow as pa

    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def is_text(kind: pa.DataType) -> bool:
    """Tell whether a column type holds strings."""
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def refuse_nulls(column: pa.ChunkedArray, at: str) -> None:
    """Raise an error for a column with missing values.

    Raises:
        ConfigError: names the first row, and the number of rows if there are several.
    """
    if column.null_count == len(column) > 1:
        raise ConfigError(f"{at}: all {len(column)} rows are empty (null); expected is a value in every row")
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        more = f", one of {column.null_count}," if column.null_count > 1 else ""
        raise ConfigError(f"{at}: row {row}{more} is empty (null); expected is a value in every row")


def stored_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Return the class names that the datasets library stores in the schema of its files; None if there are none.

    For a column of lists these are the classes of the elements.
    """
    try:
        feature: Any = read_json((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        while isinstance(feature, list) or "feature" in feature:
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        return [str(name) for name in feature["names"]]
    except (KeyError, TypeError, ValueError, IndexError):
        return None


def name_cells(column: pa.ChunkedArray, names: Sequence[str] | None, at: str) -> list[Any]:
    """Return the class name of every cell as it is in the data: a text, a list of texts, or None for null.

    Numbers and truth values become text (`7`, `true`), class numbers with stored names their name, and texts lose white
    space around them.

    Args:
        column: the label column.
        names: the class names stored with the file, for a column of class numbers.
        at: location for error messages.

    Raises:
        ConfigError: the column holds neither texts, integers, truth values nor lists of these.
    """
    from pyarrow import types

    column = plain(column)
    inner = column.type.value_type if _is_list(column.type) else column.type
    known = dict(enumerate(names or ()))
    if types.is_integer(inner) and names is not None:

        def convert(cell: Any) -> str:
            return known.get(cell, f"{cell} (no class of the file)")
    elif types.is_floating(inner):

        def convert(cell: Any) -> str:
            return str(int(cell)) if float(cell).is_integer() else str(cell)
    elif types.is_boolean(inner) or types.is_integer(inner) or is_text(inner):

        def convert(cell: Any) -> str:
            return str(cell).lower() if isinstance(cell, bool) else str(cell).strip()
    elif types.is_null(inner):
        raise ConfigError(f"{at}: all {len(column)} rows are empty (null); expected is a value in every row")
    else:
        raise ConfigError(f"{at} holds {shorten_type(column.type)}; expected are classes: texts, numbers or truth values")
    return [
        None if cell is None else [convert(part) for part in cell] if isinstance(cell, list) else convert(cell)
        for cell in column.to_pylist()
    ]


def _is_list(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def shorten_type(kind: Any) -> str:
    """Return the name of a column type, without the fields of a long structure."""
    return shorten(str(kind))


def split_cell(text: str, names: Sequence[str] | None = None) -> list[str]:
    """Return the classes of a text cell: a JSON array, or classes separated by one of `DELIMITERS`.

    Args:
        text: the cell.
        names: the known classes. A delimiter counts only if all its parts are known; None takes the first that occurs.
    """
    text = text.strip()
    if text.startswith("["):
        try:
            return [str(part) for part in read_json(text)]
        except (ValueError, TypeError):
            pass
    if not text or (names is not None and text in names):
        return [text] if text else []
    for delimiter in DELIMITERS:
        parts = [part.strip() for part in text.split(delimiter) if part.strip()]
        if delimiter in text and (names is None or set(parts) <= set(names)):
            return parts
    return [text]


_INDICATORS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def are_indicators(column: pa.ChunkedArray) -> bool:
    """Tell whether a column holds nothing but 0 and 1, as numbers, texts or truth values."""
    return all(str(cell).strip().lower() in _INDICATORS for cell in plain(column).unique().to_pylist())


def merge_indicators(columns: Mapping[str, pa.ChunkedArray], where: str) -> pa.Array:
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


def count_labels(cells: Sequence[Any], at: str) -> list[tuple[str, int]]:
    """Return the classes of a column and how often each occurs: numbers by size, `false` before `true`, names by letter.

    Args:
        cells: one text or one list of texts per row; no nulls.
        at: location for error messages.

    Raises:
        ConfigError: there is only one class, or there are more than `MOST_LABELS`.
    """
    found = Counter(name for cell in cells for name in (cell if isinstance(cell, list) else [cell]))
    if len(found) > MOST_LABELS:
        raise ConfigError(
            f"{at}: {len(found):,} different labels in {len(cells):,} rows; allowed are at most {MOST_LABELS:,}\n"
            "way out: task.label=COLUMN with the classes, or task=text_regression for values"
        )
    if len(found) < 2:
        only = f"only the label {quote(next(iter(found)))}" if found else "no label"
        raise ConfigError(f"{at}: {only} in {len(cells):,} rows; expected are at least two classes")
    return sorted(found.items(), key=lambda item: _rank(item[0]))


def order_names(names: Sequence[str], counted: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return counted classes in the order of stored class names, with those that do not occur."""
    counts = dict(counted)
    return [(name, counts.get(name, 0)) for name in names] if counts.keys() <= set(names) else list(counted)


def _rank(name: str) -> tuple[int, float, str]:
    return (0, int(name), name) if _is_integer(name) else (1, 0, name)


def _is_integer(text: str) -> bool:
    return text.lstrip("+-").isdecimal() and len(text) < 19


def class_numbers(column: pa.ChunkedArray, schema: pa.Schema, names: Sequence[str], label: str, at: str) -> np.ndarray:
    """Return class indices of shape [rows], int64, from class names, truth values, integers, or integers as text.

    Integers are indices, unless the classes themselves are integers. Names are compared exactly, and if there is no exact
    match, without regard to case.

    Args:
        column: the label column.
        schema: schema of the file, which may hold class names.
        names: the classes of the task, in order.
        label: the name of the column.
        at: location for error messages.

    Raises:
        ConfigError: a cell is empty or is not a class of the task.
    """
    import pyarrow as pa

    column = plain(column)
    refuse_nulls(column, at)
    allowed = f"allowed is 0..{len(names) - 1} ({shorten(', '.join(names))})"
    stored = stored_names(schema, label)
    by_name = all(_is_integer(name) for name in names)
    truth = pa.types.is_boolean(column.type) and {name.lower() for name in names} >= {"true", "false"}
    number = pa.types.is_integer(column.type) or (by_name and pa.types.is_floating(column.type))
    if not (is_text(column.type) or number or truth):
        raise ConfigError(f"{at} holds {shorten_type(column.type)}\n{allowed}, as numbers or names")
    if is_text(column.type) or truth or by_name or stored is not None:
        texts = column if is_text(column.type) else pa.chunked_array([pa.array(name_cells(column, stored, at), pa.string())])
        return _require_classes(_parse_classes(texts, names), texts, names, at)
    return _require_classes(column.to_numpy().astype(np.int64), column, names, at)


def _require_classes(numbers: np.ndarray, cells: pa.ChunkedArray, names: Sequence[str], at: str) -> np.ndarray:
    wrong = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
    if len(wrong):
        row = int(wrong[0])
        hint = ", as hidden test labels do" if str(cells[row]).split()[:1] == ["-1"] else ""
        text = is_text(cells.type)
        there = f"; the column holds {shorten(', '.join(sorted(cells.unique().to_pylist())))}" if text else ""
        raise ConfigError(
            f"{at}: row {row} has {quote(cells[row].as_py())}{hint}{there}\n"
            f"allowed is 0..{len(names) - 1} ({shorten(', '.join(names))})"
        )
    return numbers


def _parse_classes(labels: pa.ChunkedArray, names: Sequence[str]) -> np.ndarray:
    """Return class indices of shape [rows], int64. Names are compared case-insensitively; -1 marks unknown values."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def fold(texts: Any) -> Any:
        return pc.utf8_lower(pc.utf8_trim_whitespace(texts))

    texts, known = labels.cast(pa.string()), pa.array(names, pa.string())
    numbers = pa.array([str(number) for number in range(len(names))])
    # Exact matches first: two classes may differ only in case.
    found = pc.coalesce(pc.index_in(texts, value_set=known), pc.index_in(pc.utf8_trim_whitespace(texts), value_set=known))
    for values in (fold(known), numbers):
        found = pc.coalesce(found, pc.index_in(fold(texts), value_set=values))
    return np.asarray(found.fill_null(-1).to_numpy(), dtype=np.int64)


def class_lists(
    column: pa.ChunkedArray, schema: pa.Schema, names: Sequence[str], label: str, at: str, *, tags: bool
) -> list[list[int]]:
    """Return the class indices of every row: those of its tokens (`tags`), or the set of its classes in order.

    Args:
        column: lists of classes, or texts: tags separated by white space, or classes as for `split_cell`.
        schema: schema of the file, which may hold class names.
        names: the classes of the task, in order. Integers without stored names are indices, unless the classes are integers.
        label: the name of the column.
        at: location for error messages.
        tags: whether the classes belong to tokens, so that order and repetition count.

    Raises:
        ConfigError: a cell is empty (`tags`), or holds a class that the task does not have.
    """
    if tags:
        refuse_nulls(column, at)
    stored = stored_names(schema, label)
    index = {name: number for number, name in enumerate(names)}
    for number, name in enumerate(names):
        index.setdefault(name.lower(), number)
    if stored is None and not all(_is_integer(name) for name in names):
        index |= {str(number): number for number in range(len(names)) if str(number) not in index}
    rows = []
    for row, cell in enumerate(name_cells(column, stored, at)):
        parts = _parts(cell, names, tags=tags)
        numbers = [index.get(part, index.get(part.lower(), -1)) for part in parts]
        if -1 in numbers:
            wrong = parts[numbers.index(-1)]
            raise ConfigError(f"{at}: row {row} has {quote(wrong)}\nallowed are {shorten(', '.join(names))}")
        rows.append(numbers if tags else sorted(set(numbers)))
    return rows


def _parts(cell: Any, names: Sequence[str] | None, *, tags: bool) -> list[str]:
    if cell is None:
        return []
    if isinstance(cell, list):
        return [str(part) for part in cell]
    return cell.split() if tags else split_cell(cell, names)


def split_cells(cells: Sequence[Any], *, tags: bool) -> list[list[str]]:
    """Return the classes of every row as `class_lists` reads them, before the classes of the task are known."""
    return [_parts(cell, None, tags=tags) for cell in cells]


def values(column: pa.ChunkedArray, schema: pa.Schema, label: str, at: str) -> np.ndarray:
    """Return finite values of shape [rows], float64, from integers, floats, or numbers as text.

    Raises:
        ConfigError: a cell is empty or is not a finite number.
    """
    from pyarrow import types

    column = plain(column)
    refuse_nulls(column, at)
    stored = stored_names(schema, label)
    if stored is not None and types.is_integer(column.type):
        numbers = np.array([_parse_float(name) for name in name_cells(column, stored, at)])
    elif is_text(column.type):
        numbers = np.array([_parse_float(text) for text in column.to_pylist()])
    elif types.is_integer(column.type) or types.is_floating(column.type):
        numbers = column.to_numpy().astype(np.float64)
    else:
        raise ConfigError(f"{at} holds {shorten_type(column.type)}; allowed are finite numbers")
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if len(wrong):
        row = int(wrong[0])
        raise ConfigError(f"{at}: row {row} has {quote(column[row].as_py())}; allowed are finite numbers")
    return numbers


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def quote(value: Any) -> str:
    """Return a cell for messages, at most 40 characters."""
    return repr(value)[:_SHOWN]


def shorten_class(name: str) -> str:
    """Return a class name for messages and tables of the console: one line of at most 40 characters."""
    line = " ".join(name.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


def shorten(text: str) -> str:
    """Return a list for messages, at most 80 characters."""
    return text if len(text) <= _LIST_SHOWN else text[:_LIST_SHOWN] + "…"
