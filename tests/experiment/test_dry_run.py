"""A dry run describes the run: its training rows, its records, and once however many processes there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.conftest import TINY, RunMain, compose
from tests.support.own_tables import tickets, write
from wlora.cli import job, sweep
from wlora.data.held_out import hold_out
from wlora.data.sources import count_train_rows
from wlora.experiment import dry_run


@pytest.fixture(autouse=True)
def _unforeseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the estimate of memory, most of a dry run's time."""

    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(dry_run, "estimate", fail)


@pytest.mark.parametrize("validation", [["0.5"], ["0.1"], ["0.37"], ["folds=2"], ["folds=7"], ["validation"]])
@pytest.mark.parametrize("rows", [11, 12, 1001])
def test_the_rows_of_a_split_are_counted_as_they_are_held_out(validation: list[str], rows: int) -> None:
    task = compose("task=sst2", "model=tiny_bert").task
    task.validation, task.train_rows = validation, rows
    for task.fold in range(7) if validation == ["folds=7"] else [None]:
        counted = count_train_rows(task)
        table = pa.table({"label": np.arange(rows) % 2})
        whole = validation == ["validation"]
        kept = rows if whole else hold_out(table, table["label"].to_pylist(), task, "t")[0].num_rows
        assert counted == kept
        task.max_train_rows = 5
        assert count_train_rows(task) == 5
        task.max_train_rows = None


def test_a_task_of_the_hub_is_described_without_its_held_out_rows(run_main: RunMain, tmp_path: Path) -> None:
    words = ["task=sst2", "model=tiny_bert", "method=lora", f"results_dir={tmp_path}"]
    for more, rows in (("task.validation=0.5", 33_674), ("task.validation=folds=5", 53_879), ("task.max_train_rows=9", 9)):
        code, printed, error = run_main(*words, more, "dry_run=true")
        assert code == 0 and f"({rows:,} rows" in printed, printed + error
        (cell,) = sweep.survey([[*words, more]])
        assert sweep._rows(cell.config) == rows


def test_every_fold_is_listed_with_its_record(run_main: RunMain, tmp_path: Path) -> None:
    file = write(tmp_path / "t.csv", tickets())
    words = ["task=text_classification", f"task.path={file}", "model=tiny_bert", "method=lora", "task.validation=folds=2"]
    words += ["train.max_steps=1", f"results_dir={tmp_path}"]
    assert run_main(*words, "task.fold=1")[0] == 0
    (record,) = (path.stem for path in (tmp_path / "records").glob("*.json"))
    code, printed, _ = run_main(*words, "dry_run=true")
    lines = [line for line in printed.splitlines() if "fold " in line]
    assert code == 0 and lines[0].startswith("run        fold 0: ") and lines[0].endswith(" (no record yet)")
    assert lines[1:] == [f"           fold 1: {record} (record exists: success)"]
    assert f"run        {record} (record exists" in run_main(*words, "task.fold=1", "dry_run=true")[1]


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_only_the_main_process_prints(
    rank: str, times: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", rank)
    job.describe_run("", compose(*TINY, "method=lora", f"results_dir={tmp_path}"))
    assert capsys.readouterr().out.count("no record yet") == times


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_only_the_main_process_prints_the_mean_of_folds(
    rank: str,
    times: int,
    run_tiny: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = run_tiny("method=lora", "train.max_steps=1")
    monkeypatch.setattr("wlora.experiment.run.run", lambda *_: record)
    monkeypatch.setenv("RANK", rank)
    capsys.readouterr()
    outcome = job._run_folds("", compose(*TINY, "task.validation=folds=2"), [], 2)
    printed = capsys.readouterr().out
    assert outcome.status == "success" and printed.count("folds      accuracy") == printed.count("fold 1 of 2") == times
