"""Finding, reading and writing the local files of a task, and reading lists that are written as text in their cells.

Every error message names `task.path` and the file.
"""

from __future__ import annotations

import ast
import csv
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wlora.errors import ConfigError
from wlora.reading import read_file, read_json

if TYPE_CHECKING:
    import pyarrow as pa

    from wlora.config.schema import TaskConfig

EXTENSIONS = ("parquet", "json", "jsonl", "csv", "tsv")
VALIDATION_NAMES = ("validation", "valid", "val", "dev")
# Not the beginning of another word, as in `devices.csv`. A capital letter may mark a part, as in `testA.csv`.
_OF_A_SPLIT = re.compile(
    r"(?i:valid(ation)?|val|dev(elopment)?|test(ing)?|eval(uation)?|predict(ions?|ed)?)"
    r"[-_ ]?(?i:set|data|split)?(?![a-z]|[A-Z]{2})"
)
_CSV_DELIMITERS = ",;\t|"
_NAMES_SHOWN = 8
_LINE = 160
_CSV_BLOCK = 1 << 24
"""Block size in bytes. The CSV reader rejects rows longer than one block."""
_RECODE = "way out, for a file of Excel on Windows: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
_SPACE = re.compile(r"\s*")
_BREAK_OR_TAB = re.compile(r"\r\n|[\t\r\n]")
_LONE_RETURN = re.compile(r"\r(?!\n)")
_QUOTED_LIST = re.compile(r"""\[\s*(["'].*["'])?\s*\]""", re.DOTALL)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_CELL_SHOWN = 40


def extension(file: Path) -> str:
    """Return the type of a file, `csv` for `NAME.csv` and `NAME.CSV`."""
    return file.suffix[1:].lower()


def location(task: TaskConfig, file: Path) -> str:
    """Return the name of a task's file for messages: the key that the user has set, and the file."""
    path = Path(task.path or "").expanduser()
    if task.validation_path is not None and file == Path(task.validation_path).expanduser():
        return f"task.validation={task.validation_path}"
    return f"task.path={task.path}" if file == path else f"task.path={task.path}: {file.name}"


def _fault(at: str, text: str) -> ConfigError:
    return ConfigError(f"{at}: {text}")


