"""`wlora predict`: new rows get the labels that the trained run gives, and GLUE's server its files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wlora.cli import predict
from wlora.storage.records import RecordStore

PLACES = ("library", "school", "museum")
LABELS = ("bug", "praise", "question")


def table(file: Path, number: int, *, labels: bool = True) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "text", *(["kind"] if labels else [])])
        for row in range(number):
            text = f'Anna, "Ben" went\nto the {PLACES[row % 3]}.'
            writer.writerow([row, text, *([LABELS[row % 3]] if labels else [])])
    return file


@pytest.fixture
def trained(run_tiny: Callable[..., Any], tmp_path: Path) -> Any:
    """A run on an own table, whose validation rows are a file."""
    words = ["task=text_classification", f"task.path={table(tmp_path / 'train.csv', 90)}", "precision=fp32", "lr=1e-2"]
    return run_tiny(
        *words, f"task.validation={table(tmp_path / 'dev.csv', 21)}", "method=lora", "targets=all", "task.epochs=12"
    )


def ask(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    """Call the command; returns exit code, output and errors."""
    code = 0
    capsys.readouterr()  # what the run has told
    try:
        predict.main([str(word) for word in words])
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_new_rows_get_the_labels_of_the_run(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, out = table(tmp_path / "new.csv", 21, labels=False), tmp_path / "out" / "labelled.csv"
    code, told, error = ask(capsys, trained.run_id, new, f"to={out}", f"results_dir={tmp_path}")
    assert (code, error) == (0, "") and told.strip() == str(out)
    rows = read(out)
    assert [row["text"] for row in rows] == [row["text"] for row in read(new)], "the rows as they were"
    recorded = RecordStore(tmp_path).read_predictions(trained)
    assert recorded is not None and len(set(recorded["prediction"].to_pylist())) > 1, "the run has learnt something"
    assert [row["prediction"] for row in rows] == [LABELS[number] for number in recorded["prediction"].to_pylist()]
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in rows)
    code, _, _ = ask(capsys, trained.run_id, tmp_path / "dev.csv", f"to={tmp_path / 'o.parquet'}", f"results_dir={tmp_path}")
    assert code == 0 and pq.read_table(tmp_path / "o.parquet").column_names == [
        "id",
        "text",
        "kind",
        "prediction",
        "probability",
    ]


def test_requests_that_cannot_be_met_are_told(trained: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, other = table(tmp_path / "new.csv", 3), tmp_path / "other.csv"
    other.write_text("body\nx\n")
    (tmp_path / "empty.csv").touch()
    run, results = trained.run_id, f"results_dir={tmp_path}"
    for words, part in (
        ([run, new, f"to={new}", results], "a file other than the input file"),
        ([run, new, results], "to is missing"),
        ([run, new, f"to={tmp_path / 'a.xlsx'}", results], "a file of type parquet, json"),
        ([run, tmp_path / "no.csv", f"to={tmp_path / 'a.csv'}", results], "does not exist"),
        ([run, tmp_path / "empty.csv", f"to={tmp_path / 'a.csv'}", results], "the file is empty"),
        ([run, other, f"to={tmp_path / 'a.csv'}", results], "other.csv: no column text\nthere is: body"),
        ([run, f"to={tmp_path / 'a.csv'}", results], "allowed is RUN_ID FILE to=OUT.csv"),
        ([run, "split=test", f"to={tmp_path / 'a.csv'}", results], "is a file: expected is a folder with test."),
        ([run, new, f"to={tmp_path / 'a.csv'}", "tO=b", results], "tO is unknown"),
    ):
        code, _, error = ask(capsys, *words)
        assert code == 2 and part in error and len(error.splitlines()) <= 2, error
    assert not (tmp_path / "a.csv").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["method=lora", "train.save_adapter=false"], "trained with train.save_adapter=false"),
        (["method=full"], "method=full has saved no adapters\nway out: repeat the run with train.save_model=true"),
    ],
)
def test_a_run_that_has_kept_nothing_is_told(
    words: list[str], part: str, run_tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = table(tmp_path / "t.csv", 30)
    record = run_tiny("task=text_classification", f"task.path={file}", "train.max_steps=16", *words)
    code, _, error = ask(capsys, record.run_id, file, f"to={tmp_path / 'o.csv'}", f"results_dir={tmp_path}")
    assert code == 2 and part in error and len(error.splitlines()) <= 2


def test_a_saved_model_predicts_as_the_run_did(
    run_tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, dev = table(tmp_path / "t.csv", 60), table(tmp_path / "dev.csv", 15)
    words = ["task=text_classification", f"task.path={file}", f"task.validation={dev}", "task.labels=[question,bug,praise]"]
    record = run_tiny(*words, "method=full", "train.save_model=true", "precision=fp32", "task.epochs=1")
    assert ask(capsys, record.run_id, dev, f"to={tmp_path / 'o.jsonl'}", f"results_dir={tmp_path}")[0] == 0
    found = [json.loads(line)["prediction"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    recorded = RecordStore(tmp_path).read_predictions(record)
    assert recorded is not None
    assert found == [("question", "bug", "praise")[number] for number in recorded["prediction"].to_pylist()]


COLUMNS = {"cola": ["sentence"], "stsb": ["sentence1", "sentence2"], "rte": ["sentence1", "sentence2"]}
COLUMNS |= {"mnli": ["premise", "hypothesis"]}
FILES = {"cola": ["CoLA"], "stsb": ["STS-B"], "rte": ["RTE"], "mnli": ["MNLI-m", "MNLI-mm", "AX"]}
WORDS = {"cola": {"0", "1"}, "rte": {"entailment", "not_entailment"}, "mnli": {"entailment", "neutral", "contradiction"}}


def glue_folder(folder: Path, task: str) -> Path:
    folder.mkdir()
    splits = ["validation", "test"]
    if task == "mnli":
        splits = ["validation_matched", "validation_mismatched", "test_matched", "test_mismatched", "ax"]
    for split in ["train", *splits]:
        labels = [-1] * 9 if "test" in split or split == "ax" else [row % 2 for row in range(9)]
        texts = [f"Anna went to the {PLACES[row % 3]}." for row in range(9)]
        pq.write_table(pa.table({**dict.fromkeys(COLUMNS[task], texts), "label": labels}), folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize("task", FILES)
def test_files_of_the_glue_server(
    task: str, run_tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = glue_folder(tmp_path / task, task)
    record = run_tiny(f"task={task}", f"task.path={folder}", "train.max_steps=16", "method=lora")
    code, told, error = ask(capsys, record.run_id, "split=test", f"to={tmp_path / 'glue'}", f"results_dir={tmp_path}")
    assert code == 0, error
    assert told.split() == [str(tmp_path / "glue" / f"{name}.tsv") for name in FILES[task]]
    for name in FILES[task]:
        lines = (tmp_path / "glue" / f"{name}.tsv").read_text().splitlines()
        assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == [str(n) for n in range(9)]
        found = {line.split("\t")[1] for line in lines[1:]}
        assert found <= WORDS[task] if task != "stsb" else all(0 <= float(value) <= 5 for value in found)


def test_a_missing_diagnostic_set_is_told_and_the_others_are_written(
    run_tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = glue_folder(tmp_path / "mnli", "mnli")
    (folder / "ax.parquet").unlink()
    record = run_tiny("task=mnli", f"task.path={folder}", "train.max_steps=16", "method=lora")
    code, told, _ = ask(capsys, record.run_id, "split=test", f"to={tmp_path}", f"results_dir={tmp_path}")
    assert code == 0 and "notice: AX.tsv is not written" in told and (tmp_path / "MNLI-mm.tsv").exists()


@pytest.mark.parametrize(
    ("task", "rows", "words"),
    [
        ("question_answering", {"question": "Who left?", "context": "Anna left.", "answer": "Anna"}, ["model=tiny_bert"]),
        ("summarization", {"document": "Anna left. Ben went.", "summary": "Anna left."}, ["model=tiny_bart"]),
        ("text_regression", {"text": "Anna left.", "score": 1.5}, []),
        ("multi_label", {"text": "Anna left.", "labels": ["a", "b"]}, []),
        ("token_classification", {"tokens": ["Anna", "left"], "tags": ["B-X", "O"]}, []),
    ],
)
def test_every_kind_of_task_predicts_rows_without_labels(
    task: str,
    rows: dict[str, Any],
    words: list[str],
    run_tiny: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, new = tmp_path / "t.jsonl", tmp_path / "new.jsonl"
    other = {"score": 2.5} if "score" in rows else {}  # a column of one value is refused
    file.write_text("".join(json.dumps(rows | (other if at % 2 else {})) + "\n" for at in range(20)))
    target = list(rows)[-1]
    new.write_text(
        "".join(json.dumps({key: value for key, value in rows.items() if key != target}) + "\n" for _ in range(3))
    )
    record = run_tiny(f"task={task}", f"task.path={file}", "task.max_length=64", *words, "method=lora", *_small(task))
    out = tmp_path / "out.jsonl"
    code, _, error = ask(capsys, record.run_id, new, f"to={out}", f"results_dir={tmp_path}")
    assert code == 0, error
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(answers) == 3 and all("prediction" in answer and target not in answer for answer in answers)


@pytest.mark.parametrize(
    ("words", "kind"), [(["task.max_eval_rows=null"], "csv"), (["task=story_qa"], "jsonl"), (["task=story_qa"], "csv")]
)
def test_the_rows_of_a_generated_task_are_generated(
    words: list[str], kind: str, run_tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run_tiny(*words, "method=lora", "train.max_steps=1", "precision=fp32")
    out, there = tmp_path / f"out.{kind}", f"results_dir={tmp_path}"
    code, _, error = ask(capsys, record.run_id, "split=validation", f"to={out}", there)
    assert code == 0, error
    recorded = RecordStore(tmp_path).read_predictions(record)
    assert recorded is not None
    found = [json.loads(line) for line in out.read_text().splitlines()] if kind == "jsonl" else read(out)
    names, expected = record.config["task"]["labels"], recorded["prediction"].to_pylist()
    rows = [row["prediction"] for row in found][: len(expected)]
    assert rows == [names[number] if names else number for number in expected]
    code, _, error = ask(capsys, record.run_id, "split=test", f"to={out}", there)
    assert code == 2 and error.endswith("split is unknown\nallowed: train, validation\n"), error


def _small(task: str) -> list[str]:
    small = ["train.max_steps=16", "task.batch_size=4"]
    small += ["task.stride=8"] if task == "question_answering" else []
    return small + (["task.generation.max_new_tokens=4", "targets=all"] if task == "summarization" else [])
