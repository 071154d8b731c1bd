"""Reading of label columns: class numbers, class names, truth values, lists of classes, tags of tokens, and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from wlora.data.local_files import read_lists
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
    """Raise an error for a column with missing values: null or, in a column of numbers, NaN.

    Raises:
        ConfigError: names the first row, and the number of rows if there are several.
    """
    empty = np.flatnonzero(column.is_null(nan_is_null=True).to_numpy())
    if len(empty) == len(column) > 1:
        raise ConfigError(f"{at}: all {len(column)} rows are empty (null); expected is a value in every row")
    if len(empty):
        more = f", one of {len(empty)}," if len(empty) > 1 else ""
        raise ConfigError(f"{at}: row {empty[0]}{more} is empty (null); expected is a value in every row")


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
    space around them. NaN counts as null.

    Args:
        column: the label column.
        names: the class names stored with the file, for a column of class numbers.
        at: location for error messages.

    Raises:
        ConfigError: the column holds neither texts, numbers, truth values nor lists of these.
    """
    from pyarrow import types

    column = plain(column)
    inner = column.type.value_type if _is_list(column.type) else column.type
    known = dict(enumerate(names or ()))
    if types.is_null(inner):
        raise ConfigError(f"{at}: all {len(column)} rows are empty (null); expected is a value in every row")
    if not (types.is_floating(inner) or types.is_boolean(inner) or types.is_integer(inner) or is_text(inner)):
        raise ConfigError(f"{at} holds {shorten_type(column.type)}; expected are classes: texts, numbers or truth values")

    def convert(cell: Any) -> Any:
        if isinstance(cell, list):
            return [convert(part) for part in cell]
        if cell is None or cell != cell:
            return None
        numbered = names is not None and types.is_integer(inner)
        return known.get(cell, f"{cell} (no class of the file)") if numbered else _name_of(cell)

    return [convert(cell) for cell in column.to_pylist()]


def _name_of(cell: Any) -> str:
    """Return a cell as text: `7` also for 7.0, `true` and `false`, and texts without white space around them."""
    if isinstance(cell, float | np.floating):
        return str(int(cell)) if float(cell).is_integer() else str(cell)
    return str(cell).lower() if isinstance(cell, bool) else str(cell).strip()


def _is_list(kind: pa.DataType) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def shorten_type(kind: Any) -> str:
    """Return the name of a column type, without the fields of a long structure."""
    return shorten(str(kind))


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


def _number(text: str) -> Decimal | None:
    """Return the finite number that a text is; None for any other text."""
    try:
        number = Decimal(text)
    except ArithmeticError:
        return None
    return number if number.is_finite() and "_" not in text else None


def class_finder(names: Sequence[str], *, indices: bool = True) -> Callable[[str], int]:
    """Return a function that gives the index of the class of a cell; -1 if there is none.

    Names are compared exactly, then without regard to case and to white space around them. A class that is a number has
    any text of the same value (`1.0` is `1`). An integer is an index only if no class is a number, because `1` would
    otherwise be two classes.

    Args:
        names: the classes, in order.
        indices: whether integers may be indices.
    """
    exact = {name: index for index, name in enumerate(names)}
    folded = {name.strip().lower(): index for index, name in reversed(list(enumerate(names)))}
    numbers = [_number(name) for name in names]
    once = {number for number, count in Counter(numbers).items() if count == 1}
    by_value: dict[Decimal | None, int] = {
        number: index for index, number in enumerate(numbers) if number is not None and number in once
    }
    by_index = {str(index): index for index in range(len(names))} if indices and not any_number(names) else {}

    def find(text: str) -> int:
        stripped = text.strip()
        found = exact.get(text, exact.get(stripped, folded.get(stripped.lower(), by_index.get(stripped))))
        return by_value.get(_number(stripped), -1) if found is None else found

    return find


def any_number(names: Sequence[str]) -> bool:
    """Tell whether a class is a number, so that integers in the data are classes and not indices."""
    return any(_number(name) is not None for name in names)


