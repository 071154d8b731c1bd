"""Rows and files that are refused, with messages that name the row and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.mnli_files import ROWS, Rows, fault_of, make_task, write, write_both
from wlora.data.local_files import EXTENSIONS
from wlora.data.sources import load_splits


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_regression_takes_finite_numbers(tmp_path: Path, extension: str) -> None:
    rows = ROWS | {"label": [0.0, 5.0, 2.5, 3.2, 1.75]}
    task = make_task(write_both(tmp_path, rows, extension), labels=[])
    assert load_splits(task, offline=True).rows["train"][:] == rows


BAD_ROWS: dict[str, tuple[Rows, list[str]]] = {
    "missing column": (
        {"premise": ["a"], "label": [0]},
        ["train.jsonl", "no column hypothesis", "there is: premise, label"],
    ),
    "missing label": ({"premise": ["a"], "hypothesis": ["b"]}, ["no column label"]),
    "null texts": ({"premise": [None, None], "hypothesis": ["b", "c"], "label": [0, 1]}, ["column premise: all 2 rows"]),
    "number for text": ({"premise": [7], "hypothesis": ["b"], "label": [0]}, ["column premise holds int64", "text"]),
    "mixed text": ({"premise": ["a", 7], "hypothesis": ["b", "c"], "label": [0, 1]}, ["column premise: row 1 has int"]),
    "null label": ({"premise": ["a"], "hypothesis": ["b"], "label": [None]}, ["column label: row 0", "null"]),
    "label too high": (
        ROWS | {"label": [0, 1, 2, 3, 0]},
        ["row 3 has 3", "0..2", "entailment, neutral, contradiction"],
    ),
    "hidden label": (ROWS | {"label": [0, 1, -1, 2, 0]}, ["row 2 has -1, as hidden test labels do", "0..2"]),
    "unknown name": (ROWS | {"label": ["neutral", "maybe", "neutral", "x", "y"]}, ["row 1 has 'maybe'", "neutral"]),
    "float label": (ROWS | {"label": [0.0, 1.0, 2.0, 1.0, 0.5]}, ["column label holds double", "0..2"]),
    "bool label": (ROWS | {"label": [True, False, True, True, True]}, ["column label holds bool", "0..2"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused(tmp_path: Path, case: str) -> None:
    rows, parts = BAD_ROWS[case]
    message = fault_of(make_task(write_both(tmp_path, rows)))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("extension", ["csv", "tsv"])
def test_bad_labels_in_text_formats_are_refused(tmp_path: Path, extension: str) -> None:
    task = make_task(write_both(tmp_path, ROWS | {"label": [0, 1, 7, "", 0]}, extension))
    assert "row 2 has '7'" in fault_of(task)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much", None])
def test_regression_refuses_what_is_no_finite_number(tmp_path: Path, value: Any) -> None:
    rows: Rows = {"premise": ["a"], "hypothesis": ["b"], "label": [value]}
    assert "row 0" in fault_of(make_task(write_both(tmp_path, rows), labels=[]))


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


BAD_FILES: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "empty": ("csv", lambda file: file.write_bytes(b""), ["train.csv", "empty"]),
    "corrupt parquet": ("parquet", _cut_short, ["train.parquet", "cannot be read as parquet"]),
    "corrupt json": ("json", _cut_short, ["train.json", "cannot be read as json"]),
    "corrupt jsonl": ("jsonl", _cut_short, ["train.jsonl", "cannot be read as jsonl: line 5"]),
    "ragged csv": (
        "csv",
        lambda file: file.write_text("premise,hypothesis,label\na,b,0,9\n"),
        ["read as csv"],
    ),
    "header only": ("tsv", lambda file: file.write_text("premise\thypothesis\tlabel\n"), ["train.tsv", "no rows"]),
    "no header": ("tsv", lambda file: file.write_text("a\tb\t0\n"), ["no column premise", "there is: a, b, 0"]),
    "cut within lines": ("json", lambda file: file.write_text('{\n"premise": "a"'), ["cannot be read as json: line 2"]),
    "too deep": ("json", lambda file: file.write_text("[" * 200_000), ["cannot be read as json"]),
    "no objects": ("json", lambda file: file.write_text("[1, 2]"), ["train.json", "row 0 is not an object"]),
    "no rows": ("json", lambda file: file.write_text("[]"), ["train.json", "no rows"]),
    "not utf-8": (
        "csv",
        lambda file: file.write_bytes(b"premise,hypothesis,label\n\xff,b,0\n"),
        ["train.csv: the file is not in UTF-8", "iconv"],
    ),
    "not utf-8 json": ("jsonl", lambda file: file.write_bytes(b'{"premise": "\xff"}'), ["the file is not in UTF-8"]),
    "no file": ("csv", lambda file: file.unlink(), ["split train", "train.{parquet,json,jsonl,csv,tsv}"]),
    "two files": ("csv", lambda file: write(file.with_suffix(".json"), ROWS), ["train.json", "train.csv"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(tmp_path: Path, case: str) -> None:
    extension, spoil, parts = BAD_FILES[case]
    spoil(write_both(tmp_path, ROWS, extension) / f"train.{extension}")
    message = fault_of(make_task(tmp_path))
    assert all(part in message for part in parts), message