def line_of(error: BaseException) -> str:
    """Return the message of an exception as one line of at most 160 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LINE else text[:_LINE] + "…"


def find_files(task: TaskConfig, split: str) -> list[Path]:
    """Return the file of a split, or its shards in order (`train-00000-of-00002.parquet`, as on the hub).

    If `task.path` is a file, it is the training split. If a folder has no file named after the training split, all its data
    files of one type are the training split, except files that are named after another split or in `task.validation`.

    Raises:
        ConfigError: the folder or file is missing, there are several files, or a shard is missing or empty.
    """
    place = Path(task.path or "").expanduser()
    if task.validation_path is not None and split in task.validation:
        found = [Path(task.validation_path).expanduser()]
    elif os.path.isfile(place) and split == "train":
        found = [place]
    elif os.path.isdir(place):
        found = _find_named(place, split) or (_find_others(place, task) if split == "train" else [])
    else:
        what = "is a file: expected is" if os.path.exists(place) else "does not exist: expected is a file, or"
        raise ConfigError(f"task.path={place} {what} a folder with {_names_of(split)}")
    if not found:
        raise ConfigError(
            f"task.path={place}: no file for the split {split}: looked for {_names_of(split)}\n"
            f"there is: {_listed(sorted(file.name for file in place.iterdir()))}"
        )
    for file in found:
        at = location(task, file)
        if extension(file) not in EXTENSIONS:
            raise _fault(at, f"a file of type {file.suffix or 'none'}; allowed is {', '.join(EXTENSIONS)}")
        if file.stat().st_size == 0:
            raise _fault(at, "the file is empty; expected are rows")
    return found


def find_validation(place: Path) -> str | None:
    """Return the name of the validation split in a folder (`VALIDATION_NAMES`); None for a file, or if there is none."""
    there = os.path.isdir(place)
    return next((name for name in VALIDATION_NAMES if there and _find_named(place, name)), None)


def _find_named(folder: Path, split: str) -> list[Path]:
    """Return the file or all shards with the name of a split; an empty list if there are none."""
    shard_name = re.compile(rf"{re.escape(split)}-(\d{{5}})-of-(\d{{5}})\.({'|'.join(EXTENSIONS)})")
    shards = sorted(file for file in folder.iterdir() if shard_name.fullmatch(file.name))
    whole = [file for extension in EXTENSIONS if os.path.isfile(file := folder / f"{split}.{extension}")]
    expected = [f"{split}-{i:05}-of-{len(shards):05}{shards[0].suffix}" for i in range(len(shards))]
    if len(whole) + bool(shards) > 1 or [file.name for file in shards] != expected:
        found = _listed([file.name for file in whole + shards])
        raise ConfigError(
            f"task.path={folder}: expected is one file, or all its shards, for the split {split}\nthere is: {found}"
        )
    return whole or shards


def data_files(folder: Path) -> list[Path]:
    """Return the files of a folder that may hold rows, in the order of their names."""
    return [file for file in sorted(folder.iterdir()) if extension(file) in EXTENSIONS and os.path.isfile(file)]


def _find_others(folder: Path, task: TaskConfig) -> list[Path]:
    """Return the data files of a folder that are not validation rows and not named after another split than `train`."""
    held = None if task.validation_path is None else Path(task.validation_path).expanduser().resolve()
    own = [file for file in data_files(folder) if not _OF_A_SPLIT.match(file.name) and file.resolve() != held]
    if len({extension(file) for file in own}) > 1:
        found = _listed([file.name for file in own])
        raise ConfigError(f"task.path={folder}: expected are files of one type, or a file train.*\nthere is: {found}")
    return own


def read_table(file: Path, columns: Sequence[str] | None, at: str) -> pa.Table:
    """Read one file into memory.

    Args:
        file: parquet, JSON, CSV (quoting as in RFC 4180) or TSV (no quoting, because GLUE's files have unbalanced quotes).
            JSON may be a sequence of objects (such as JSON lines), an array of objects, an object with such an array under
            `data`, or the nested format of SQuAD. All columns of CSV and TSV are read as text, so that text consisting of
            digits remains text. The encoding is UTF-8, with or without a byte order mark. Empty lines are no rows, except
            in a single column, where they are empty texts unless they end the file.
        columns: the columns to read; None for all.
        at: how messages name the file.

    Raises:
        ConfigError: the file is unreadable or corrupt, or a column is missing.
    """
    import pyarrow as pa

    read = {"parquet": _read_parquet, "csv": _read_csv, "tsv": _read_csv}.get(extension(file), _read_json)
    try:
        return read(file, columns, at)
    except (pa.ArrowException, OSError, ValueError, OverflowError, RecursionError, csv.Error) as error:
        if isinstance(error, UnicodeDecodeError) or "invalid UTF8" in str(error):
            raise _fault(at, f"the file is not in UTF-8; allowed is only this encoding\n{_RECODE}") from error
        raise _fault(at, f"cannot be read as {extension(file)}: {line_of(error)}") from error


def _read_parquet(file: Path, columns: Sequence[str] | None, at: str) -> pa.Table:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as source:
        return source.read(columns=_choose(source.schema_arrow.names, columns, at))


def _read_csv(file: Path, columns: Sequence[str] | None, at: str) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    plain = extension(file) == "tsv"
    if plain:
        delimiter, (header, skipped) = "\t", _read_header(file, "\t", csv.QUOTE_NONE)
    else:
        delimiter, header, skipped = _find_delimiter(file)
    chosen, single = _choose(header, columns, at), len(header) == 1
    table = arrow_csv.read_csv(
        file,
        read_options=arrow_csv.ReadOptions(block_size=_CSV_BLOCK, skip_rows=skipped),
        parse_options=arrow_csv.ParseOptions(
            delimiter=delimiter,
            quote_char=False if plain else '"',
            newlines_in_values=not plain,
            ignore_empty_lines=not single,
        ),
        convert_options=arrow_csv.ConvertOptions(
            column_types=dict.fromkeys(chosen, pa.string()),
            include_columns=chosen,
            # An empty line becomes null, and a quoted empty text does not.
            null_values=[""],
            strings_can_be_null=single,
            quoted_strings_can_be_null=False,
        ),
    )
    return _fill_empty_lines(table) if single else table


def _fill_empty_lines(table: pa.Table) -> pa.Table:
    """Return a table of one column without the empty lines (null) at its end, and with empty texts for all others."""
    import pyarrow as pa
    import pyarrow.compute as pc

    (column,) = table.columns
    written = pc.indices_nonzero(column.is_valid())
    rows = written[-1].as_py() + 1 if len(written) else 0
    return pa.table({table.column_names[0]: column.slice(0, rows).fill_null("")})


def _read_header(file: Path, delimiter: str, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL) -> tuple[list[str], int]:
    """Return the first line that is not empty, and the number of lines before it."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        for skipped, cells in enumerate(csv.reader(stream, delimiter=delimiter, quoting=quoting)):
            if any(cell.strip() for cell in cells):
                return cells, skipped
    return [], 0


def _find_delimiter(file: Path) -> tuple[str, list[str], int]:
    """Return the delimiter with which the header has most columns, these columns, and the number of lines before them."""
    headers = {delimiter: _read_header(file, delimiter) for delimiter in _CSV_DELIMITERS}
    best = max(headers, key=lambda delimiter: len(headers[delimiter][0]))  # the first of equal ones, so the comma
    return best, *headers[best]


def write_table(table: pa.Table, file: Path) -> None:
    """Write rows to a new file as CSV, TSV, JSON lines or Parquet, by its extension, so that `read_table` reads them back.

    TSV has no quoting, so line breaks and tabs in texts become spaces.

    Raises:
        OSError: the file cannot be written.
    """
    if extension(file) == "parquet":
        import pyarrow.parquet as pq

        pq.write_table(table, file)
        return
    with file.open("w", encoding="utf-8", newline="") as stream:
        if extension(file) in ("json", "jsonl"):
            stream.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in table.to_pylist())
            return
        lines = [table.column_names, *(list(row.values()) for row in table.to_pylist())]
        if extension(file) == "tsv":
            stream.writelines("\t".join(_BREAK_OR_TAB.sub(" ", _write_cell(cell)) for cell in line) + "\n" for line in lines)
            return
        # Python before 3.13 does not quote a lone carriage return, at which readers would begin a new row.
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerows([_LONE_RETURN.sub("\n", _write_cell(cell)) for cell in line] for line in lines)


