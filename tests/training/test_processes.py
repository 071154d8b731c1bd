"""Two processes on one run (gloo, on the CPU): the numbers of one process, one record, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.conftest import ROOT, TINY
from tests.support.outputs import losses
from tests.support.signals import holding, wait_until_held
from tests.support.two_processes import LONG, SETTING, SHARDED, STILL, STOPPED
from wlora import distributed as processes
from wlora.cli import job as jobs
from wlora.storage.records import Record, RecordStore

pytestmark = pytest.mark.slow

METHODS = ["wlora", "wlora_plus", "increlora", "lora_drop"]
# A launcher for GPUs; without any it starts the same processes on the CPU.
ACCELERATE = [
    "accelerate.commands.accelerate_cli",
    "launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--main_process_port",
    "0",
]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--module"]
ONE_FAILS = [*TORCHRUN, "tests.support.one_fails"]
SWEEP = ["-m", *TINY, "method=probe", "train.max_steps=4", "precision=fp32", "offline=true", "seed=0,1"]
TOLD = {
    "mistake": "error: task.path: this process cannot see the file",
    "fault": "error: this process cannot write",
    "disk": "error: file: Input/output error",
}
WHOLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def launch(*words: str, **environment: str) -> subprocess.Popen[str]:
    """Start `python -m words` in two processes under a launcher."""
    settings = {"OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        env={**os.environ, **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Run the methods in two processes, once for all tests here; returns the folder and what each process has seen."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two_processes"
    with FileLock(f"{folder}.lock"):  # pytest's own workers share it
        if not folder.is_dir():
            process = launch(*TORCHRUN, "tests.support.two_processes", str(folder), *METHODS)
            out, _ = process.communicate(timeout=600)
            assert process.returncode == 0, out
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def record_of(folder: Path, method: str) -> Record:
    (found,) = (record for record in RecordStore(folder) if record.config["method"]["name"] == method)
    return found


ENDING = """
import atexit, os
import torch
from wlora.distributed import leave

class Kept:
    def __del__(self, write=os.write): write(2, b"shutdown")

kept = Kept()
atexit.register(print, "exit function")
if {group}:
    torch.distributed.init_process_group("gloo", init_method="file://{store}", rank=0, world_size=1)
