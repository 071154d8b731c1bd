"""`from=RUN_ID` repeats a recorded run and says what came out differently."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import RunMain
from wlora.storage.environment import compare_environments, describe_environment
from wlora.storage.records import RecordStore


@pytest.fixture
def enter(run_main: RunMain, tmp_path: Path) -> Callable[..., Any]:
    """Return a function that calls the entry point in this process; it returns exit code, output and errors."""
    return lambda *words: run_main(*words, f"results_dir={tmp_path}")


@pytest.mark.parametrize("method", ["wlora", "adalora", "full"])
def test_a_repetition_is_equal_and_the_record_stays(
    method: str, run_tiny: Callable[..., Any], enter: Callable[..., Any], tmp_path: Path
) -> None:
    record = run_tiny(f"method={method}", "rank=4", "train.max_steps=24")
    before = RecordStore(tmp_path).path(record.run_id).read_bytes()
    code, out, err = enter(f"from={record.run_id}")
    assert (code, err) == (0, "")
    assert "equal " in out and "bit for bit" in out and "versions   and settings are the same" in out
    assert RecordStore(tmp_path).path(record.run_id).read_bytes() == before
    again = RecordStore(tmp_path / "reruns").read(record.run_id)
    assert again is not None and again.metrics == record.metrics
    assert again.environment["overrides"] == [f"from={record.run_id}", f"results_dir={tmp_path}"]


def test_what_differs_is_named(run_tiny: Callable[..., Any], enter: Callable[..., Any], tmp_path: Path) -> None:
    record = run_tiny("method=wlora", "k=2", "train.max_steps=24")
    record.metrics["accuracy"] -= 0.25
    record.adapters[0]["rank"] += 1
    record.environment["packages"]["numpy"] = "1.0"
    record.environment["torch"]["threads"] = 64
    points = RecordStore(tmp_path).read_curve(record)
    points[3]["loss"] += 1
    curve = RecordStore(tmp_path).curve(record.run_id)
    curve.restart(points)
    record.curve = curve.checksum()
    RecordStore(tmp_path).write(record)
    code, out, _ = enter(f"from={record.run_id}")
    right = record.metrics["accuracy"] + 0.25
    assert code == 1 and "different  3 numbers" in out
    assert f"metrics.accuracy: {right - 0.25} -> {right} (+0.25)" in out
    assert f"adapters[0].rank: {record.adapters[0]['rank']} -> {record.adapters[0]['rank'] - 1}" in out
    assert "curve[3].loss" in out and "(-1)" in out
    assert "packages.numpy: 1.0 -> " in out and f"torch.threads: 64 -> {torch.get_num_threads()}" in out
    assert "lr" not in [line.split(":")[0].strip() for line in out.splitlines()]


def test_a_record_of_another_precision_and_other_wishes_is_repeated_as_it_was(
    run_tiny: Callable[..., Any], enter: Callable[..., Any], tmp_path: Path
) -> None:
    record = run_tiny("method=lora", "precision=fp32", "train.max_steps=4")
    record.config |= {"precision": "auto", "force": True, "offline": True, "track": "wandb"}
    RecordStore(tmp_path).write(record)
    code, out, err = enter(f"from={record.run_id}")
    assert code == 0 and "fp32 (asked for)" in out, err
    code, out, _ = enter(f"from={record.run_id}")
    assert code == 0 and "is done" in out and "equal " in out, "compared again, not run again"


def test_only_what_decides_no_number_may_be_overridden(
    run_tiny: Callable[..., Any], enter: Callable[..., Any], tmp_path: Path
) -> None:
    record = run_tiny("method=lora", "train.max_steps=4")
    for word in (
        "rank=4",
        "seed=1",
        "method.rank=4",
        "lr=1",
        "precision=fp32",
        "task=rte",
        "model.architecture.hidden_size=64",
    ):
        code, _, err = enter(f"from={record.run_id}", word)
        assert code == 2 and err.startswith(f"error: {word}: from={record.run_id} repeats the run unchanged"), err
        assert err.count("\n") <= 2
    for words in (["-m"], [f"from={record.run_id}"], ["--cfg", "job"]):
        code, _, err = enter(f"from={record.run_id}", *words)
        assert code == 2 and "from=RUN_ID repeats one run" in err
    code, _, err = enter("from=nothing")
    assert code == 2 and "nothing: no record of that name" in err
    code, _, err = enter(f"from={record.run_id}", "force=perhaps")
    assert code == 2 and err.startswith("error: force=perhaps")
    assert not (tmp_path / "reruns").exists()
    code, out, _ = enter(f"from={record.run_id}", "dry_run=true")
    assert code == 0 and f"run        {record.run_id} (no record yet)" in out


def write_rows(folder: Path, first: str) -> Path:
    folder.mkdir()
    for split, count in (("train", 16), ("validation", 6)):
        rows = [
            {"sentence": first if i == 0 else f"Ben is in room {i % 3}.", "label": i % 2, "idx": i} for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_data_may_move_but_not_change(run_tiny: Callable[..., Any], enter: Callable[..., Any], tmp_path: Path) -> None:
    data, other = write_rows(tmp_path / "data", "Anna left."), write_rows(tmp_path / "other", "Anna came.")
    record = run_tiny("task=sst2", "method=lora", f"task.path={data}", "train.max_steps=4")
    moved = data.rename(tmp_path / "it's #1: moved")
    code, out, err = enter(f"from={record.run_id}", f"task.path={moved}")
    assert code == 0 and "equal " in out, err
    code, _, err = enter(f"from={record.run_id}", f"task.path={other}")
    assert code == 2 and f"task.path={other}: its content is" in err


def test_adapters_to_start_from_may_move_too(
    run_tiny: Callable[..., Any], enter: Callable[..., Any], tmp_path: Path
) -> None:
    first = run_tiny("method=lora", "train.max_steps=4")
    record = run_tiny("method=lora", "train.max_steps=5", f"adapter.path={tmp_path / 'adapters' / first.run_id}")
    moved = (tmp_path / "adapters" / first.run_id).rename(tmp_path / "moved")
    code, out, err = enter(f"from={record.run_id}", f"adapter.path={moved}")
    assert code == 0 and "equal " in out, err
    code, _, err = enter(f"from={record.run_id}", f"adapter.path={tmp_path / 'adapters' / record.run_id}")
    assert code == 2 and "adapter.path=" in err and "fingerprint" in err


def test_a_committed_record_of_an_earlier_version_is_understood(enter: Callable[..., Any], tmp_path: Path) -> None:
    from tests.conftest import ROOT

    file = sorted((ROOT / "results" / "first_runs" / "records").glob("*.json"))[0]
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / file.name).write_bytes(file.read_bytes())
    code, _, err = enter(f"from={file.stem}", f"task.path={tmp_path / 'nowhere'}")
    assert code == 2 and "task.path" in err and "nowhere" in err


def test_mistakes_are_told_before_torch_is_imported(enter: Callable[..., Any]) -> None:
    code = (
        "import sys, wlora.experiment.rerun, wlora.experiment.export, wlora.storage.trackers; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    code, _, error = enter("from=abc")
    assert code == 2 and error.startswith("error: abc: no record")


def test_an_environment_tells_enough_to_run_again() -> None:
    environment = describe_environment("cpu", "fp32", 1, overrides=["task=rte"])
    assert environment["overrides"] == ["task=rte"]
    assert torch.__version__.startswith(environment["packages"]["torch"])  # without the build, such as +cu128
    assert {"peft", "tokenizers", "safetensors", "pyarrow", "numpy"} <= set(environment["packages"])
    assert environment["torch"]["threads"] == torch.get_num_threads()
    assert environment["torch"]["deterministic_algorithms"] is False
    json.dumps(environment, allow_nan=False)
    other = {**environment, "torch": {**environment["torch"], "threads": 77}, "later": 1}
    del other["packages"]
    assert compare_environments(environment, other) == {"torch.threads": (torch.get_num_threads(), 77)}
    assert compare_environments(environment, environment) == {}


def test_a_record_whose_keys_mean_other_numbers_today_is_not_repeated(
    run_tiny: Callable[..., Any], enter: Callable[..., Any], tmp_path: Path
) -> None:
    record = run_tiny("method=wlora_plus", "k=2", "train.max_steps=24")
    assert record.config["method"].pop("revision") == 2
    RecordStore(tmp_path).write(record)
    code, _, err = enter(f"from={record.run_id}")
    assert code == 2 and "method=wlora_plus now computes different numbers (revision 2, not 1)" in err
