"""Finding the text columns and the label column of a user's table, by usual names and, failing that, by content."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from wlora.data.labels import is_text, plain, shorten_type
from wlora.data.row_checks import LABEL, are_indicators
from wlora.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    import pyarrow as pa

    from wlora.config.schema import TaskConfig

_LOOKED_AT = 1000  # rows
_MOST_CLASSES = 100  # maximum number of classes of a label column that is recognised by its content
_SHOWN = 8

# Usual names, compared without regard to case and punctuation. The first one that exists is used.
_CLASS = "label labels class category target intent sentiment topic entailment_judgment entailment_label gold_label y answer"
_LABELS = {
    "classification": _CLASS,
    "regression": "score label rating stars value target y relatedness_score similarity similarity_score",
    "multi_label": "labels label tags categories topics emotions genres",
    "token_classification": "ner_tags tags labels label ner pos_tags",
    "question_answering": "answers answer",
    "summarization": "summary highlights target abstract headline label",
}
_SENTENCES = "text sentence content body review message comment utterance tweet document description question"
_TEXTS = {
    "question_answering": ("question", "context passage paragraph document"),
    "summarization": ("document article text dialogue source content body",),
    "token_classification": ("tokens words text",),
}
_PAIRS = (("premise", "hypothesis"), ("question", "passage"), ("question", "sentence"), ("question", "context"))
_FIRST = re.compile(r"(\w+?)_?(1|a)")
_IDENTIFIER = re.compile(r"(\w+_)?(id|idx|index|guid|uid|uuid)|unnamed_\d+|_*")


class Found(NamedTuple):
    """The columns of a table: texts, label (for a summary the second text), and those that are not used.

    The label is a list of columns if every class has a column of its own.
    """

    columns: list[str]
    label: str | list[str]
    unused: list[str]


def find_columns(table: pa.Table, task: TaskConfig, where: str) -> Found:
    """Find the text and label columns of a table. Columns that the task names are taken as they are.

    Args:
        table: the rows.
        task: its `columns`, `label` and `kind` determine the search.
        where: the source of the rows, for error messages.

    Raises:
        ConfigError: a named column does not exist, or a column cannot be inferred. The message lists the columns.
    """
    names = table.column_names
    summary = task.kind == "summarization"
    given = task.columns[:1] if summary else task.columns
    label = task.label or (task.columns[1] if summary and len(task.columns) > 1 else None)
    taken = label if isinstance(label, list) else [label] if label else []
    for key, name in [*(("text", name) for name in given), *(("label", name) for name in taken)]:
        if name not in names:
            raise unknown_name(f"{where}: task.{key}={name}", name, names)
    texts = list(given) or _named_texts(table, task.kind, without=taken)
    label = label or _named_label(names, task.kind, without=texts)
    taken = taken or [label]
    rest = [name for name in names if name not in (*texts, *taken) and not _IDENTIFIER.fullmatch(_plain_name(name))]
    if not texts:
        texts = _only([name for name in rest if _reads_as_text(table.column(name), task.kind)])
        if not texts or task.kind == "question_answering":
            raise _unclear("text", table, task.kind, where)
        rest = [name for name in rest if name not in texts]
    if label is None:
        label = _find_label(table, rest, task.kind)
        if label is None:
            raise _unclear("label", table, task.kind, where)
    taken = label if isinstance(label, list) else [label]
    if both := [name for name in taken if name in texts]:
        raise ConfigError(f"{where}: column {both[0]} cannot be both a text and the label: see task.text and task.label")
    columns = [*texts, *taken] if summary else texts
    if LABEL in columns:
        raise ConfigError(f"{where}: a text column must not be called {LABEL}: rename it")
    return Found(columns, label, [name for name in names if name not in (*columns, *taken)])


def listed(names: Sequence[str]) -> str:
    """Return names for a message, at most eight."""
    more = f", … ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _unclear(key: str, table: pa.Table, kind: str, where: str) -> ConfigError:
    """Return the error for a column that is not found. Columns that hold no text are listed with their type."""
    allowed = "COLUMN" if key == "label" else "[QUESTION,CONTEXT]" if kind == "question_answering" else "[COLUMN]"
    if key == "label" and kind == "multi_label":
        allowed += ", or [COLUMN,COLUMN] with 0 and 1"
    types = {name: plain(table.column(name)).type for name in table.column_names}
    there = [name if is_text(own) else f"{name} ({shorten_type(own)})" for name, own in types.items()]
    return ConfigError(
        f"{where}: which column is the {key} is not clear: add task.{key}={allowed}\nthere is: {listed(there)}"
    )


def _plain_name(name: str) -> str:
    return re.sub(r"\W+", "_", name.strip().casefold())


def _by_name(names: Sequence[str], usual: str, without: Sequence[str | None]) -> str | None:
    """Return the first of the usual names that exists as a column."""
    known = {_plain_name(name): name for name in reversed(names) if name not in without}
    return next((known[name] for name in usual.split() if name in known), None)


def _named_label(names: Sequence[str], kind: str, without: Sequence[str]) -> str | None:
    return _by_name(names, _LABELS[kind], without)


def _find_label(table: pa.Table, names: Sequence[str], kind: str) -> str | list[str] | None:
    """Return the only column that may hold labels, or all columns of 0 and 1 for classes of which a row may have several."""
    found = _only([name for name in names if _reads_as_label(table.column(name), kind)])
    if found:
        return found[0]
    flags = [name for name in names if are_indicators(table.column(name))] if kind == "multi_label" else []
    return flags if len(flags) > 1 else None


def _named_texts(table: pa.Table, kind: str, without: Sequence[str]) -> list[str]:
    """Return the text columns with usual names; an empty list if there are none."""
    names = [name for name in table.column_names if name not in without]
    if kind in _TEXTS:
        found = [_by_name(names, usual, without) for usual in _TEXTS[kind]]
        return [name for name in found if name is not None] if None not in found else []
    known = {_plain_name(name): name for name in reversed(names) if _may_be_text(table.column(name))}
    for first, second in _PAIRS:
        if first in known and second in known:
            return [known[first], known[second]]
    for name in known:
        match = _FIRST.fullmatch(name)
        second = name[: match.start(2)] + {"1": "2", "a": "b"}[match[2]] if match else ""
        if second in known and match is not None and match[1] not in ("label", "score"):
            return [known[name], known[second]]
    single = _by_name(list(known.values()), _SENTENCES, without)
    return [single] if single else []


def _may_be_text(column: pa.ChunkedArray) -> bool:
    """Tell whether a column holds strings, or only nulls. The check of the rows will reject nulls."""
    from pyarrow import types

    return is_text(plain(column).type) or bool(types.is_null(column.type))


def _only(names: list[str]) -> list[str]:
    return names if len(names) == 1 else []


def _reads_as_text(column: pa.ChunkedArray, kind: str) -> bool:
    """Tell whether a column holds texts of several words; for tokens, lists of texts."""
    from pyarrow import types

    column = plain(column)
    if kind == "token_classification" and types.is_list(column.type):
        return is_text(column.type.value_type)
    if not is_text(column.type):
        return False
    cells = [text for text in column.slice(0, _LOOKED_AT).to_pylist() if text and text.strip()]
    return bool(cells) and 2 * sum(" " in text.strip() for text in cells) >= len(cells)


def _reads_as_label(column: pa.ChunkedArray, kind: str) -> bool:
    """Tell whether a column may hold the labels of a kind of task."""
    from pyarrow import types

    column = plain(column)
    if kind in ("multi_label", "token_classification"):
        return bool(types.is_list(column.type))
    if kind == "regression":
        return types.is_floating(column.type) or (is_text(column.type) and _reads_as_numbers(column))
    if kind == "summarization":
        return _reads_as_text(column, kind)
    if kind != "classification" or not (
        is_text(column.type) or types.is_integer(column.type) or types.is_boolean(column.type)
    ):
        return False
    return 2 <= len(column.unique()) <= min(_MOST_CLASSES, len(column) // 2)


def _reads_as_numbers(column: pa.ChunkedArray) -> bool:
    cells = [text for text in column.slice(0, _LOOKED_AT).to_pylist() if text]
    try:
        return bool([float(text) for text in cells])
    except ValueError:
        return False
