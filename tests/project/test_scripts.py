"""The table scripts: what they ask for is legal, in the right order, and a failed run does not stop them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from wlora.config.schema import config_folder

pytestmark = pytest.mark.integration

TABLES = [
    name
    for name in "123456"
    # The protocols of Tables 3 to 5 belong to their models and tasks.
    if (config_folder() / "experiment" / f"table{name}.yaml").is_file()
]


def run_script(name: str, *words: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a table script; `path` goes before the others, so that its `python` is called."""
    bin_folder = Path(sys.executable).parent
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{path or bin_folder}:{bin_folder}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / f"{name}.sh"), *words],
        capture_output=True,
        text=True,
        env={**env, **environment},
        timeout=300,
    )


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A folder whose `python` writes down its arguments and ends with $CODE, if they contain $ONLY."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(
        f'#!/bin/sh\necho "GPU=$CUDA_VISIBLE_DEVICES $*" >> {tmp_path}/calls\n'
        'case "$*" in *"$ONLY"*) exit ${CODE:-0} ;; esac\n'
    )
    (folder / "python").chmod(0o755)
    return folder


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize("name", TABLES)
def test_every_sweep_of_a_script_is_legal(name: str, tmp_path: Path) -> None:
    done = run_script(f"table{name}", DRY="1", RESULTS=str(tmp_path), TASKS="rte squad_v1 xsum")
    assert done.returncode == 0, done.stderr
    *cells, total = done.stdout.splitlines()
    # Methods by K, ranks and tasks; runs of a grid of 3 and 5 seeds, or of 10, 5 more warm-ups (Llama: 3) and 5 seeds.
    expected = {"1": (12, 8), "2": (12, 20), "3": (12, 18), "4": (12, 19), "5": (12, 19), "6": (6, 8)}[name]
    assert (len(cells), total.split()[2]) == (expected[0], str(expected[0] * expected[1])), done.stdout
    assert not list(tmp_path.iterdir())


def test_words_for_every_sweep_may_be_of_keys_that_some_methods_do_not_read(tmp_path: Path) -> None:
    words = ["rank=4", "k=5", "targets=attention"]
    done = run_script("table1", *words, DRY="1", RESULTS=str(tmp_path), TASKS="rte", METHODS="full lora wlora")
    assert done.returncode == 0, done.stderr
    *cells, total = done.stdout.splitlines()
    assert len(cells) == 3 and total.startswith("0 of 24 runs"), done.stdout
    assert "method=lora rank=4 targets=attention:" in done.stdout and "method=wlora rank=4 k=5 targets=att" in done.stdout


@pytest.mark.slow
def test_the_printed_protocol_and_the_releases_targets_are_legal(tmp_path: Path) -> None:
    for name, options in (
        ("table1", {"PROTOCOL": "printed"}),
        ("table6", {"PROTOCOL": "printed"}),
        ("table2", {"TARGETS": "release"}),
    ):
        done = run_script(name, DRY="1", RESULTS=str(tmp_path), TASKS="rte", **options)
        assert done.returncode == 0, done.stderr
        assert "TARGETS" not in options or "targets=release" in done.stdout