def _write_cell(cell: Any) -> str:
    """Return a cell as text, lists as JSON (`read_lists`)."""
    if isinstance(cell, list | dict):
        return json.dumps(cell, ensure_ascii=False, default=str)
    return "" if cell is None else str(cell)


def is_list_text(text: str) -> bool:
    """Tell whether a text is a list in brackets whose elements are quoted, or that is empty."""
    return _QUOTED_LIST.fullmatch(text.strip()) is not None


def read_lists(cells: Sequence[Any], at: str, *, words: bool) -> list[Any]:
    """Return cells with a list in place of every text that is one: a JSON array, or a list as Python and pandas write it.

    Args:
        cells: a text, a list or None per row.
        at: location for error messages.
        words: whether the texts are words separated by spaces, among which may be brackets. Such a text is a list only if
            its elements are quoted, or if all texts are in brackets.

    Raises:
        ConfigError: a text in brackets is not a flat list.
    """
    texts = {row: cell.strip() for row, cell in enumerate(cells) if isinstance(cell, str) and cell.strip()}
    lists = {row: text for row, text in texts.items() if text[0] == "[" and text[-1] == "]"}
    if words and len(lists) < len(texts):
        lists = {row: text for row, text in lists.items() if is_list_text(text)}
    found = list(cells)
    for row, text in lists.items():
        found[row] = _parse_list(text)
        if found[row] is None:
            raise ConfigError(
                f"{at}: row {row} has {text[:_CELL_SHOWN]!r}; expected is a list without lists in it\n"
                f'way out: write it as JSON, ["a", "b"], or without brackets, {"a b" if words else "a|b"}'
            )
    return found


