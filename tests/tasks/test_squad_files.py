"""Local files in SQuAD's schema: every format, and rows that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from tests.support.squad import NONE, find, make_config
from wlora.data.sources import load_splits
from wlora.errors import ConfigError

ROWS: list[dict[str, Any]] = [
    {"id": "a", "title": "t", "context": "Ann saw 2020.", "question": "Who?", "answers": find("Ann", "Ann saw 2020.")},
    {"id": "b", "title": "t", "context": "Ann saw 2020.", "question": "What?", "answers": find("2020", "Ann saw 2020.")},
    {"id": "c", "title": "t", "context": "Ann saw 2020.", "question": "Where?", "answers": NONE},
]


def write_both(folder: Path, rows: Any, suffix: str = "jsonl") -> str:
    for split in ("train", "validation"):
        file = folder / f"{split}.{suffix}"
        if suffix == "parquet":
            Dataset.from_list(rows).to_parquet(file)
        elif suffix == "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            file.write_text(json.dumps(rows))
    return str(folder)


def nest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return rows in the form in which SQuAD itself is distributed."""
    questions = [
        {
            "id": row["id"],
            "question": row["question"],
            "is_impossible": not row["answers"]["text"],
            "answers": [
                {"text": text, "answer_start": start}
                for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
            ],
        }
        for row in rows
    ]
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": rows[0]["context"], "qas": questions}]}]}


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json", "nested", "indented"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    nested = suffix in ("nested", "indented")
    folder = write_both(tmp_path, nest(ROWS) if nested else ROWS, "json" if nested else suffix)
    if suffix == "indented":
        for file in tmp_path.iterdir():
            file.write_text(json.dumps(json.loads(file.read_text()), indent=2))
    rows = load_splits(make_config(path=folder), offline=True).rows
    for split in ("train", "validation"):
        assert rows[split][:]["question"] == ["Who?", "What?", "Where?"]
        assert rows[split][:]["answers"] == [row["answers"] for row in ROWS]


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (0, {"context": None}, "row 0 has an empty context; expected is"),
        (0, {"question": 7}, "column question: row 1 has str; expected is int"),
        (1, {"answers": None}, "column answers: row 1 is empty"),
        (1, {"context": "", "answers": {"text": ["a"], "answer_start": [0]}}, "row 1 has an empty context; expected is"),
        (2, {"context": " \n"}, "row 2 has an empty context; expected is the text"),
        (1, {"answers": {"text": ["2020"], "answer_start": [13]}}, "row 1 has answer_start 13; allowed is 0 to 12"),
        (1, {"answers": {"text": ["2020"], "answer_start": [-5]}}, "row 1 has answer_start -5; allowed is 0 to 12"),
        (1, {"answers": {"text": ["2020"], "answer_start": [7]}}, "row 1 has the answer '2020' at 7, where .* ' 202'"),
        (1, {"answers": {"text": ["2020"], "answer_start": [11]}}, "row 1 has the answer '2020' at 11, where .* '0.'"),
        (1, {"answers": {"text": ["2020", "Ann"], "answer_start": [8]}}, "row 1 has 2 texts and 1 values of answer_start"),
        (2, {"answers": {"text": [" "], "answer_start": [3]}}, "row 2 has an answer without text"),
        (1, {"answers": {"text": ["2020"]}}, "row 1 is empty \\(null\\); expected are text and answer_start"),
        (1, {"answers": {"text": [None], "answer_start": [8]}}, "row 1 is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: int, changes: dict[str, Any], message: str) -> None:
    rows = [dict(known, **(changes if index == row else {})) for index, known in enumerate(ROWS)]
    with pytest.raises(ConfigError, match=message) as caught:
        load_splits(make_config(path=write_both(tmp_path, rows)), offline=True)
    assert str(caught.value).count("\n") <= 1 and "task.path=" in str(caught.value)


def test_a_question_without_an_answer_is_refused_where_all_have_one(tmp_path: Path) -> None:
    folder = write_both(tmp_path, ROWS)
    assert len(load_splits(make_config(path=folder), offline=True).rows["train"]) == 3
    with pytest.raises(ConfigError, match="row 2 has no answer; allowed where task.unanswerable=true"):
        load_splits(make_config(path=folder, unanswerable=False), offline=True)


def test_missing_columns_and_flat_answers_are_refused(tmp_path: Path) -> None:
    for name in ("context", "question", "answers"):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{key: value for key, value in row.items() if key != name} for row in ROWS]
        with pytest.raises(ConfigError, match=f"no column {name}"):
            load_splits(make_config(path=write_both(folder, rows)), offline=True)
    rows = [dict(row, answers=row["question"]) for row in ROWS]
    with pytest.raises(ConfigError, match="column answers: row 0 has the answer '.*', which is not in its context"):
        load_splits(make_config(path=write_both(tmp_path, rows)), offline=True)


def test_a_nested_file_that_is_not_squads_is_refused(tmp_path: Path) -> None:
    folder = write_both(tmp_path, {"data": [{"paragraphs": [{"qas": []}, 3]}]}, "json")
    with pytest.raises(ConfigError, match="not nested as SQuAD is"):
        load_splits(make_config(path=folder), offline=True)
