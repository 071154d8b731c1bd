"""Cells of labels and tokens that could be read as something else: numbers, lists in texts, missing values, delimiters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.support.own_tables import Columns, fault_of, settle, write
from wlora.config.schema import TaskConfig
from wlora.data.labels import class_finder
from wlora.data.local_files import read_lists, write_table
from wlora.data.sources import load_splits


def numbered(file: Path, cells: list[Any]) -> Path:
    return write(file, {"text": [f"a {row}" for row in range(len(cells))], "label": cells})


def read_sets(task: TaskConfig) -> dict[str, set[str]]:
    """Return the classes of each row by its text."""
    rows = load_splits(task, offline=True).rows
    pairs = [pair for split in rows.values() for pair in zip(split["text"][:], split["label"][:], strict=True)]
    return {text: {task.labels[number] for number in numbers} for text, numbers in pairs}


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("task", ["text_classification", "multi_label"])
def test_classes_that_are_numbers_are_no_indices(task: str, suffix: str, tmp_path: Path) -> None:
    single = task == "text_classification"
    train = numbered(tmp_path / f"train.{suffix}", [n if single else [n] for n in (1, 2, 3) * 4])
    dev = numbered(tmp_path / f"dev.{suffix}", [n if single else [n] for n in (1, 0, 2) * 2])
    message = fault_of(f"task.validation={dev}", path=train, task=task)
    assert "column label: row 1 has '0'" in message and message.endswith("\nallowed are 1, 2, 3")
    message = fault_of("task.labels=[1,2,3]", path=dev, task=task)
    assert "column label: 0 not among task.labels=[1,2,3]\nthe column holds 0, 1, 2" in message


@pytest.mark.parametrize(
    ("suffix", "first", "second"),
    [("csv", ["1.0", "2.0"], ["1", "2"]), ("csv", ["1", "2"], ["1.0", "2.0"]), ("jsonl", [1, 2], [1.0, 2.0])],
)
def test_classes_that_are_numbers_are_compared_by_value(suffix: str, first: Any, second: Any, tmp_path: Path) -> None:
    train, dev = numbered(tmp_path / f"train.{suffix}", first * 4), numbered(tmp_path / f"dev.{suffix}", second)
    for validation in (dev, numbered(tmp_path / "other.jsonl", [1, 2])):
        rows = load_splits(settle(train, f"task.validation={validation}"), offline=True).rows
        assert rows["train"]["label"][:] == [0, 1] * 4 and rows["validation"]["label"][:] == [0, 1]


def test_an_index_is_a_class_only_without_numbers_among_the_classes() -> None:
    names = ["News", "news", "1.50", "0", "10", "10.0"]
    cells = ["News", "news", " NEWS ", "1.5", "00", "10", "10.0", "10.00", "1", "2", "nan", ""]
    assert [class_finder(names)(cell) for cell in cells] == [0, 1, 0, 2, 3, 4, 5, -1, -1, -1, -1, -1]
    assert [class_finder(["a", "nan", "inf", "1_0"])(cell) for cell in ("0", "3", "4", "10")] == [0, 3, -1, -1]
    assert class_finder(["a", "b"], indices=False)("0") == -1


def test_given_classes_are_counted_by_their_indices_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settle(numbered(tmp_path / "t.csv", [0, 1, 1, 1] * 3), "task.labels=[bug,praise]")
    assert "labels     bug 3, praise 9" in capsys.readouterr().out


TOKENS = [["Anna", "left"], ["it's"], ["[", 'Ben "B"', "Smith"]] * 4
TAGS = [["B-PER", "O"], ["O"], ["O", "B-PER", "I-PER"]] * 4


def read_tags(task: TaskConfig) -> list[Any]:
    """Return the tokens and tags of all rows, sorted."""
    rows = load_splits(task, offline=True).rows
    pairs = [pair for split in rows.values() for pair in zip(split["tokens"][:], split["label"][:], strict=True)]
    return sorted((tokens, [task.labels[number] for number in numbers]) for tokens, numbers in pairs)


@pytest.mark.parametrize("form", ["python", "json"])
def test_lists_of_tokens_and_tags_in_csv_are_read_back(form: str, tmp_path: Path) -> None:
    file, columns = tmp_path / "t.csv", {"tokens": TOKENS, "tags": TAGS}
    if form == "json":
        write_table(pa.table(columns), file)  # as `wlora predict` does
    else:
        write(file, columns)  # as pandas does
    task = settle(file, task="token_classification")
    assert task.labels == ["B-PER", "I-PER", "O"]
    assert read_tags(task) == sorted(zip(TOKENS, TAGS, strict=True))


def test_brackets_among_words_are_tokens(tmp_path: Path) -> None:
    texts = ["[1] See [2]", "Anna left it", "[ a ]"] * 4
    task = settle(write(tmp_path / "t.csv", {"tokens": texts, "tags": ["O O B-X"] * 12}), task="token_classification")
    assert [tokens for tokens, _ in read_tags(task)] == sorted(text.split() for text in texts)


@pytest.mark.parametrize("cells", [["['a', 'b']", "['b']", "[]"], ['["a", "b"]', '["b"]', ""], ["['a','b',]", "b", ""]])
def test_lists_of_classes_in_csv_are_read_back(cells: list[str], tmp_path: Path) -> None:
    task = settle(
        write(tmp_path / "t.csv", {"text": [f"x {n}" for n in range(12)], "labels": cells * 4}), task="multi_label"
    )
    assert task.labels == ["a", "b"]
    found = read_sets(task)
    assert [found[f"x {n}"] for n in range(3)] == [{"a", "b"}, {"b"}, set()]


WRONG_LISTS = [
    "['a' 'b']",
    "[a, b]",
    "[['a'], ['b']]",
    "['a'], ['b']",
    "['a', nan]",
    "[np.str_('a')]",
    "[" * 300 + "]" * 300,
]


@pytest.mark.parametrize("cell", WRONG_LISTS)
@pytest.mark.parametrize(
    ("task", "key", "plain"), [("multi_label", "labels", "a|b"), ("token_classification", "tags", "a b")]
)
def test_a_list_that_cannot_be_read_is_refused(task: str, key: str, plain: str, cell: str, tmp_path: Path) -> None:
    columns: Columns = {"tokens" if key == "tags" else "text": ["x y"] * 8, key: ["['a', 'b']"] * 5 + [cell] + ["[]"] * 2}
    message = fault_of(path=write(tmp_path / "t.csv", columns), task=task)
    assert f"t.csv: column {key}: row 5 has {cell[:40]!r}; expected is a list without lists in it\n" in message
    assert message.endswith(f'way out: write it as JSON, ["a", "b"], or without brackets, {plain}')


@pytest.mark.parametrize(
    ("cell", "part"), [("[1, 2]", "row 2 has the token 1 in its list"), ('["a" b]', "row 2 has '[\"a\" b]'; exp")]
)
def test_tokens_of_a_list_are_texts(cell: str, part: str, tmp_path: Path) -> None:
    columns: Columns = {"tokens": ["['x', 'y']"] * 2 + [cell] + ["['x', 'y']"] * 5, "tags": ["O B-X"] * 8}
    assert f"column tokens: {part}" in fault_of(path=write(tmp_path / "t.csv", columns), task="token_classification")


def test_a_list_of_classes_needs_a_task_with_lists(tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", {"text": ["a b"] * 8, "label": ["['a']", "['b']"] * 4})
    assert "column label: row 0 has a list of labels: allowed is task=multi_label" in fault_of(path=file)
    file = write(tmp_path / "t.csv", {"text": ["a b"] * 8, "label": ["[a]", "[b]"] * 4})
    assert settle(file).labels == ["[a]", "[b]"]


def test_a_text_that_is_no_list_stays_a_text() -> None:
    cells = [None, "", "[", "a] [b", ["a"]]
    assert read_lists(cells, "at", words=False) == cells


@pytest.mark.parametrize("empty", [None, "", " "])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(("task", "key"), [("multi_label", "labels"), ("token_classification", "tags")])
def test_a_missing_label_in_a_list_is_refused(task: str, key: str, suffix: str, empty: Any, tmp_path: Path) -> None:
    columns: Columns = {"tokens" if key == "tags" else "text": ["x y"] * 8, key: [["a", "b"]] * 6 + [["a", empty]] * 2}
    message = fault_of(path=write(tmp_path / f"t.{suffix}", columns), task=task)
    assert f"column {key}: row 6 has an empty (null) label in its list; expected are classes" in message


def test_nan_is_a_missing_label(tmp_path: Path) -> None:
    rows: Columns = {"text": ["x y"] * 8, "label": [1.0, 2.0] * 3 + [float("nan")] * 2}
    assert "column label: row 6, one of 2, is empty (null)" in fault_of(path=write(tmp_path / "t.parquet", rows))
    lists = rows | {"label": [[value] for value in rows["label"]]}
    assert "row 6 has an empty (null) label" in fault_of(path=write(tmp_path / "t.parquet", lists), task="multi_label")


@pytest.mark.parametrize("validation", ["news, politics", "sport", "sport|news, politics", "sport;news, politics"])
def test_all_rows_have_one_delimiter(validation: str, tmp_path: Path) -> None:
    cells = ["news, politics|sport", "news, politics", "sport", ""]
    train = write(tmp_path / "t.csv", {"text": [f"x {n}" for n in range(8)], "labels": cells * 2})
    dev = write(tmp_path / "dev.csv", {"text": ["y"], "labels": [validation]})
    task = settle(train, f"task.validation={dev}", task="multi_label")
    assert task.labels == ["news, politics", "sport"]
    found = read_sets(task)
    assert [found[f"x {n}"] for n in range(4)] == [{"news, politics", "sport"}, {"news, politics"}, {"sport"}, set()]
    assert found["y"] == {name for name in task.labels if name in validation}


def test_given_classes_decide_about_the_delimiter(tmp_path: Path) -> None:
    file = write(
        tmp_path / "t.csv", {"text": ["x y"] * 12, "labels": ["news, politics", "sport", "sport; news, politics"] * 4}
    )
    assert settle(file, "task.labels=[sport,'news, politics']", task="multi_label").labels == ["sport", "news, politics"]
    message = fault_of("task.labels=[sport,politics]", path=file, task="multi_label")
    assert "news, politics not among task.labels=[sport,politics]" in message
