"""Sweeps whose runs a launcher carries to other processes: what comes back, what is requeued, what is refused."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.conftest import ROOT, TINY, RunMain, run_cli
from tests.support.signals import holding, wait_until_held
from wlora.cli.job import OUTCOMES, Outcome, Sweep
from wlora.cli.launching import Collecting
from wlora.config.schema import config_folder
from wlora.storage.records import RecordStore

pytestmark = pytest.mark.integration

# Those of other packages; `packed` is ours.
LAUNCHERS = sorted(file.stem for file in (config_folder() / "hydra" / "launcher").glob("*.yaml") if file.stem != "packed")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_composes_whether_or_not_it_is_installed(launcher: str, run_main: RunMain) -> None:
    code, out, error = run_main(f"hydra/launcher={launcher}", "--cfg", "hydra", "-p", "hydra.launcher")
    assert code == 0 and f"_{launcher.partition('_')[0]}_launcher." in out and error == ""


@pytest.mark.parametrize(("hardware", "precision"), [("v100", "fp16"), ("a100", "bf16")])
def test_hardware_chooses_the_precision_and_slurm(hardware: str, precision: str, run_main: RunMain) -> None:
    words = [f"hardware={hardware}", "hydra.launcher.partition=gpu", "--cfg"]
    launcher = run_main(*words, "hydra", "-p", "hydra.launcher")[1]
    assert all(text in launcher for text in ("SlurmLauncher", "partition: gpu", f"constraint: {hardware}"))
    assert f"precision: {precision}\n" in run_main(*words, "job")[1]


@pytest.mark.parametrize(("launcher", "extra"), [("joblib", "joblib"), ("submitit_slurm", "slurm"), ("ray", "ray")])
def test_a_launcher_that_is_not_installed_is_refused_in_a_line_with_its_extra(
    launcher: str, extra: str, run_main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def hide(name: str, *rest: Any) -> Any:
        return None if name.startswith("hydra_plugins.hydra_") else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", hide)
    code, _, error = run_main("-m", f"hydra/launcher={launcher}", "task=story_nli", "model=tiny_bert", "seed=0,1")
    assert code == 2, error
    assert error == f"error: hydra/launcher={launcher}: its plugin is not installed: pip install 'wlora[{extra}]'\n"


def test_a_process_that_is_lost_does_not_pass_for_a_run_that_went_well() -> None:
    from wlora.errors import RunFault

    class Killed(Exception):
        """As joblib's and submitit's own."""

    class Launcher:
        def launch(self, job_overrides: object, initial_job_idx: int) -> list[object]:
            raise Killed("a worker was killed\nby the system")

    OUTCOMES.outcomes = [Outcome("before", "success", 1.0, 0)]
    with pytest.raises(RunFault, match="launcher=some: Killed: a worker was killed\n.*repeat the command"):
        Collecting(Launcher(), "some", Sweep(frozenset()), lambda _: OmegaConf.create()).launch([["seed=0"]], 0)


@pytest.mark.slow
def test_joblib_runs_a_sweep_in_other_processes_and_brings_back_how_it_went(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    done = run_cli("-m", "hydra/launcher=joblib", *TINY, "method=lora", "seed=-1,0,1", f"results_dir={tmp_path}")
    assert done.returncode == 2, "of a sweep the highest exit code"
    assert [record.status for record in RecordStore(tmp_path)] == ["success"] * 2
    summary = done.stdout.partition("\nsweep:\n")[2].splitlines()
    assert summary[0] == "  1  seed=-1  ConfigError seed=-1: allowed is int >= 0"
    assert [line.split()[:3] for line in summary[1:]] == [["2", "seed=0", "success"], ["3", "seed=1", "success"]]
    headings = sorted(line for line in done.stdout.splitlines() if line.startswith("run "))
    assert headings == ["run 1 of 3: seed=-1", "run 2 of 3: seed=0", "run 3 of 3: seed=1"], "time left is not known here"


@pytest.mark.slow
def test_a_job_of_submitit_that_is_preempted_is_requeued_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = [*TINY, "method=wlora", "rank=4", "train.checkpoint_every=0", f"results_dir={tmp_path / 'results'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "wlora.run", "-m", "hydra/launcher=submitit_local", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=holding(tmp_path / "held"),
    )
    (job,) = wait_until_held(process, tmp_path / "held")
    os.kill(job, signal.SIGUSR2)
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    (record,) = RecordStore(tmp_path / "results")
    assert record.status == "success" and record.resumed_at == [5]
    printed = "".join(file.read_text() for file in (tmp_path / "results").glob("sweeps/.submitit/*/*_log.out"))
    assert "SIGUSR2: stopping after this step" in printed and "resumed    after step 5" in printed
    assert out == "", "one run has no summary, and its own words are in submitit's log"