leave({code})
"""


@pytest.mark.parametrize("code", [0, 1])
@pytest.mark.parametrize("group", [True, False])
def test_with_a_process_group_the_interpreter_is_not_shut_down(group: bool, code: int, tmp_path: Path) -> None:
    script = ENDING.format(group=group, store=tmp_path / "store", code=code)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == code and ended.stdout == "exit function\n"
    assert ("shutdown" in ended.stderr) is not group


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_losses_and_adapters_of_one(
    method: str, both: tuple[Path, list[dict[str, Any]]], run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    folder, seen = both
    one = run_tiny(*SETTING, f"method={method}", *STILL)
    two = record_of(folder / "still", method)
    assert two.environment["processes"] == 2 and two.run_id == one.run_id and two.events
    assert losses(folder / "still", two.run_id) == pytest.approx(losses(tmp_path, one.run_id), rel=2e-4)
    assert two.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=2e-4)
    names = [(adapter["name"], adapter["rank"]) for adapter in one.adapters]
    for rank in range(2):
        assert [(a["name"], a["rank"]) for a in seen[rank][f"{method} still"]["adapters"]] == names
    assert two.throughput["tokens_per_second"] * two.seconds["train"] == pytest.approx(
        one.throughput["tokens_per_second"] * one.seconds["train"]
    )


@pytest.mark.parametrize("method", METHODS)
def test_after_a_cut_nothing_is_left_of_the_wrapper_around_the_whole(
    method: str, both: tuple[Path, list[dict[str, Any]]]
) -> None:
    assert [seen[f"{method} still"]["wrappers"] for seen in both[1]] == [1, 1]


@pytest.mark.parametrize("method", STOPPED)
def test_stopped_and_resumed_they_end_as_uninterrupted_with_dropout_of_their_own(
    method: str, both: tuple[Path, list[dict[str, Any]]]
) -> None:
    folder, seen = both
    whole, parts = record_of(folder / "whole", method), record_of(folder / "parts", method)
    assert parts.resumed_at == [8]
    assert (parts.metrics, parts.adapters, parts.events) == (whole.metrics, whole.adapters, whole.events)
    assert losses(folder / "parts", parts.run_id) == losses(folder / "whole", whole.run_id)
    streams = [seen[rank][f"{method} whole"]["stream"] for rank in range(2)]
    assert streams[0] != streams[1] and streams == [seen[rank][f"{method} parts"]["stream"] for rank in range(2)]


def test_with_the_base_in_pieces_lora_gives_the_losses_of_one_process_and_resumes(
    both: tuple[Path, list[dict[str, Any]]], run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = both
    one = run_tiny(*SHARDED, "dropout=0")
    (sharded,) = RecordStore(folder / "sharded")
    assert sharded.run_id == one.run_id and sharded.parameters == one.parameters
    assert losses(folder / "sharded", one.run_id) == pytest.approx(losses(tmp_path, one.run_id), rel=2e-4)
    assert sharded.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=2e-4)
    (parts,) = RecordStore(folder / "sharded_parts")
    assert parts.resumed_at == [8] and parts.metrics == pytest.approx(sharded.metrics, rel=1e-5)
    assert losses(folder / "sharded_parts", parts.run_id) == pytest.approx(losses(folder / "sharded", one.run_id))


def test_a_signal_to_the_launcher_stops_all_and_the_same_command_goes_on(
    both: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    words = [*ACCELERATE, "-m", "wlora.run", *LONG, f"results_dir={tmp_path}"]
    process = launch(*words, **holding(tmp_path / "held"))
    wait_until_held(process, tmp_path / "held", processes=2)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    (stopped,) = RecordStore(tmp_path)
    assert stopped.status == "interrupted" and "SIGTERM" in (stopped.error or ""), out
    again = launch(*words)
    told, _ = again.communicate(timeout=600)
    assert again.returncode == 0, told
    resumed, expected = record_of(tmp_path, "wlora"), record_of(both[0] / "long", "wlora")
    assert resumed.resumed_at and not expected.resumed_at and resumed.environment["processes"] == 2
    assert (resumed.metrics, resumed.adapters, resumed.events) == (expected.metrics, expected.adapters, expected.events)
    assert losses(tmp_path, resumed.run_id) == losses(both[0] / "long", expected.run_id)
    assert len(list(tmp_path.glob("records/*.json"))) == 1 and told.count("record     ") == 1


@pytest.mark.parametrize(("kind", "ranks"), [("mistake", "1"), ("fault", "1"), ("disk", "0")])
def test_a_fault_of_one_process_in_a_sweep_ends_all(kind: str, ranks: str, tmp_path: Path) -> None:
    process = launch(*ONE_FAILS, kind, ranks, *SWEEP, f"results_dir={tmp_path}")
    out, _ = process.communicate(timeout=600)  # gloo's own patience is half an hour
    assert process.returncode != 0 and TOLD[kind] in out
    assert "run 2 of 2" not in out
    assert "Traceback" not in out.partition("torch/distributed/elastic")[0], out


def test_a_mistake_that_all_processes_meet_costs_its_run_alone(tmp_path: Path) -> None:
    process = launch(*ONE_FAILS, "mistake", "01", *SWEEP, f"results_dir={tmp_path}")
    out, _ = process.communicate(timeout=600)
    assert "run 2 of 2" in out and process.returncode != 0, out
    (record,) = RecordStore(tmp_path)
    assert (record.status, record.config["seed"], record.environment["processes"]) == ("success", 1, 2)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 is in the environment without RANK"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is in the environment without RANK"),
        ({"RANK": "1"}, "RANK=1 is in the environment without LOCAL_RANK"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 is in the environment without MASTER_ADDR"),
        (WHOLE | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a non-negative integer"),
        (WHOLE | {"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
    ],
)
def test_what_is_left_of_another_launch_is_told_before_torch(
    given: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch, run_main: Callable[..., tuple[int, str, str]]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jobs, "run_one", None)  # which imports torch
    code, out, error = run_main(*TINY)
    way_out = f"or none: unset {' '.join(name for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE') if name in given)}\n"
    assert (code, out) == (2, "") and error.startswith(f"error: {told}") and error.endswith(way_out)
    assert error.count("\n") == 1


def test_the_end_of_another_process_is_told_from_other_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
    assert not processes.lost_another(gone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes.lost_another(gone) and not processes.lost_another(RuntimeError("mat1 and mat2 cannot be multiplied"))