def class_numbers(column: pa.ChunkedArray, schema: pa.Schema, names: Sequence[str], label: str, at: str) -> np.ndarray:
    """Return class indices of shape [rows], int64, from class names, truth values, integers, or integers as text.

    Names and integers are compared as by `class_finder`.

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
    stored = stored_names(schema, label)
    numbers = [_number(name) for name in names]
    whole = all(number is not None and number == number.to_integral_value() for number in numbers)
    truth = pa.types.is_boolean(column.type) and {name.lower() for name in names} >= {"true", "false"}
    number = pa.types.is_integer(column.type) or (whole and pa.types.is_floating(column.type))
    if not (is_text(column.type) or number or truth):
        raise ConfigError(f"{at} holds {shorten_type(column.type)}\n{_allowed(names)}, as numbers or names")
    if is_text(column.type) or truth or any_number(names) or stored is not None:
        texts = column if is_text(column.type) else pa.chunked_array([pa.array(name_cells(column, stored, at), pa.string())])
        return _require_classes(_parse_classes(texts, names), texts, names, at)
    return _require_classes(column.to_numpy().astype(np.int64), column, names, at)


def _allowed(names: Sequence[str]) -> str:
    listed = shorten(", ".join(names))
    return f"allowed are {listed}" if any_number(names) else f"allowed is 0..{len(names) - 1} ({listed})"


def _require_classes(numbers: np.ndarray, cells: pa.ChunkedArray, names: Sequence[str], at: str) -> np.ndarray:
    wrong = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
    if len(wrong):
        row = int(wrong[0])
        hint = ", as hidden test labels do" if str(cells[row]).split()[:1] == ["-1"] else ""
        text = is_text(cells.type)
        there = f"; the column holds {shorten(', '.join(sorted(cells.unique().to_pylist())))}" if text else ""
        raise ConfigError(f"{at}: row {row} has {quote(cells[row].as_py())}{hint}{there}\n{_allowed(names)}")
    return numbers


def _parse_classes(labels: pa.ChunkedArray, names: Sequence[str]) -> np.ndarray:
    """Return class indices of shape [rows], int64, as by `class_finder`; -1 marks unknown values."""
    import pyarrow.compute as pc

    there, find = labels.unique(), class_finder(names)
    found = np.array([find(text) for text in there.to_pylist()], dtype=np.int64)
    numbers: np.ndarray = found[pc.index_in(labels, value_set=there).to_numpy()]
    return numbers


def class_lists(
    column: pa.ChunkedArray, schema: pa.Schema, names: Sequence[str], label: str, at: str, *, tags: bool
) -> list[list[int]]:
    """Return the class indices of every row: those of its tokens (`tags`), or the set of its classes in order.

    Args:
        column: as for `class_parts`.
        schema: schema of the file, which may hold class names.
        names: the classes of the task, in order. Integers without stored names may be indices (`class_finder`).
        label: the name of the column.
        at: location for error messages.
        tags: whether the classes belong to tokens, so that order and repetition count.

    Raises:
        ConfigError: a cell is empty (`tags`), or holds a class that the task does not have.
    """
    if tags:
        refuse_nulls(column, at)
    stored = stored_names(schema, label)
    find = class_finder(names, indices=stored is None)
    rows = []
    for row, parts in enumerate(class_parts(column, stored, at, tags=tags, find=find)):
        numbers = [find(part) for part in parts]
        if -1 in numbers:
            wrong = parts[numbers.index(-1)]
            raise ConfigError(f"{at}: row {row} has {quote(wrong)}\nallowed are {shorten(', '.join(names))}")
        rows.append(numbers if tags else sorted(set(numbers)))
    return rows


def class_parts(
    column: pa.ChunkedArray, stored: Sequence[str] | None, at: str, *, tags: bool, find: Callable[[str], int] | None
) -> list[list[str]]:
    """Return the class names of every row as they are in the data: those of its tokens (`tags`), or of the row.

    Args:
        column: lists of classes, or texts: lists (`read_lists`), tags separated by white space, or classes separated by one
            of `DELIMITERS`, the same in all rows.
        stored: the class names stored with the file.
        at: location for error messages.
        tags: whether the classes belong to tokens.
        find: gives the index of a class; None if the classes are not known yet.

    Raises:
        ConfigError: an element of a list is empty, or the column holds other values.
    """
    cells = read_lists(name_cells(column, stored, at), at, words=tags)
    delimiter = None if tags else _choose_delimiter({cell for cell in cells if isinstance(cell, str)}, find)
    rows = []
    for row, cell in enumerate(cells):
        if isinstance(cell, list):
            parts = ["" if part is None or part != part else _name_of(part) for part in cell]
            if "" in parts:
                raise ConfigError(f"{at}: row {row} has an empty (null) label in its list; expected are classes")
            rows.append(parts)
        else:
            rows.append((cell or "").split() if tags else _split(cell or "", delimiter, find))
    return rows


def _choose_delimiter(texts: set[str], find: Callable[[str], int] | None) -> str | None:
    """Return the delimiter of a column: the first by which all classes are known, otherwise the first that occurs."""
    there = [delimiter for delimiter in DELIMITERS if any(delimiter in text for text in texts)]
    if find is not None:
        for delimiter in (None, *there):
            if all(find(part) >= 0 for text in texts for part in _split(text, delimiter, find)):
                return delimiter
    return next(iter(there), None)


def _split(text: str, delimiter: str | None, find: Callable[[str], int] | None) -> list[str]:
    if delimiter is None or (find is not None and find(text) >= 0):
        return [text] if text else []
    return [part.strip() for part in text.split(delimiter) if part.strip()]


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
