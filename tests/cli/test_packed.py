"""`hydra/launcher=packed` from the command line: what trains together, what alone, and what an end in the middle leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, TINY
from wlora.storage.records import Record, RecordStore
from wlora.training import pack as packing

PACKED = ["-m", "hydra/launcher=packed", *TINY, "precision=fp32", "offline=true"]
Main = Callable[..., tuple[int, str, str]]


def by_id(results: Path) -> dict[str, Record]:
    return {record.run_id: record for record in RecordStore(results)}


def test_runs_that_can_train_together_and_the_others_alone(run_main: Main, tmp_path: Path) -> None:
    words = [*PACKED, "method=lora,wlora,adalora", "lr=1e-3,3e-3", "k=3", "train.max_steps=16", f"results_dir={tmp_path}"]
    code, out, _ = run_main(*words, "pack=3")
    assert code == 0 and "packed     4 runs, 3 at once" in out
    assert out.count("(alone: method=adalora)") == 2
    records = by_id(tmp_path)
    assert {record.status for record in records.values()} == {"success"} and len(records) == 6
    for record in records.values():
        packed = record.config["method"]["name"] != "adalora"
        assert bool(record.packed) == packed
        assert not packed or {record.packed["dropout"]} == {"keyed"} and record.run_id not in record.packed["with"]
    assert "lr=0.001 method=lora     success" in out
    code, out, _ = run_main(*words)
    assert code == 0 and out.count(" is done: accuracy") == 6


def test_a_mistake_in_one_run_leaves_the_others(run_main: Main, tmp_path: Path) -> None:
    code, out, err = run_main(*PACKED, "method=wlora", "k=3,700", "train.max_steps=16", f"results_dir={tmp_path}")
    assert code == 2 and "k=700" in err + out and "Traceback" not in err
    assert [record.status for record in RecordStore(tmp_path)] == ["success"]


def test_a_packed_run_is_repeated_alone(run_main: Main, tmp_path: Path) -> None:
    words = [*PACKED, "method=lora,wlora", "k=3", "train.max_steps=16", "seed=0,1", f"results_dir={tmp_path}"]
    assert run_main(*words)[0] == 0
    record = next(r for r in RecordStore(tmp_path) if r.config["method"]["name"] == "wlora")
    run_main(f"from={record.run_id}", f"results_dir={tmp_path}")
    (again,) = RecordStore(tmp_path / "reruns")
    assert again.packed == {"dropout": "keyed", "with": []}
    assert again.metrics == pytest.approx(record.metrics, abs=1e-4)
    assert [a["name"] for a in again.adapters] == [a["name"] for a in record.adapters]


def test_a_signal_stops_all_runs_and_the_same_command_goes_on(
    run_main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = [*PACKED, "method=lora,wlora", "k=3", "lr=1e-3,3e-3", "train.max_steps=16"]
    assert run_main(*words, f"results_dir={tmp_path / 'whole'}")[0] == 0
    compute, steps = packing.Pack.compute, list[int]()

    def interrupt(self: packing.Pack, requests: Any) -> Any:
        steps.append(requests[0][0].step)
        if steps[-1] == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, requests)

    monkeypatch.setattr(packing.Pack, "compute", interrupt)
    code, _, err = run_main(*words, f"results_dir={tmp_path / 'parts'}", "pack=3")
    assert code == 143 and "SIGTERM after step 10" in err
    assert [record.status for record in RecordStore(tmp_path / "parts")] == ["interrupted"] * 3
    monkeypatch.setattr(packing.Pack, "compute", compute)
    assert run_main(*words, f"results_dir={tmp_path / 'parts'}")[0] == 0
    whole, parts = by_id(tmp_path / "whole"), by_id(tmp_path / "parts")
    assert whole.keys() == parts.keys() and sorted(len(r.resumed_at) for r in parts.values()) == [0, 1, 1, 1]
    for run_id, record in parts.items():
        assert record.metrics == pytest.approx(whole[run_id].metrics, abs=1e-4)


def losses(results: Path, run_id: str) -> list[float]:
    lines = (results / "records" / f"{run_id}.jsonl").read_text().splitlines()
    return [point["loss"] for point in map(json.loads, lines) if "loss" in point]


def start(*words: str) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-m", "tests.support.in_float64", *words], cwd=ROOT, env=env, stdout=quiet)


@pytest.mark.slow
def test_a_sweep_killed_three_times_ends_with_the_records_of_an_unkilled_one(tmp_path: Path) -> None:
    words = [*PACKED, "method=lora,wlora,wlora_plus,rlora", "rank=4", "k=3", "lr=1e-3,3e-3", "seed=0,1,2", "pack=8"]
    words += ["train.max_steps=20", "train.checkpoint_every=4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(*words, f"results_dir={whole}").wait(600) == 0
    for finished in (0, 8, 16):  # in each of the three packs, once checkpoints are there
        process = start(*words, f"results_dir={killed}")
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError):  # a folder that has just been removed
                done = len(list(killed.glob("records/*.parquet")))
                saved = {path.parent.parent for path in killed.glob("checkpoints/*/**/facts.json")}
                if done >= finished and len(saved) > 3:
                    process.kill()
            time.sleep(0.01)
        assert process.wait() == -signal.SIGKILL
    assert start(*words, f"results_dir={killed}").wait(600) == 0
    expected, found = by_id(whole), by_id(killed)
    assert expected.keys() == found.keys() and len(found) == 24
    assert sum(bool(record.resumed_at) for record in found.values()) >= 8
    for run_id, record in found.items():
        twin = expected[run_id]
        assert record.status == "success" and record.metrics == pytest.approx(twin.metrics, abs=1e-8)
        assert record.parameters == twin.parameters and len(record.events) == len(twin.events)
        assert [a["name"] for a in record.adapters] == [a["name"] for a in twin.adapters]
        assert losses(killed, run_id) == pytest.approx(losses(whole, run_id), abs=1e-8)
