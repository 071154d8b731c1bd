"""Checkpoints: written whole, believed only when whole, gone on from bit for bit; signals that stop a run in order."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, TINY, RunMain
from tests.support.damage import KINDS, damage, flip
from tests.support.signals import holding, wait_until_held
from wlora.errors import RunFault
from wlora.storage import atomic_write as staging
from wlora.storage.records import Record, RecordStore
from wlora.storage.sealing import seal, unseal
from wlora.training import checkpoints
from wlora.training.checkpoints import CheckpointStore
from wlora.training.interruption import Guard
from wlora.training.state import State
from wlora.training.trainer import Trainer

SETTINGS = ["method=wlora", "rank=4", "train.checkpoint_every=4", "train.eval_every=8"]
FILES = ("tensors.safetensors", "facts.json", "manifest.json")


class Crash(Exception):
    """Stands for a process that dies."""


def state(step: int) -> State:
    return State({"step": step, "seed": [1, 2.5, None]}, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(step)})


def store(folder: Path, **settings: Any) -> CheckpointStore:
    return CheckpointStore(folder, "run", **{"keep": 2, **settings})


def whole(found: CheckpointStore) -> list[int]:
    return [s.facts["step"] for _, s in found.read() if isinstance(s, State)]


def test_a_state_comes_back_as_it_was_and_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        store(tmp_path).write(state(step))
    assert whole(store(tmp_path)) == [9, 6]
    _, newest = next(store(tmp_path).read())
    assert isinstance(newest, State) and newest.facts == state(9).facts
    assert all(torch.equal(newest.tensors[name], value) for name, value in state(9).tensors.items())
    store(tmp_path).remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", FILES)
def test_a_broken_checkpoint_is_told_from_a_whole_one(file: str, tmp_path: Path) -> None:
    store(tmp_path).write(state(3))
    path = store(tmp_path).write(state(6)) / file
    content = path.read_bytes()
    spoilt = [flip(content, place) for place in range(len(content))] + [content[:end] for end in range(len(content))]
    seen = 0
    for text in spoilt:
        path.write_bytes(text)
        found = whole(store(tmp_path))
        assert found == [3] or (file == "manifest.json" and found == [6, 3]), "what no sum is of says nothing of the state"
        seen += found == [3]
    assert seen == len(spoilt) or (file == "manifest.json" and seen > 0.9 * len(spoilt))
    path.unlink()
    assert whole(store(tmp_path)) == [3]


def test_a_checkpoint_of_another_run_or_schema_is_neither_taken_nor_removed(tmp_path: Path) -> None:
    written = store(tmp_path).write(state(3))
    manifest = unseal((written / "manifest.json").read_text())
    other = written.parent.rename(tmp_path / "checkpoints" / "other")
    with pytest.raises(RunFault, match="has schema 1 and is of run run, not 1 and other; nothing was removed\nway out"):
        whole(CheckpointStore(tmp_path, "other", keep=2))
    (other / written.name / "manifest.json").write_text(seal(manifest | {"schema": 2, "run_id": "other"}))
    with pytest.raises(RunFault, match="has schema 2"):
        whole(CheckpointStore(tmp_path, "other", keep=2))


def test_a_manifest_from_before_it_had_a_checksum_is_read(tmp_path: Path) -> None:
    file = store(tmp_path).write(state(3)) / "manifest.json"
    file.write_text(json.dumps(unseal(file.read_text())))
    assert whole(store(tmp_path)) == [3]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize(("owner", "name"), [(checkpoints, "read_file"), (os, "listdir")])
def test_a_fault_that_may_pass_is_tried_again_and_is_no_damage(
    owner: Any, name: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path).write(state(3))
    store(tmp_path).write(state(6))
    monkeypatch.setattr(staging, "_PAUSES", (0, 0, 0))
    read, faults = getattr(owner, name), 99

    def fail(path: Any) -> Any:
        nonlocal faults
        if faults:
            faults -= 1
            raise OSError(number, os.strerror(number))
        return read(path)

    monkeypatch.setattr(owner, name, fail)
    told = f"cannot be read .{os.strerror(number)}.; nothing was removed\nway out: repeat the command"
    with pytest.raises(RunFault, match=told):
        whole(store(tmp_path))
    faults = 2
    assert whole(store(tmp_path)) == [6, 3]


def test_a_checkpoint_is_on_the_disk_with_all_the_entries_that_lead_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, sync = set[int](), os.fsync

    def watch(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    folder = store(tmp_path).write(state(3))
    assert {path.stat().st_ino for path in (folder.parent, folder, *folder.iterdir())} <= synced


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path).write(state(3))

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunFault, match="No space left"):
        store(tmp_path).write(state(6))
    assert whole(store(tmp_path)) == [3] and len(list((tmp_path / "checkpoints" / "run").iterdir())) == 1


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Return a function that makes runs die after a step, once that step's checkpoint is written; None: no more."""
    before = Guard.__call__

    def set_step(step: int | None) -> None:
        def guard(self: Guard, trainer: Trainer) -> None:
            before(self, trainer)
            if trainer.step == step:
                raise Crash

        monkeypatch.setattr(Guard, "__call__", guard)

    return set_step


