"""Raced sweeps from the command line: rounds, pauses, kills, and runs that end as unraced ones do."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.conftest import TINY
from wlora.cli import racing
from wlora.cli.sweep import read_records, survey
from wlora.storage.records import Record, RecordStore
from wlora.training.interruption import Guard
from wlora.training.trainer import Trainer

Main = Callable[..., tuple[int, str, str]]
RATES = "lr=1e-4,1e-3,3e-3,1e-2"
SETTING = ["precision=fp32", "method=wlora", "k=2"]
UNRACED = [*(word for word in TINY if not word.startswith("lr=")), *SETTING]
GRID = [*UNRACED, RATES, "race=halving"]


@pytest.fixture(autouse=True)
def _records_are_read_afresh() -> None:
    read_records.cache_clear()


def records(results: Path) -> dict[float, Record]:
    return {record.config["lr"]: record for record in RecordStore(results)}


def result(record: Record) -> tuple[Any, ...]:
    return record.run_id, record.metrics, record.adapters, record.events, record.parameters


def test_a_race_stops_half_at_each_rung_and_its_winner_ends_as_without_a_race(
    run_main: Main, run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    sweep = ["-m", *GRID, f"results_dir={tmp_path / 'raced'}"]
    code, out, err = run_main(*sweep)
    assert code == 0, err
    assert re.findall("^race: .*", out, re.MULTILINE) == [
        "race: 4 runs to 1/8",
        "race: 2 runs to 1/4",
        "race: 1 run to the end",
    ]
    found = records(tmp_path / "raced")
    assert sorted(record.status for record in found.values()) == ["stopped"] * 3 + ["success"]
    (winner,) = (record for record in found.values() if record.status == "success")
    assert winner.resumed_at == [4, 8] and "earlier" not in winner.environment
    beaten = [record for record in found.values() if record.status == "stopped"]
    assert sorted(record.steps["stopped"] for record in beaten) == [4, 4, 8]
    assert all(not record.metrics and record.error for record in beaten)
    assert len(re.findall(r"^  \d  lr=\S+ +stopped +after step \d of 32", out, re.MULTILINE)) == 3

    alone = run_tiny(*SETTING, f"lr={winner.config['lr']}", results=tmp_path / "alone")
    assert result(winner) == result(alone)
    curves = [
        [json.loads(line) for line in (path / "records" / f"{alone.run_id}.jsonl").read_text().splitlines()]
        for path in (tmp_path / "raced", tmp_path / "alone")
    ]
    assert [point for point in curves[0] if point["step"] not in (4, 8) or "loss" in point] == curves[1]

    before = {path.name: path.read_bytes() for path in (tmp_path / "raced" / "records").iterdir()}
    code, out, err = run_main(*sweep)
    assert code == 0 and "race:" not in out and out.count("stopped") == 3, "decided, so nothing is run"
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "raced" / "records").iterdir()}


@pytest.mark.slow
def test_a_later_sweep_without_a_race_finishes_what_was_stopped(
    run_main: Main, run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    run_main("-m", *GRID, f"results_dir={tmp_path / 'raced'}")
    beaten = [record for record in records(tmp_path / "raced").values() if record.status == "stopped"]
    code, out, err = run_main("-m", *UNRACED, RATES, f"results_dir={tmp_path / 'raced'}")
    assert code == 0 and out.count("resumed    after step") == 3, err
    for before in beaten:
        record = records(tmp_path / "raced")[before.config["lr"]]
        alone = run_tiny(*SETTING, f"lr={before.config['lr']}", results=tmp_path / "alone")
        assert record.status == "success" and "stopped" not in record.steps and result(record) == result(alone)
    assert not (tmp_path / "raced" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", [2, 6, 9])
def test_a_race_that_is_killed_ends_as_one_that_is_not(
    moment: int, run_main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = ["-m", *GRID, "train.checkpoint_every=3"]
    run_main(*sweep, f"results_dir={tmp_path / 'whole'}")
    call, calls = Guard.__call__, 0

    def stop(guard: Guard, trainer: Trainer) -> None:
        nonlocal calls
        calls += trainer.step % 2
        if calls == moment:
            calls += 1
            os.kill(os.getpid(), signal.SIGTERM)
        call(guard, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Guard, "__call__", stop)
        code, _, _ = run_main(*sweep, f"results_dir={tmp_path / 'parts'}")
    assert code == 128 + signal.SIGTERM
    code, _, err = run_main(*sweep, f"results_dir={tmp_path / 'parts'}")
    assert code == 0, err
    parts, whole = records(tmp_path / "parts"), records(tmp_path / "whole")
    assert {rate: (record.status, result(record)) for rate, record in parts.items()} == {
        rate: (record.status, result(record)) for rate, record in whole.items()
    }
    for record in whole.values():
        name = f"records/{record.run_id}.jsonl"
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()


@pytest.mark.slow
def test_every_seed_and_setting_is_a_race_and_tuned_takes_the_winner(run_main: Main, tmp_path: Path) -> None:
    code, out, err = run_main("-m", *GRID, "k=1,2", "warmup=0,5", "lr=1e-3,1e-2", "seed=0,1", f"results_dir={tmp_path}")
    assert code == 0, err
    assert "race: 16 runs to 1/8" in out and "race: 8 runs to 1/4" in out and "race: 4 runs to the end" in out
    done = [record for record in RecordStore(tmp_path) if record.status == "success"]
    assert {(record.config["method"]["k"], record.config["seed"]) for record in done} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    code, out, err = run_main(*UNRACED, "lr=tuned", "warmup=tuned", "seed=0", f"results_dir={tmp_path}")
    (winner,) = (record.config for record in done if (record.config["method"]["k"], record.config["seed"]) == (2, 0))
    assert code == 0 and "best of 4 on story_nli seed=0" in out and "is done" in out, err
    assert f"lr={winner['lr']}" in out and f"warmup={winner['warmup']}" in out


@pytest.mark.slow
def test_survivors_refill_a_pack_and_end_as_in_a_pack_without_a_race(run_main: Main, tmp_path: Path) -> None:
    packed = ["hydra/launcher=packed", "pack=3"]
    code, out, err = run_main("-m", *packed, *GRID, f"results_dir={tmp_path / 'raced'}")
    assert code == 0 and "race: 2 runs to 1/4" in out, err
    found = records(tmp_path / "raced")
    assert sorted(record.status for record in found.values()) == ["stopped"] * 3 + ["success"]
    code, out, err = run_main("-m", *packed, *UNRACED, RATES, f"results_dir={tmp_path / 'unraced'}")
    (winner,) = (record for record in found.values() if record.status == "success")
    twin = records(tmp_path / "unraced")[winner.config["lr"]]
    assert code == 0 and winner.resumed_at == [4, 8], err
    assert [adapter["name"] for adapter in winner.adapters] == [adapter["name"] for adapter in twin.adapters]
    assert winner.metrics == pytest.approx(twin.metrics, abs=1e-4) and winner.run_id == twin.run_id


def test_the_dry_run_shows_a_race(run_main: Main, tmp_path: Path) -> None:
    words = [*GRID, f"results_dir={tmp_path}"]
    (cell,) = survey([words])
    assert (len(cell.done), len(cell.wanted), cell.seconds_left) == (0, 4, None)
    run_main("-m", *words)
    read_records.cache_clear()
    (cell,) = survey([words])
    assert (len(cell.done), cell.left, cell.seconds_left) == (4, 0, 0)
    # A rate more opens the race again: its run joins at the first rung, and 3 of 5 go on from there.
    (cell,) = survey([[*words, "lr=1e-4,1e-3,3e-3,1e-2,3e-2"]])
    assert cell.left >= 1 and cell.seconds_left is not None and 0 < cell.seconds_left < 2 * (cell.seconds or 0)
    (unraced,) = survey([[*words, "race=off"]])
    assert (len(unraced.done), unraced.left) == (1, 3)


def test_a_run_that_fails_leaves_its_race_to_the_others(
    run_main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._take_step

    def fail(trainer: Trainer, number: int, loss: Tensor) -> None:
        if trainer.settings.lr == 1e-3:
            raise OSError(28, "No space left on device", "file")
        if trainer.settings.lr == 3e-3 and number == 2:
            raise FloatingPointError("the loss is nan")
        step(trainer, number, loss)

    monkeypatch.setattr(Trainer, "_take_step", fail)
    code, out, err = run_main("-m", *GRID, f"results_dir={tmp_path}")
    assert code == 1 and "No space left" in err
    found = {rate: record.status for rate, record in records(tmp_path).items()}
    assert (found[1e-3], found[3e-3]) == ("failed", "diverged")
    assert sorted([found[1e-4], found[1e-2]]) == ["stopped", "success"]


@pytest.mark.slow
def test_runs_of_other_processes_are_waited_for(run_main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wlora.storage.locks import RunLock

    acquire, waits, held = RunLock.acquire, 0, True

    def wait(seconds: float) -> None:
        nonlocal waits, held
        waits, held = waits + 1, False

    monkeypatch.setattr(RunLock, "acquire", lambda lock: not held and acquire(lock))
    monkeypatch.setattr(racing, "sleep", wait)
    code, out, err = run_main("-m", *GRID, f"results_dir={tmp_path}")
    assert code == 0 and waits == 1 and out.count("is skipped: ") == 4, err
    assert sorted(record.status for record in records(tmp_path).values()) == ["stopped"] * 3 + ["success"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "race=halving", "force=true"], "force=true: allowed is false with race=halving"),
        (["-m", "race=halving", "train.until=0.5"], "train.until=0.5: allowed is 1.0 with race=halving"),
        (["-m", "race=halving,off"], "race: a sweep is raced as a whole: allowed is one value, halving or off"),
        (["-m", "race=halving", "hydra.sweeper.max_batch_size=2"], "allowed is hydra.sweeper.max_batch_size=null"),
        (["-m", "race=fast"], "race=fast: allowed is off | halving"),
        (["race=halving", "lr=1e-3"], "race=halving: allowed is off for a single run: a sweep (-m) is raced"),
        (["train.until=0", "lr=1e-3"], "train.until=0.0: allowed is float > 0, <= 1"),
    ],
)
def test_what_does_not_go_with_a_race_is_refused(words: list[str], said: str, run_main: Main, tmp_path: Path) -> None:
    code, out, err = run_main(*words, *UNRACED, *([RATES] if "-m" in words else []), f"results_dir={tmp_path}")
    assert code == 2 and said in err and all(len(part.splitlines()) <= 2 for part in err.split("error: ")), err
    assert not (tmp_path / "records").exists()


def test_a_share_of_a_run_is_trained_and_the_rest_later(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    part = run_tiny("train.until=0.3", "precision=fp32", results=tmp_path / "parts")
    assert (part.status, part.steps["stopped"], part.metrics) == ("stopped", 10, {})
    assert part.error == "after step 10 of 32 (train.until)"
    whole = run_tiny("precision=fp32", results=tmp_path / "parts")
    assert whole.resumed_at == [10] and result(whole) == result(run_tiny("precision=fp32", results=tmp_path / "whole"))