@pytest.mark.parametrize("name", ["table1", pytest.param("table6", marks=pytest.mark.slow)])
def test_the_small_study_is_legal(name: str, tmp_path: Path) -> None:
    done = run_script(name, DRY="1", SCALE="cpu", RESULTS=str(tmp_path), METHODS="lora wlora rlora")
    assert done.returncode == 0, done.stderr
    # Four rates, and five seeds at the best of them.
    assert "task=mrpc model=minilm method=wlora rank=8 k=3 targets=qkv: 0 of 9 runs" in done.stdout
    assert "task=sst2 model=minilm method=wlora rank=8 k=5 targets=qkv: 0 of 9 runs" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cell", "runs"),
    [
        ("table2", "task=mrpc model=minilm method=wlora rank=1 k=10 targets=all: 0 of 7 runs", 84),
        ("table3", "task=sst2 model=smollm2_135m method=wlora rank=4 k=100 targets=all: 0 of 7 runs", 42),
        ("table4", "task=squad_v1 model=minilm method=lora rank=1 targets=all: 0 of 3 runs", 30),
    ],
)
def test_the_other_small_studies_are_legal(name: str, cell: str, runs: int, tmp_path: Path) -> None:
    done = run_script(name, DRY="1", SCALE="cpu", RESULTS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert cell in done.stdout and f"0 of {runs} runs done" in done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scale", "runs"),
    [
        ("k_curve", "cpu", 48),
        ("depth_curve", "cpu", 90),
        ("k_curve", "paper", 260),
        ("prefix_cache", "cpu", 10),
        ("depth_curve", "paper", 300),
    ],
)
def test_the_studies_beyond_the_tables_are_legal(name: str, scale: str, runs: int, tmp_path: Path) -> None:
    done = run_script(name, DRY="1", SCALE=scale, RESULTS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"0 of {runs} runs done" in done.stdout.splitlines()[-1]


def test_stages_follow_each_other_and_the_table_comes_last(recorder: Path, tmp_path: Path) -> None:
    done = run_script("table1", "precision=fp16", path=recorder, TASKS="rte mrpc", METHODS="lora", JOBS="2", GPUS="2")
    assert done.returncode == 0, done.stderr
    found = calls(tmp_path)
    setting = "method=lora experiment=table1 train.max_steps=512"
    assert sorted(found[:2])[0].startswith("GPU=0 -m wlora.run -m results_dir=results/paper_study task=")
    assert {re.sub(r"GPU=. .*task=(\w+)  ?", r"\1 ", line) for line in found[:2]} == {
        f"{task} {setting} seed=100 precision=fp16" for task in ("rte", "mrpc")
    }
    assert all(f"{setting} lr=tuned seed=range(5) precision=fp16" in line for line in found[2:4])
    assert {line[:5] for line in found[:4]} <= {"GPU=0", "GPU=1"}
    assert found[4].endswith("-m wlora.tables 1 model=deberta_v3_base train.max_steps=512 results_dir=results/paper_study")
    assert len(found) == 5


def test_only_tuning_sweeps_are_raced(recorder: Path, tmp_path: Path) -> None:
    run_script("table1", path=recorder, TASKS="rte", METHODS="lora", RACE="1", TUNE_SEED="10")
    grid, seeds, _ = calls(tmp_path)
    assert " seed=10 race=halving train.keep=1" in grid and "seed=range(5)" in seeds and "race" not in seeds
    done = run_script("table1", DRY="1", SCALE="cpu", RACE="1", RESULTS=str(tmp_path), TASKS="sst2", METHODS="lora")
    first, second, total = done.stdout.splitlines()
    assert "0 of 4 runs done or eliminated in a race" in first and "0 of 5 runs done," in second and "0 of 9" in total


def test_local_data_are_passed_on(recorder: Path, tmp_path: Path) -> None:
    run_script("table6", path=recorder, TASKS="rte", METHODS="rlora", DATA="data", RESULTS="here")
    assert "results_dir=here task=rte task.path=data/rte method=rlora experiment=table6 k=1,5,10" in calls(tmp_path)[0]


@pytest.mark.parametrize(("code", "number", "ends"), [("1", 3, 0), ("2", 1, 2), ("130", 1, 124)])
def test_failed_runs_leave_gaps_and_mistakes_end_the_study(
    recorder: Path, tmp_path: Path, code: str, number: int, ends: int
) -> None:
    done = run_script("table1", path=recorder, TASKS="rte", METHODS="lora", CODE=code)
    assert len(calls(tmp_path)) == number
    # The table itself (the stand-in fails there too) is the script's exit code, if it comes to that.
    assert done.returncode == (ends or 1)


def test_a_refused_sweep_does_not_stop_the_others_and_is_named_at_the_end(recorder: Path, tmp_path: Path) -> None:
    options = {"TASKS": "rte", "METHODS": "lora adalora", "CODE": "2", "ONLY": "method=adalora"}
    done = run_script("table1", path=recorder, **options)
    assert [re.sub(r".*(tables|method=\w+).*?( lr=tuned|$).*", r"\1\2", line) for line in calls(tmp_path)] == [
        "method=lora",
        "method=adalora",
        "method=lora lr=tuned",
        "method=adalora lr=tuned",
        "tables",
    ]
    assert done.returncode == 2 and done.stderr.splitlines()[0].startswith("error: runs of these sweeps were refused")
    assert all("method=adalora" in line for line in done.stderr.splitlines()[1:])


def test_gpus_are_those_that_are_visible(recorder: Path, tmp_path: Path) -> None:
    run_script("table1", path=recorder, TASKS="rte", METHODS="lora", GPUS="2", CUDA_VISIBLE_DEVICES="5,7")
    assert calls(tmp_path)[0].startswith("GPU=5 ")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("table1", {"SCALE": "big"}, "error: SCALE=big: allowed is paper | cpu"),
        ("table6", {"PROTOCOL": "x"}, "error: PROTOCOL=x: allowed is steps | printed"),
        ("table1", {"TUNE_SEED": "3"}, "error: TUNE_SEED=3: allowed is int > 4"),
    ],
)
def test_mistakes_in_the_settings_are_told(name: str, options: dict[str, str], said: str, tmp_path: Path) -> None:
    done = run_script(name, RESULTS=str(tmp_path), **options)
    assert done.returncode == 2 and done.stderr.startswith(said) and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_small_study_runs_resumes_and_makes_its_table(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "data" / "sst2"
    folder.mkdir(parents=True)
    rows = {"sentence": [f"a {'good' if i % 2 else 'bad'} film {i}" for i in range(64)], "label": [i % 2 for i in range(64)]}
    for split in ("train", "validation"):
        pq.write_table(pa.table(rows), folder / f"{split}.parquet")
    small = ["model=tiny_bert", "train.max_steps=16", "task.batch_size=4"]
    settings = {"SCALE": "cpu", "DATA": str(tmp_path / "data"), "RESULTS": str(tmp_path / "study")}
    settings |= {"TASKS": "sst2", "METHODS": "lora", "OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run_script("table1", *small, **settings)
    assert done.returncode == 0, done.stderr
    assert re.search("best of [456] on sst2 seed=100", done.stdout)
    count = len(list((tmp_path / "study" / "records").glob("*.json")))
    assert count in (9, 10, 11), "four rates, up to two more if the best is at an edge, five seeds"
    assert (tmp_path / "study" / "tables" / "table1.tex").is_file()
    listed = run_script("table1", *small, DRY="1", **settings)
    # Four rates and five seeds. A best rate that is at an edge again would ask for another one.
    assert re.search("^9 of (9|10|11) runs done; 0 s left", listed.stdout, re.MULTILINE), listed.stdout


def test_recorded_grids_race_as_the_committed_table_says() -> None:
    words = ["scripts/race_check.py", "grids", "results/selection"]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    committed = (ROOT / "results" / "benchmarks" / "racing" / "grids.md").read_text()
    assert done.returncode == 0 and done.stdout.strip() and committed.startswith(done.stdout.rstrip()), done.stderr
    assert "11 of 22 choices within 0.002, 0 of 22 within 40% of the steps" in done.stdout
