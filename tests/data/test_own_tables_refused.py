"""Own tables that cannot be a task are refused in a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.own_tables import Columns, fault_of, tickets, write

BAD: dict[str, tuple[str, Columns, list[str], list[str]]] = {
    "a label that occurs once": (
        "text_classification",
        tickets(category=["bug"] * 30 + ["praise"] * 29 + ["rare"]),
        [],
        ["task.validation=0.1: the label rare occurs once (row 59)", "way out: merge or remove it"],
    ),
    "10,000 labels": (
        "text_classification",
        {"text": ["a b"] * 10_000, "label": [f"user {n}" for n in range(10_000)]},
        [],
        ["column label: 10,000 different labels in 10,000 rows; allowed are at most 1,000"],
    ),
    "one label": ("text_classification", tickets(category=["bug"] * 60), [], ["only the label 'bug' in 60 rows"]),
    "a missing column": (
        "text_classification",
        tickets(),
        ["task.label=categry"],
        ["task.label=categry is unknown; did you mean category?"],
    ),
    "a missing text column": (
        "text_classification",
        tickets(),
        ["task.text=[body]"],
        ["task.text=body is unknown", "id, text"],
    ),
    "an unclear text": (
        "text_classification",
        {"a": ["x y", "z w"] * 4, "b": ["k l", "m n"] * 4, "label": [0, 1] * 4},
        [],
        ["which column is the text is not clear: add task.text=[COLUMN]\nthere is: a, b, label"],
    ),
    "a null column": (
        "text_classification",
        tickets(category=[None] * 60),
        [],
        ["column category: all 60 rows are empty (null)"],
    ),
    "null texts": ("text_classification", tickets(text=[None] * 60), [], ["column text", "all 60 rows are empty (null)"]),
    "a null label": (
        "text_classification",
        tickets(category=[None, *["a", "b"] * 29, None]),
        [],
        ["row 0, one of 2, is empty (null)"],
    ),
    "a nested column": (
        "text_classification",
        tickets(category=[{"a": 1}] * 60),
        [],
        ["column category holds struct<a: int64>"],
    ),
    "lists of labels": (
        "text_classification",
        tickets(category=[["a"], ["b"]] * 30),
        [],
        ["row 0 has a list", "task=multi_label"],
    ),
    "mixed types": (
        "text_classification",
        tickets(category=["a", 7] * 30),
        [],
        ["column category: row 1 has int; expected is str"],
    ),
    "a megabyte": ("text_classification", tickets(text=["x" * (1 << 20) + "y"] * 60), [], ["row 0 has 1,048,577 bytes"]),
    "a text and label in one": (
        "text_classification",
        tickets(),
        ["task.text=category", "task.label=category"],
        ["cannot be both"],
    ),
    "a large share": (
        "text_classification",
        tickets(),
        ["task.validation=0.7"],
        ["task.validation=0.7: allowed is a file, a share up to 0.5"],
    ),
    "a whole number": (
        "text_classification",
        tickets(),
        ["task.validation=5"],
        ["task.validation=5: allowed is a file, a share"],
    ),
    "a split of a file": (
        "text_classification",
        tickets(),
        ["task.validation=test"],
        ["task.validation=test: allowed is a file, a share", "is a file and has no splits"],
    ),
    "less than nothing": ("text_classification", tickets(), ["task.validation=-0.1"], ["task.validation=-0.1: allowed is"]),
    "a class given twice": (
        "text_classification",
        tickets(),
        ["task.labels=[bug,bug,praise,question]"],
        ["task.labels=[bug,bug,praise,question]: allowed is each class once"],
    ),
    "an unknown kind": ("text_classification", tickets(), ["task.kind=foo"], ["task.kind=foo is unknown"]),
    "an empty path": ("text_classification", tickets(), ["task.path=''"], ["task.path='': allowed is a file"]),
    "one fold": ("text_classification", tickets(), ['task.validation="folds=1"'], ["task.validation=folds=1: allowed is"]),
    "a fold too many": (
        "text_classification",
        tickets(),
        ['task.validation="folds=3"', "task.fold=3"],
        ["task.fold=3: allowed is 0 to 2"],
    ),
    "a fold of nothing": ("text_classification", tickets(), ["task.fold=0"], ["task.fold=0: allowed is null"]),
    "no such file": (
        "text_classification",
        tickets(),
        ["task.validation=dev.csv"],
        ["task.validation=dev.csv: the file does not exist"],
    ),
    "weights of values": (
        "text_regression",
        {"text": ["a b"] * 9, "score": [1.5, 2.0, 3.0] * 3},
        ["task.class_weights=balanced"],
        ["task.class_weights=balanced: allowed is none"],
    ),
    "words for values": (
        "text_regression",
        {"text": ["a b"] * 4, "score": ["1", "2", "high", "3"]},
        [],
        ["column score: row 2 has 'high'; allowed are finite numbers"],
    ),
    "one value": (
        "text_regression",
        {"text": ["a b"] * 4, "score": [1, 1.0, 1, 1.0]},
        [],
        ["column score: only the value 1 in 4 rows; expected are at least two values"],
    ),
    "blank texts": (
        "text_classification",
        tickets(text=["", " ", "\n"] * 20),
        ["task.text=text"],
        ["column text: the texts of all 60 rows are empty"],
    ),
    "a nested text": (
        "text_classification",
        tickets(text=[{"a": "b c"}] * 60),
        [],
        ["add task.text=[COLUMN]\nthere is: id, text (struct<a: string>), category"],
    ),
    "several label columns": (
        "text_classification",
        tickets(),
        ["task.label=[category,id]"],
        ["task.label=[category,id]: allowed is NAME, a column of the table; several are for task=multi_label"],
    ),
    "a label column that is a mapping": (
        "text_classification",
        tickets(),
        ["task.label={a:1}"],
        ["task.label={'a': 1}: allowed is NAME"],
    ),
    "a label column twice": (
        "multi_label",
        {"text": ["a b"] * 4, "a": [0, 1] * 2, "b": [1, 0] * 2},
        ["task.label=[a,a]"],
        ["task.label=[a,a]: allowed is NAME, a column of the table, or [NAME,NAME], different columns of 0 and 1"],
    ),
    "a label column that is missing": (
        "multi_label",
        {"text": ["a b"] * 4, "bug": [0, 1] * 2, "b": [1, 0] * 2},
        ["task.label=[bugs,b]"],
        ["task.label=bugs is unknown; did you mean bug?\nallowed: b, bug, text"],
    ),
    "more than zero and one": (
        "multi_label",
        {"text": ["a b"] * 4, "a": [0, 1, 2, 1], "b": [1, 0] * 2},
        ["task.label=[a,b]"],
        ["column a: row 2 has 2; allowed are 0 and 1"],
    ),
    "zeros and ones and a gap": (
        "multi_label",
        {"text": ["a b"] * 4, "a": [0, 1, None, 1], "b": [1, 0] * 2},
        ["task.label=[a,b]"],
        ["column a: row 2 has None; allowed are 0 and 1"],
    ),
    "only zeros": (
        "multi_label",
        {"text": ["a b"] * 4, "a": [0] * 4, "b": [0] * 4},
        [],
        ["task.label=[a,b]: no label in 4 rows"],
    ),
    "a question alone": (
        "question_answering",
        {"question": ["who"] * 4, "context": ["Anna left."] * 4, "answer": ["Anna"] * 4},
        ["task.text=question"],
        ["task.text=[question]: allowed is [QUESTION,CONTEXT], two columns"],
    ),
    "an answer elsewhere": (
        "question_answering",
        {"question": ["who"] * 4, "context": ["Anna left."] * 4, "answer": ["Anna", "Anna", "Ben", "Anna"]},
        ["task.max_length=64", "task.stride=8"],
        ["column answer: row 2 has the answer 'Ben', which is not in its context"],
    ),
    "tags too few": (
        "token_classification",
        {"tokens": [["a", "b"]] * 4, "tags": [["O", "B-X"]] * 3 + [["O"]]},
        [],
        ["column tags: row 3 has 1 labels for 2 tokens"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_table_that_cannot_be_a_task_is_refused(case: str, tmp_path: Path) -> None:
    task, columns, words, parts = BAD[case]
    message = fault_of(*words, path=write(tmp_path / "t.jsonl", columns), task=task)
    assert all(part in message for part in parts), message


def test_a_json_file_is_refused_for_what_it_lacks_in_some_rows_or_for_its_shape(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "a b"}\n' + '{"text": "a c", "label": "x"}\n' * 3)
    assert "column label: row 0 is empty (null)" in fault_of(path=file)
    file.write_text('{"text": {"0": "a b", "1": "c d"}, "label": {"0": 1, "1": 0}}')
    assert "holds columns; expected is one object per row\nway out, with pandas: orient='records'" in fault_of(path=file)


def test_files_of_different_schema_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", tickets())
    write(tmp_path / "b.csv", {"text": ["x y"] * 4, "kind": ["a", "b"] * 2})
    message = fault_of(path=tmp_path)
    assert "b.csv: no column id, which a.csv has\nexpected are files with the same columns" in message
    (tmp_path / "b.csv").rename(tmp_path / "dev.csv")
    assert "dev.csv: no column category" in fault_of(path=tmp_path)


def test_a_table_without_a_source_is_refused(run_main: Callable[..., tuple[int, str, str]]) -> None:
    code, _, error = run_main("task=text_classification", "model=tiny_bert")
    assert code == 2 and error.startswith("error: task=text_classification reads your own table: add task.path=FILE")