def curve(results: Path) -> str:
    (file,) = (results / "records").glob("*.jsonl")
    return file.read_text()


def test_an_interrupted_run_ends_as_the_uninterrupted_one(
    run_tiny: Callable[..., Any], crash_at: Callable[[int | None], None], tmp_path: Path
) -> None:
    expected = run_tiny(*SETTINGS, results=tmp_path / "whole")
    crash_at(7)
    with pytest.raises(Crash):
        run_tiny(*SETTINGS, results=tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoints" / expected.run_id / "step-00000004").is_dir()
    crash_at(13)
    with pytest.raises(Crash):
        run_tiny(*SETTINGS, results=tmp_path / "parts")
    crash_at(None)
    record = run_tiny(*SETTINGS, results=tmp_path / "parts")
    assert record.resumed_at == [4, 12]
    assert (record.metrics, record.adapters, record.events) == (expected.metrics, expected.adapters, expected.events)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert not (tmp_path / "parts" / "checkpoints").exists(), "removed after success"


def test_whatever_breaks_the_newest_checkpoint_the_one_before_it_is_gone_on_from(
    run_tiny: Callable[..., Any],
    crash_at: Callable[[int | None], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = [*SETTINGS, "train.max_steps=16", "task.max_train_rows=64"]
    expected = run_tiny(*settings, results=tmp_path / "whole")
    crash_at(13)
    with pytest.raises(Crash):
        run_tiny(*settings, results=tmp_path / "crashed")
    crash_at(None)
    for file in FILES:
        for kind in KINDS:
            results = tmp_path / f"{file} {kind}"
            shutil.copytree(tmp_path / "crashed", results)
            (newest,) = results.glob("checkpoints/*/step-00000012")
            damage(newest / file, kind)
            record = run_tiny(*settings, results=results)
            assert record.status == "success" and record.resumed_at == [8], (file, kind)
            assert f"notice: checkpoint {newest} is damaged and skipped (" in capsys.readouterr().out
            assert (record.metrics, record.adapters, record.events) == (expected.metrics, expected.adapters, expected.events)
            assert curve(results) == curve(tmp_path / "whole")


def test_without_a_whole_checkpoint_a_run_starts_afresh_and_keeps_its_new_ones(
    run_tiny: Callable[..., Any],
    crash_at: Callable[[int | None], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = run_tiny(*SETTINGS, results=tmp_path / "whole")
    crash_at(13)
    with pytest.raises(Crash):
        run_tiny(*SETTINGS, results=tmp_path)
    for file in tmp_path.glob("checkpoints/*/*/facts.json"):
        damage(file, "halved")
    crash_at(5)
    with pytest.raises(Crash):
        run_tiny(*SETTINGS, results=tmp_path)
    assert "no checkpoint of this run is intact: it starts again from step 0" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("checkpoints/*/*")] == ["step-00000004"]
    crash_at(None)
    record = run_tiny(*SETTINGS, results=tmp_path)
    assert record.resumed_at == [4] and record.metrics == expected.metrics and curve(tmp_path) == curve(tmp_path / "whole")


def test_force_starts_afresh_and_checkpoints_stay_when_asked(
    run_tiny: Callable[..., Any], crash_at: Callable[[int | None], None], tmp_path: Path
) -> None:
    crash_at(9)
    with pytest.raises(Crash):
        run_tiny(*SETTINGS, results=tmp_path)
    crash_at(None)
    record = run_tiny(*SETTINGS, "force=true", "train.keep_after=true", results=tmp_path)
    assert record.resumed_at == []
    assert len(list(tmp_path.glob("checkpoints/*/step-*"))) == 2


def test_a_checkpoint_that_does_not_fit_the_code_is_refused(
    run_tiny: Callable[..., Any], crash_at: Callable[[int | None], None], tmp_path: Path
) -> None:
    crash_at(9)
    with pytest.raises(Crash):
        run_tiny(*SETTINGS, results=tmp_path)
    crash_at(None)
    (folder,) = tmp_path.glob("checkpoints/*")
    found = CheckpointStore(tmp_path, folder.name, keep=2)
    _, newest = next(found.read())
    assert isinstance(newest, State)
    del newest.facts["adapters"]
    found.write(newest)
    with pytest.raises(RunFault, match="force=true"):
        run_tiny(*SETTINGS, results=tmp_path)


def check_that_it_stopped(number: signal.Signals, code: int, error: str, results: Path) -> None:
    assert code == 128 + number, error
    (record,) = RecordStore(results)
    assert record.status == "interrupted" and number.name in (record.error or "")
    (folder,) = results.glob("checkpoints/*/step-*")
    step = json.loads((folder / "facts.json").read_text())["step"]
    assert f"after step {step}" in error and os.listdir(folder.parent) == [folder.name]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_ends_the_step_saves_and_says_so(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_main: RunMain
) -> None:
    before = Trainer._take_step

    def signalled(trainer: Trainer, step: int, loss: torch.Tensor) -> None:
        if step == 3:
            os.kill(os.getpid(), number)
        before(trainer, step, loss)

    monkeypatch.setattr(Trainer, "_take_step", signalled)
    words = [*TINY, "method=wlora", "rank=4", "train.checkpoint_every=0", f"results_dir={tmp_path}"]
    code, _, error = run_main(*words)
    check_that_it_stopped(number, code, error, tmp_path)


@pytest.mark.slow
def test_a_signal_from_another_process_stops_a_run(tmp_path: Path) -> None:
    words = [*TINY, "method=wlora", "rank=4", "train.checkpoint_every=0", f"results_dir={tmp_path}"]
    command, environment = [sys.executable, "-m", "wlora.run", *words], holding(tmp_path / "held")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until_held(process, tmp_path / "held")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=600)
    check_that_it_stopped(signal.SIGTERM, process.returncode, error, tmp_path)


def test_a_signal_in_the_last_evaluation_ends_the_sweep_after_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    evaluate = Trainer._evaluate

    def signalled(trainer: Trainer, step: int) -> dict[str, Any]:
        if step == trainer.plan.total_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(trainer, step)

    monkeypatch.setattr(Trainer, "_evaluate", signalled)
    code, _, error = run_main("-m", *TINY, "method=probe", "train.max_steps=4", "seed=0,1", f"results_dir={tmp_path}")
    assert code == 128 + signal.SIGTERM and "SIGTERM after step 4" in error
    (record,) = RecordStore(tmp_path)
    assert record.status == "success" and RecordStore(tmp_path).read_predictions(record) is not None


def test_an_interrupt_whose_record_cannot_be_written_still_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    write = RecordStore.write

    def full(store: RecordStore, record: Record) -> Path:
        if record.status == "interrupted":
            raise RunFault("the record cannot be written (No space left on device)")
        return write(store, record)

    monkeypatch.setattr(RecordStore, "write", full)

    def signalled(trainer: Trainer, step: int) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {"step": step}

    monkeypatch.setattr(Trainer, "_evaluate", signalled)
    words = ["-m", *TINY, "method=probe", "train.max_steps=4", "train.eval_every=1", "seed=0,1", f"results_dir={tmp_path}"]
    code, out, error = run_main(*words)
    assert code == 128 + signal.SIGTERM and "SIGTERM after step 1" in error
    assert "notice: the record cannot be written" in out and len(list(RecordStore(tmp_path))) == 1