def _parse_list(text: str) -> list[Any] | None:
    """Return the elements of a list in JSON or in Python's notation; None if the text is not a flat list."""
    try:
        parts = read_json(text)
    except ValueError:
        try:
            parts = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return None
        # NumPy writes no commas, and Python joins texts without a comma between them.
        if len(_QUOTED.findall(text)) != sum(isinstance(part, str) for part in parts):
            return None
    return parts if all(part is None or isinstance(part, str | int | float) for part in parts) else None


def _read_json(file: Path, columns: Sequence[str] | None, at: str) -> pa.Table:
    # pyarrow.json is not used, because it converts date-like strings to dates and cannot read arrays.
    import pyarrow as pa

    rows = _unwrap(_parse_values(read_file(file).decode("utf-8-sig")))
    wrong = next((n for n, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        raise _fault(at, f"row {wrong} is not an object; expected is one object per row with named columns")
    if not rows:
        raise _fault(at, "there are no rows")
    if len(rows) == 1 and rows[0] and all(isinstance(cell, dict) for cell in rows[0].values()):
        raise _fault(at, "holds columns; expected is one object per row\nway out, with pandas: orient='records'")
    chosen = _choose(list(dict.fromkeys(name for row in rows for name in row)), columns, at)
    return pa.table({name: _to_array(name, [row.get(name) for row in rows], at) for name in chosen})


def _parse_values(text: str) -> list[Any]:
    """Return the consecutive JSON values of a text. Each value may span any number of lines."""
    decoder, values, position = json.JSONDecoder(), [], 0
    try:
        while (position := _SPACE.match(text, position).end()) < len(text):  # type: ignore[union-attr]
            value, position = decoder.raw_decode(text, position)
            values.append(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    return values


def _unwrap(values: list[Any]) -> list[Any]:
    """Return the rows of a single array, or of a single object with an array under `data`; otherwise return the values."""
    if len(values) != 1:
        return values
    document = values[0]
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        rows: list[Any] = document["data"]
        nested = any(isinstance(row, dict) and "paragraphs" in row for row in rows)
        return _unnest(rows) if nested else rows
    return document if isinstance(document, list) else values


def _unnest(articles: list[Any]) -> list[Any]:
    """Convert SQuAD's nested format (articles, paragraphs, questions) to rows as on the hub."""
    try:
        return [
            {
                "id": question["id"],
                "title": article.get("title"),
                "context": paragraph["context"],
                "question": question["question"],
                "answers": {key: [answer[key] for answer in question["answers"]] for key in ("text", "answer_start")},
            }
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not nested as SQuAD is (data, paragraphs, qas, answers): {line_of(error)}") from None


def _to_array(name: str, values: list[Any], at: str) -> pa.Array:
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        kinds = [type(value).__name__ for value in values]
        first = next(kind for kind in kinds if kind != "NoneType")
        row = next((n for n, kind in enumerate(kinds) if kind not in (first, "NoneType")), None)
        if row is None:
            raise
        text = f"column {name}: row {row} has {kinds[row]}; expected is {first}, as before"
        raise _fault(at, text) from error


def _choose(present: Sequence[str], columns: Sequence[str] | None, at: str) -> list[str]:
    missing = [name for name in columns or () if name not in present]
    if missing:
        raise _fault(at, f"no column {' and no column '.join(missing)}\nthere is: {_listed(present)}")
    chosen = list(columns or present)
    doubled = [name for name in chosen if list(present).count(name) > 1]
    if doubled:
        raise _fault(at, f"more than one column is named {doubled[0]}")
    return chosen


def _names_of(split: str) -> str:
    return f"{split}.{{{','.join(EXTENSIONS)}}} or {split}-00000-of-00001.parquet"


def _listed(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more if names else "nothing"
