"""The end of a run: checkpoints stay until all is on the disk; and the environments that had a part in it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wlora.experiment import saving
from wlora.storage.atomic_write import put, staged, write_whole
from wlora.storage.environment import join_environments, name_elsewhere
from wlora.storage.records import Record, RecordStore
from wlora.training.checkpoints import CheckpointStore
from wlora.training.interruption import Guard

SETTINGS = ["method=lora", "rank=4", "train.max_steps=8", "train.checkpoint_every=3", "train.eval_every=8"]
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name", "what"),
    [(saving, "write_adapter", "adapters"), (RecordStore, "write_predictions", "the predictions")],
)
def test_what_cannot_be_written_keeps_the_checkpoints_and_the_same_command_writes_it(
    owner: Any, name: str, what: str, run_tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run_tiny(*SETTINGS, results=tmp_path / "whole")

    def full(*given: Any, **named: Any) -> Any:
        raise FULL

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, full)
        record = run_tiny(*SETTINGS)
    out = capsys.readouterr().out
    assert record.status == "success" and what in (record.error or "") and "No space left" in out
    assert "notice: the checkpoints are kept; the same command continues from the last one" in out
    assert [path.name for path in tmp_path.glob("checkpoints/*/*")] == ["step-00000003", "step-00000006"]
    again = run_tiny(*SETTINGS)
    assert again.resumed_at == [6] and again.error is None and not (tmp_path / "checkpoints").exists()
    for key in ("metrics", "adapters", "curve", "predictions", "model"):
        assert getattr(again, key) == getattr(expected, key), key
    assert (tmp_path / "adapters" / record.run_id / "adapter_model.safetensors").is_file()


def test_without_checkpoints_what_could_not_be_written_is_told_again(
    run_tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*given: Any, **named: Any) -> Any:
        raise FULL

    monkeypatch.setattr(saving, "write_adapter", full)
    run_tiny(*SETTINGS, "train.checkpoint_every=0")
    assert "the checkpoints are kept" not in capsys.readouterr().out
    assert run_tiny(*SETTINGS, "train.checkpoint_every=0").status == "success"
    assert "No space left on device); an older folder and the run's record are kept: force=true" in capsys.readouterr().out


def test_all_is_on_the_disk_before_checkpoints_go(
    run_tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, int] = {}
    sync, remove, left = os.fsync, CheckpointStore.remove, list[str]()

    def watch(descriptor: int) -> None:
        stat = os.fstat(descriptor)
        synced[stat.st_ino] = stat.st_mtime_ns  # of a folder: its last entry
        sync(descriptor)

    def look(store: CheckpointStore) -> None:
        results = tmp_path
        for part in ("records", "adapters", "models"):
            for path in (results / part, *(results / part).rglob("*")):
                if synced.get(path.stat().st_ino) != path.stat().st_mtime_ns:
                    left.append(str(path))
        assert results.stat().st_ino in synced
        remove(store)

    monkeypatch.setattr(os, "fsync", watch)
    monkeypatch.setattr(CheckpointStore, "remove", look)
    run_tiny(*SETTINGS, "train.save_model=true")
    assert left == []


def test_a_folder_s_entry_that_cannot_be_made_durable_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "fsync", fail)
    fault = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path / "new" / "file", b"content")
    fault = errno.EINVAL  # a file system that cannot
    write_whole(tmp_path / "new" / "file", b"content")
    with staged(tmp_path / "folder") as staging:
        staging.mkdir()
        put(staging, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new"]


class Crash(Exception):
    """Stands for a process that dies."""


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch, run_tiny: Callable[..., Any]) -> Callable[..., None]:
    """Return a function that runs a setting, which dies after its fifth step."""

    def run(*words: str) -> None:
        def guard(self: Guard, trainer: Any) -> None:
            before(self, trainer)
            if trainer.step == 5:
                raise Crash

        before = Guard.__call__
        with monkeypatch.context() as patch:
            patch.setattr(Guard, "__call__", guard)
            with pytest.raises(Crash):
                run_tiny(*words)

    return run


def test_a_record_names_the_environments_of_all_its_parts(
    run_tiny: Callable[..., Any],
    crash: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads + 1))
        crash(*SETTINGS)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    record = run_tiny(*SETTINGS)
    out = capsys.readouterr().out
    assert "notice: the steps up to 3 were computed in another environment (" in out
    assert f"torch.threads {threads + 1} -> {threads}" in out and f"variables.OMP_NUM_THREADS {threads + 1}" in out
    (earlier,) = record.environment["earlier"]
    assert earlier["until"] == 3 and earlier["torch"]["threads"] == threads + 1 and "packages" in earlier
    assert record.environment["torch"]["threads"] == threads
    assert RecordStore(tmp_path).load(record.run_id) == record


def test_a_resume_where_the_run_began_names_no_other(
    run_tiny: Callable[..., Any], crash: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    crash(*SETTINGS)
    record: Record = run_tiny(*SETTINGS)
    assert record.resumed_at == [3] and "earlier" not in record.environment
    assert "another environment" not in capsys.readouterr().out


def test_environments_that_follow_each_other_unchanged_are_one() -> None:
    one, two = {"torch": {"threads": 1}, "overrides": ["a"]}, {"torch": {"threads": 2}, "overrides": []}
    past = [{"until": 3, **one}, {"until": 6, **one}, {"until": 9, **two}]
    assert join_environments(past, one) == [{"until": 6, **one}, {"until": 9, **two}]
    assert join_environments([{"until": 3, "git_commit": "a"}], {**one, "git_commit": "a"}) == []


def test_processes_whose_environment_is_not_the_main_one_s_are_named() -> None:
    main, other = {"device": "cuda:0", "processor": "A"}, {"device": "cuda:1", "processor": "A"}
    assert name_elsewhere([main, other]) == []
    assert name_elsewhere([main, other, main | {"processor": "B"}]) == [{"process": 2, "device": "cuda:0", "processor": "B"}]
