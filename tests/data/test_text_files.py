"""CSV and TSV files with empty lines and without quotes, and the files of a folder that are read or left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.support.own_tables import settle, tickets, write
from wlora.data.local_files import read_table, write_table
from wlora.data.sources import load_splits

MARK = "\ufeff"


def read(file: Path, content: str, columns: list[str] | None = None) -> dict[str, list[Any]]:
    file.write_bytes(content.encode())
    return read_table(file, columns, "at").to_pydict()


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["{end}", "{end}{end}", f"{MARK}{{end}}", " {end}", "{delimiter} {delimiter}{end}{end}"])
def test_empty_lines_before_the_header_are_skipped(name: str, end: str, start: str, tmp_path: Path) -> None:
    for delimiter in "\t" if name == "t.tsv" else ",;\t|":
        content = start.format(end=end, delimiter=delimiter) + end.join(
            [f"text{delimiter}label", f"a b{delimiter}x", "", f"c{delimiter}y", "", ""]
        )
        assert read(tmp_path / name, content, ["text", "label"]) == {"text": ["a b", "c"], "label": ["x", "y"]}
    assert read(tmp_path / name, f"{end}{end}text{end}a{end}{end}b") == {"text": ["a", "", "b"]}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\r\n\r\n\r\n", ""])
def test_an_empty_line_of_a_single_column_is_an_empty_text_but_not_at_the_end(end: str, tmp_path: Path) -> None:
    line = "\r\n" if "\r" in end else "\n"
    for name in ("t.csv", "t.tsv"):
        assert read(tmp_path / name, line.join(["text", "anna", "", "", "ben"]) + end) == {"text": ["anna", "", "", "ben"]}
    assert read(tmp_path / "t.csv", line.join(["text", '""', "", '""']) + end) == {"text": ["", "", ""]}
    assert read(tmp_path / "t.csv", "text" + line + end) == {"text": []}


ODD = ['He said "hi"', '"', "a\tb", "a\r\nb\rc\nd", "it's, \\n", "", "ä – 漢字", "'quoted'", "x\u2028y"]


def test_tsv_has_no_quotes_and_no_breaks(tmp_path: Path) -> None:
    write_table(pa.table({"text": ODD, "odd\tname": range(len(ODD))}), tmp_path / "t.tsv")
    assert (tmp_path / "t.tsv").read_text(encoding="utf-8").startswith('text\todd name\nHe said "hi"\t0\n"\t1\na b\t2\n')
    found = read_table(tmp_path / "t.tsv", None, "at").to_pydict()
    assert found["text"] == [
        text.replace("\r\n", " ").replace("\r", " ").replace("\n", " ").replace("\t", " ") for text in ODD
    ]
    assert found["odd name"] == [str(n) for n in range(len(ODD))]


def test_csv_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write_table(pa.table({"text": ODD, "n": [None, *range(1, len(ODD))]}), tmp_path / "t.csv")
    found = read_table(tmp_path / "t.csv", None, "at").to_pydict()
    assert found["text"] == [text.replace("b\rc", "b\nc") for text in ODD] and found["n"][:2] == ["", "1"]
    write_table(pa.table({"text": ODD}), tmp_path / "t.csv")
    assert read_table(tmp_path / "t.csv", None, "at").num_rows == len(ODD)


OWN = ["devices", "phones", "values", "testimonials", "training_a", "Train", "latest", "VALUES2", "predictors", "validity"]
OTHERS = [
    "dev",
    "dev-2",
    "Validation_set",
    "val set (1)",
    "testset",
    "test.old",
    "testA",
    "TEST",
    "development",
    "predictions",
]


@pytest.mark.parametrize("name", OWN)
def test_a_file_whose_name_only_begins_like_a_split_holds_training_rows(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "books.csv", tickets(30))
    write(tmp_path / f"{name}.csv", tickets(30))
    rows = load_splits(settle(tmp_path), offline=True).rows
    assert len(rows["train"]) + len(rows["0.1"]) == 60
    listed = ", ".join(sorted(["books.csv", f"{name}.csv"]))
    assert f"files      training rows from {listed}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_is_named_after_a_split_is_left_out_and_told(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "books.csv", tickets(30))
    write(tmp_path / f"{name}.csv", tickets(12))
    rows = load_splits(settle(tmp_path), offline=True).rows
    assert sum(map(len, rows.values())) == (42 if name == "dev" else 30)
    unused = "" if name == "dev" else f"; not used: {name}.csv"
    assert f"files      training rows from books.csv{unused}\n" in capsys.readouterr().out


def test_a_validation_file_in_the_folder_holds_no_training_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "books.csv", tickets(30))
    write(tmp_path / "data" / "holdout.csv", tickets(12))
    rows = load_splits(settle(tmp_path / "data", "task.validation=data/holdout.csv"), offline=True).rows
    assert (len(rows["train"]), len(rows["validation"])) == (30, 12)


def test_files_beside_a_training_file_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train.csv", "extra.csv", "test.json"):
        write(tmp_path / name, tickets(30))
    settle(tmp_path)
    assert "files      training rows from train.csv; not used: extra.csv, test.json\n" in capsys.readouterr().out
