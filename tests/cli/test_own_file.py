"""The README's promise: a CSV file trains with no other key, and a second file is labelled. With the real MiniLM."""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import enter_main
from wlora.cli import predict, sweep, tables
from wlora.storage.records import RecordStore

WORDS = {
    "bug": ["It crashes", "The page fails", "Error, code 7", "It is broken"],
    "praise": ["Great work", 'I "love" it, really', "Thank you so much", "Very good"],
    "question": ["How do I\nstart", "Where is it", "Can you, please, help", "When does it open"],
}


def write(file: Path, rows: int, *, labels: bool) -> list[str]:
    """Write an unbalanced table with quotes, commas and line breaks; returns the classes."""
    draw = random.Random(rows)
    kinds = draw.choices(list(WORDS), [6, 3, 2], k=rows)
    with file.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.writer(stream, delimiter=";")
        writer.writerow(["id", "text", *(["category"] if labels else [])])
        for number, kind in enumerate(kinds):
            text = f"{draw.choice(WORDS[kind])}; {draw.choice(WORDS[kind])} ({number})"
            writer.writerow([number, text, *([kind] if labels else [])])
    return kinds


@pytest.mark.slow
def test_a_file_trains_and_a_second_one_is_labelled(
    run_main: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "FILE.csv", 240, labels=True)
    kinds = write(tmp_path / "new.csv", 30, labels=False)
    code, told, error = run_main("task=text_classification", "task.path=FILE.csv", "model=minilm")
    assert code == 0, error
    assert "<- predicted" in told and re.search(r"labels     bug \d+, praise \d+, question \d+", told)
    run_id = told[told.index("record ") :].split("records/")[1][:16]
    predict.main([run_id, "new.csv", "to=out.csv"])
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as stream:
        found = [row["prediction"] for row in csv.DictReader(stream)]
    assert sum(a == b for a, b in zip(found, kinds, strict=True)) > 24


def test_folds_are_runs_of_one_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, results = tmp_path / "t.csv", tmp_path / "r"
    file.write_text("text,label\n" + "".join(f"Anna left {n},{'ab'[n % 2]}\n" for n in range(30)))
    words = ["task=text_classification", f"task.path={file}", "model=tiny_bert", "method=lora", "train.max_steps=16"]
    words += ["task.validation=folds=3", f"results_dir={results}"]

    def counted() -> str:
        sweep.read_records.cache_clear()
        sweep.main([*words, "seed=0,1"])
        return capsys.readouterr().out

    assert "0 of 6 runs done" in counted()
    assert enter_main(monkeypatch, *words) == 0
    assert re.search(r"^folds      accuracy 0\.\d+, standard deviation 0\.\d+, over 3 folds$", capsys.readouterr().out, re.M)
    assert "3 of 6 runs done" in counted()
    assert sorted(record.config["task"]["fold"] for record in RecordStore(results)) == [0, 1, 2]
    tables.main(["summary", f"results_dir={results}", "model=tiny_bert"])
    assert re.search(r"\| t \| LoRA.* \| 0\.\d+ ± 0\.\d+ \(3\)", (results / "tables" / "summary.md").read_text())
