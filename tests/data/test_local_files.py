"""Benchmarks of which no copy is at hand run from local files in the hub's schema, written by hand, up to the record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wlora.metrics.squad import UNANSWERABLE_METRICS

Row = dict[str, Any]
STORY = "Anna went to the library. Ben took the lamp."
PAIRS = [("Anna is in the library.", "Anna went to the library."), ("Ben took the lamp.", "Anna is in the garden.")]


def question(index: int, text: str, answer: str | None) -> Row:
    answers = {"text": [answer] if answer else [], "answer_start": [STORY.index(answer)] if answer else []}
    return {"id": f"q{index}", "title": "Story", "context": STORY, "question": text, "answers": answers}


SQUAD_V2 = [
    question(0, "Where is Anna?", "the library"),
    question(1, "Who took the lamp?", "Ben"),
    question(2, "Where is Clara?", None),
    question(3, "What did Ben take?", "the lamp"),
]
CNN = [
    {"article": f"{STORY} {PAIRS[i % 2][1]}", "highlights": f"{PAIRS[i % 2][0]}\n{PAIRS[1 - i % 2][0]}", "id": f"{i:040x}"}
    for i in range(4)
]
STSB = [{"sentence1": a, "sentence2": b, "label": 0.8 * i, "idx": i} for i, (a, b) in enumerate([*PAIRS, *PAIRS, PAIRS[0]])]
QQP = [{"question1": a, "question2": b, "label": i % 2, "idx": i} for i, (a, b) in enumerate([*PAIRS, *PAIRS])]


def write(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("task", "model", "rows", "metrics"),
    [
        ("squad_v2", "tiny_bert", SQUAD_V2, set(UNANSWERABLE_METRICS)),
        ("squad_v2", "tiny_bart", SQUAD_V2, set(UNANSWERABLE_METRICS)),
        ("cnn_dailymail", "tiny_bart", CNN, {"rouge1", "rouge2", "rougeL", "rougeLsum", "rouge1_low", "rouge1_high"}),
        ("stsb", "tiny_llama", STSB, {"pearson", "spearman", "corr"}),
        ("qqp", "tiny_llama", QQP, {"accuracy", "f1", "accuracy_f1"}),
    ],
)
def test_a_run_from_rows_written_by_hand(
    task: str, model: str, rows: list[Row], metrics: set[str], run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    folder = write(tmp_path / task, rows)
    words = [
        f"task={task}",
        f"model={model}",
        f"task.path={folder}",
        "task.batch_size=2",
        "train.max_steps=12",
        "task.epochs=9",
    ]
    lengths = {"squad_v2": ["task.max_length=64", "task.stride=16"], "cnn_dailymail": ["task.max_length=64"]}
    record = run_tiny(*words, *lengths.get(task, []), "task.generation.max_new_tokens=8", "method=wlora", "targets=all")
    assert record.status == "success" and metrics <= set(record.metrics)
    assert record.task["train_rows"] == len(rows) and record.task["lost_answers"] == 0
    assert record.task["truncated_share"] == {"train": 0, "validation": 0}


def test_the_best_threshold_stands_beside_the_default_one(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    folder = write(tmp_path / "squad", SQUAD_V2)
    words = [
        "task=squad_v2",
        f"task.path={folder}",
        "task.max_length=64",
        "task.stride=16",
        "method=full",
        "task.batch_size=4",
    ]
    found = run_tiny(*words, "train.max_steps=60", "lr=3e-3", "train.eval_every=60").metrics
    assert found["best_f1"] >= found["f1"] and found["best_exact"] >= found["exact"]
    assert found["exact"] == (3 * found["HasAns_exact"] + found["NoAns_exact"]) / 4
    assert {"best_f1_thresh", "best_exact_thresh"} <= set(found)


def test_the_record_has_the_share_of_every_split_and_the_answers_no_window_holds(
    run_tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {**CNN[0], "article": "Anna went to the garden. " * 20}
    folder = write(tmp_path / "cnn", [long, *CNN[1:]])
    (folder / "validation.jsonl").write_text(json.dumps(CNN[1]) + "\n")
    words = ["task=cnn_dailymail", "model=tiny_bart", f"task.path={folder}", "task.max_length=64", "method=lora"]
    record = run_tiny(*words, "train.max_steps=1", "task.generation.max_new_tokens=8")
    assert record.task["truncated_share"] == {"train": 0.25, "validation": 0}
    assert "notice: 25.0% of the rows of train are truncated: see task.max_length" in capsys.readouterr().out

    whole = question(4, "Where is Anna?", STORY[:-1])  # longer than any window
    folder = write(tmp_path / "squad", [*SQUAD_V2, whole])
    words = ["task=squad_v2", f"task.path={folder}", "task.max_length=16", "task.stride=2", "method=lora"]
    record = run_tiny(*words, "train.max_steps=1")
    assert record.task["lost_answers"] == 1
    assert "notice: 1 of 5 rows of train have an answer that fits in no window: see task.stride" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**SQUAD_V2[0], "context": ""}, "train.jsonl: column answers: row 4 has an empty context"),
        ({**SQUAD_V2[0], "answers": {"text": ["Ben"], "answer_start": [3]}}, "row 4 has the answer 'Ben' at 3, where"),
    ],
)
def test_bad_rows_end_with_one_line_before_any_weights(
    row: Row, message: str, tmp_path: Path, run_main: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wlora.experiment.shared_inputs.load_base", None)
    folder = write(tmp_path / "squad", [*SQUAD_V2, row])
    words = ["task=squad_v2", "model=minilm", f"task.path={folder}", "method=lora", f"results_dir={tmp_path / 'out'}"]
    code, _, errors = run_main(*words)
    assert code == 2 and len(errors.splitlines()) == 1
    assert errors.startswith(f"error: task.path={folder}: ") and message in errors
    assert not list((tmp_path / "out").rglob("*.*")), "neither a record nor a lock is left"
