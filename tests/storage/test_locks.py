from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from wlora.errors import ConfigError, RunFault
from wlora.storage import locks
from wlora.storage.locks import RunLock
from wlora.storage.records import RecordStore
from wlora.training.interruption import Guard
from wlora.training.trainer import Trainer

HOLD = """
import sys
from wlora.storage.locks import RunLock
print(RunLock(sys.argv[1], "run").acquire(), flush=True)
sys.stdin.read()
"""


def start_holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    return process


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only those who wait move: nobody really sleeps, and a slow machine changes nothing."""
    now = time.monotonic()

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: now)


def test_one_process_holds_a_run_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    try:
        mine = RunLock(tmp_path, "run")
        assert not mine.acquire() and mine.holder().startswith(f"process {holder.pid} on ")
        assert RunLock(tmp_path, "another").acquire()
    finally:
        holder.kill()
        holder.wait()
    assert mine.acquire()
    mine.release()
    assert not mine.path.exists()


def test_a_silent_holder_on_another_machine_is_watched_and_then_taken_over(
    clock: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    first = RunLock(tmp_path, "run")
    assert first.acquire()
    told = first.path.read_text()
    first.release()
    first.path.write_text(told.replace(f"host={os.uname().nodename}", "host=elsewhere"))
    os.utime(first.path, (4e9, 4e9))  # of another machine's clock
    assert not RunLock(tmp_path, "run").acquire(), "it may be alive"
    os.utime(first.path, (1e9, 1e9))
    assert RunLock(tmp_path, "run").acquire()


def test_a_run_that_another_process_holds_is_left_to_it(
    run_tiny: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_tiny("method=lora", results=tmp_path)
    RecordStore(tmp_path).path(done.run_id).unlink()
    held = RunLock(tmp_path, done.run_id)
    assert held.acquire()
    assert run_tiny("method=lora", results=tmp_path).status == "running"
    assert f"{done.run_id} is skipped: process" in capsys.readouterr().out
    assert RecordStore(tmp_path).read(done.run_id) is None
    held.release()
    assert run_tiny("method=lora", results=tmp_path).metrics == done.metrics


def test_a_run_that_lost_its_lock_stops_and_writes_nothing_more(
    run_tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Guard.__call__

    def lose(self: Guard, trainer: Trainer) -> None:
        self.lock.lost = trainer.step == 5
        before(self, trainer)

    monkeypatch.setattr(Guard, "__call__", lose)
    with pytest.raises(RunFault, match="taken over"):
        run_tiny("method=lora", results=tmp_path)
    (record,) = RecordStore(tmp_path)
    assert record.status == "running", "the other process's to complete"


@pytest.mark.parametrize("content", [b"", b"\xff\x00garbage", b"x" * 5000, b"filelock/2\npid=1\nho"])
def test_a_damaged_lock_is_nobodys_after_a_while(content: bytes, clock: None, tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "run")
    lock.path.parent.mkdir()
    lock.path.write_bytes(content)
    os.utime(lock.path, (1e9, 1e9))
    assert "process" in lock.holder()
    assert lock.acquire()
    lock.release()


@pytest.mark.parametrize(("told", "damaged"), [("mode=lease", "mode=leasd"), ("duration=1.0", "duration=3.0")])
def test_a_lock_whose_damage_leaves_it_a_lock_is_named(
    told: str, damaged: str, clock: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    first = RunLock(tmp_path, "run")
    assert first.acquire()
    content = first.path.read_text().replace(told, damaged).replace(f"host={os.uname().nodename}", "host=elsewhere")
    first.release()
    first.path.write_text(content)
    os.utime(first.path, (1e9, 1e9))
    with pytest.raises(ConfigError, match=r"run\.lock is damaged\n.* remove it"):
        RunLock(tmp_path, "run").acquire()


def test_what_killed_processes_left_half_written_is_removed(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    done = run_tiny("method=probe", results=tmp_path)
    RecordStore(tmp_path).path(done.run_id).unlink()
    names = [f"{part}/.{done.run_id}.99" for part in ("models", "adapters")]
    names += [f"checkpoints/{done.run_id}/.step-00000004.99"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "part").write_text("half")
    (tmp_path / "records" / f".{done.run_id}.json.99").write_text("half")
    other = tmp_path / "models" / ".another.99"
    other.mkdir()
    assert run_tiny("method=probe", results=tmp_path).metrics == done.metrics
    left = [path for path in tmp_path.rglob(".*") if path.is_dir() or path.is_file()]
    assert left == [other], "another run's is not ours to remove"
