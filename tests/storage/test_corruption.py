"""Damaged records and curves: every reader says which file it is, and none counts what is left of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import compose
from tests.support.damage import KINDS, damage, flip
from tests.support.synthetic import make_record
from wlora.analysis.study_reader import read_runs, read_study
from wlora.analysis.tuning import fill_tuned
from wlora.cli import figures, tables
from wlora.cli.report import main as report
from wlora.errors import ConfigError
from wlora.experiment.export import find_record
from wlora.storage.records import Record, RecordStore
from wlora.storage.sealing import seal, unseal

GRID = {"1e-3": 0.6, "2e-3": 0.9, "3e-3": 0.7}
HOLDING = ["model=minilm", "task=sst2", "task.path=data"]


@pytest.fixture
def study(tmp_path: Path) -> list[Record]:
    """Write a grid of three learning rates, the second the best, each with its curve."""
    store, written = RecordStore(tmp_path), []
    for lr, score in GRID.items():
        record = make_record(tmp_path, "task=sst2", "method=lora", f"lr={lr}", metrics=score)
        curve = store.curve(record.run_id)
        for step in range(1, 6):
            curve({"step": step, "loss": 1 / (step + score)})
        curve({"step": 5, "epoch": 1.0, "metrics": record.metrics})
        record.curve = curve.checksum()
        store.write(record)
        written.append(record)
    return written


def best(study: list[Record], results: Path) -> tuple[Path, Path]:
    """Return the files of the best run: its record and its curve."""
    file = RecordStore(results).path(study[1].run_id)
    return file, file.with_suffix(".jsonl")


def test_no_cut_and_no_bit_of_a_record_goes_unseen(study: list[Record], tmp_path: Path) -> None:
    store, (file, _) = RecordStore(tmp_path), best(study, tmp_path)
    content = file.read_bytes()
    spoilt = [flip(content, place) for place in range(0, len(content), 5)]
    spoilt += [content[:length] for length in range(0, len(content), 11)]
    seen = 0
    for text in spoilt:
        file.write_bytes(text)
        try:
            assert store.load(file.stem) == study[1], "what was turned is no part of the content"
        except ConfigError as fault:
            assert str(fault).startswith(f"record {file} is damaged: ") and "\n" not in str(fault)
            seen += 1
    assert seen > 0.9 * len(spoilt)


def test_no_cut_and_no_bit_of_a_curve_goes_unseen(study: list[Record], tmp_path: Path) -> None:
    store, (_, file) = RecordStore(tmp_path), best(study, tmp_path)
    content = file.read_bytes()
    for text in [flip(content, place) for place in range(len(content))] + [content[:end] for end in range(len(content))]:
        file.write_bytes(text)
        with pytest.raises(ConfigError, match=f"learning curve {file} is damaged"):
            store.read_curve(study[1])


def test_a_record_of_before_there_were_checksums_is_read_while_it_is_one(study: list[Record], tmp_path: Path) -> None:
    file, _ = best(study, tmp_path)
    file.write_text(file.read_text().partition(',\n "checksum"')[0] + "\n}\n")
    assert "checksum" not in file.read_text() and len(read_runs(tmp_path)) == 3
    file.write_text(file.read_text().replace('"accuracy": 0.9', '"accuracz": 0.9').replace('"seed"', '"sead"'))
    runs, faults = read_study(tmp_path)
    assert len(runs) == 2 and faults[0].startswith(f"record {file} is damaged")


def test_a_record_under_another_name_is_not_taken(study: list[Record], tmp_path: Path) -> None:
    file, _ = best(study, tmp_path)
    file.rename(file.with_name("0123456789abcdef.json"))
    with pytest.raises(ConfigError, match=f"its run_id is {study[1].run_id}"):
        RecordStore(tmp_path).load("0123456789abcdef")


@pytest.mark.parametrize("kind", KINDS)
def test_tables_tuning_and_export_name_a_damaged_record(
    kind: str, study: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = best(study, tmp_path)
    config = compose(*HOLDING, "method=lora", "lr=tuned", f"results_dir={tmp_path}")
    choice = fill_tuned(config, task_data="d", model_data="m")
    assert choice is not None and choice.point[0] == 2e-3
    damage(file, kind)
    told = f"record {file} is "

    tables.main(["1", f"results_dir={tmp_path}", "model=minilm"])
    out, error = capsys.readouterr()
    assert [line for line in error.splitlines() if told in line] and "0.9000" not in out and "0.7000" in out

    config = compose(*HOLDING, "method=lora", "lr=tuned", f"results_dir={tmp_path}")
    with pytest.raises(ConfigError, match="lr=tuned: record .* so the best is not known\nway out: "):
        fill_tuned(config, task_data="d", model_data="m")

    with pytest.raises(ConfigError, match="no record of that name" if kind == "deleted" else told):
        find_record(str(tmp_path), file.stem)


@pytest.mark.parametrize("kind", KINDS)
def test_figures_name_a_damaged_curve(
    kind: str, study: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, file = best(study, tmp_path)
    damage(file, kind)
    with pytest.raises(SystemExit):
        figures.main(["curves", f"results_dir={tmp_path}"])
    error = capsys.readouterr().err
    told = "is missing" if kind == "deleted" else "is damaged: "
    assert f"notice: learning curve {file} {told}" in error and "no learning curve" in error


def test_the_report_tells_what_is_left_out(study: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(best(study, tmp_path)[0], "flipped")
    damage(RecordStore(tmp_path).path(study[2].run_id).with_suffix(".jsonl"), "halved")
    report([f"results_dir={tmp_path}"])
    error, page = capsys.readouterr().err, (tmp_path / "report.html").read_text()
    for file in (f"{study[1].run_id}.json", f"{study[2].run_id}.jsonl"):
        assert f"{file} is damaged" in error
    assert page.count(f"{study[1].run_id}.json is damaged") == 1
    assert "0.9000" not in page


def test_a_damaged_measurement_of_memory_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "memory").mkdir()
    file = tmp_path / "memory" / "m.json"
    content = seal({"model": "minilm", "points": [10]}).encode()
    file.write_bytes(flip(content, content.index(b"minilm")))
    with pytest.raises(ValueError, match="checksum"):
        unseal(file.read_bytes())
    with pytest.raises(SystemExit):
        figures.main(["memory", f"results_dir={tmp_path}"])
    assert f"{file} is damaged: its content does not match its checksum" in capsys.readouterr().err


def test_a_run_with_a_damaged_record_is_done_again(
    run_tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["method=probe", "train.max_steps=2"]
    first = run_tiny(*settings)
    file = RecordStore(tmp_path).path(first.run_id)
    curve = file.with_suffix(".jsonl").read_bytes()
    for kind in KINDS:
        damage(file, kind)
        capsys.readouterr()
        again = run_tiny(*settings)
        assert again.metrics == first.metrics and RecordStore(tmp_path).read(first.run_id) == again
        assert file.with_suffix(".jsonl").read_bytes() == curve
        assert (f"notice: record {file} is damaged" in capsys.readouterr().out) == (kind != "deleted")
    for kind in KINDS:
        file.with_suffix(".jsonl").write_bytes(curve)
        damage(file.with_suffix(".jsonl"), kind)
        run_tiny(*settings)
        out = capsys.readouterr().out
        told = "is missing" if kind == "deleted" else "is damaged"
        assert "is done" in out and f"notice: learning curve {file.with_suffix('.jsonl')} {told}" in out
