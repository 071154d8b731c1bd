"""Files made to run code are refused or left alone: a checkpoint, a data set, a configuration, a record.

Models and adapters have theirs beside their other tests.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wlora import run
from wlora.records import Record, RecordStore
from wlora.training import guard
from wlora.training.guard import Interrupted

CHECKPOINTED = ["method=wlora", "train.checkpoint_every=4", "train.max_steps=12"]


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Return the file that a bomb makes, once it is shown that one does."""
    file = tmp_path / "boom"
    pickle.loads(pickle.dumps(Bomb(file)))
    assert file.exists()
    file.unlink()
    return file


def command(*words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run the entry point in this process; returns its exit code and what it said of errors."""
    monkeypatch.setattr(sys, "argv", ["run", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run.main()
    return int(end.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_checkpoint_that_is_a_pickle_is_skipped_even_with_the_right_checksum(
    kind: str,
    mark: Path,
    run_tiny: Callable[..., Record],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = run_tiny(*CHECKPOINTED, results=tmp_path / "whole")
    after = guard.Guard.__call__

    def stop(self: Any, trainer: Any) -> None:
        after(self, trainer)
        if trainer.step == 9:
            raise Interrupted(15, trainer.step)

    monkeypatch.setattr(guard.Guard, "__call__", stop)
    with pytest.raises(Interrupted):
        run_tiny(*CHECKPOINTED)
    monkeypatch.setattr(guard.Guard, "__call__", after)
    for file in tmp_path.glob("checkpoints/*/step-*/tensors.safetensors"):
        if kind == "torch":
            torch.save({"model/x": Bomb(mark)}, file)
        else:
            file.write_bytes(pickle.dumps(Bomb(mark)))
        manifest = json.loads((file.parent / "manifest.json").read_text())
        manifest["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        (file.parent / "manifest.json").write_text(json.dumps(manifest))
    found = run_tiny(*CHECKPOINTED)
    assert capsys.readouterr().out.count("is broken and skipped") == 2
    assert not mark.exists() and found.resumed_at == [] and found.metrics == expected.metrics


@pytest.mark.parametrize("name", [f"train.{kind}" for kind in ("parquet", "json", "jsonl", "csv", "tsv", "pkl", "py")])
def test_a_data_set_that_is_a_pickle_or_a_script_is_refused(
    name: str, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for file in (name, name.replace("train", "validation")):
        content = pickle.dumps(Bomb(mark))
        (folder / file).write_bytes(f"open({str(mark)!r}, 'w')\n".encode() if name.endswith(".py") else content)
    words = ["task=sst2", f"task.path={folder}", "model=tiny_bert", "method=lora", f"results_dir={tmp_path / 'r'}"]
    code, error = command(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "task.path" in error and 1 <= len(error.splitlines()) <= 2, error
    assert not mark.exists() and not list((tmp_path / "r").rglob("*.json"))


@pytest.mark.parametrize("tag", ["object/apply:builtins.open", "object/new:builtins.open", "name:builtins.open"])
def test_a_configuration_with_pythons_tags_is_refused(
    tag: str, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "conf" / "task"
    folder.mkdir(parents=True)
    value = f"!!python/{tag}" + ("" if tag.startswith("name") else f" ['{mark}', 'w']")
    (folder / "evil.yaml").write_text(f"name: {value}\n")
    words = ["--config-dir", str(tmp_path / "conf"), "task=evil", f"results_dir={tmp_path / 'r'}"]
    code, error = command(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and 1 <= len(error.splitlines()) <= 2 and "Traceback" not in error, error
    assert not mark.exists()


def test_a_target_in_a_configuration_is_no_call(
    mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["task=story_nli", "model=tiny_bert", "+task._target_=builtins.open", f"+task._args_=[{mark},w]"]
    code, error = command(*words, f"results_dir={tmp_path / 'r'}", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "_target_" in error and not mark.exists()


def test_a_record_that_is_repeated_is_data(
    mark: Path,
    tmp_path: Path,
    run_tiny: Callable[..., Record],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SECRET", "told")
    record = run_tiny("method=lora", "train.max_steps=10")
    record.config["task"]["name"] = "${oc.env:SECRET}"
    record.config["model"]["path"] = f"$(touch {mark})"
    record.config["method"]["_target_"] = "builtins.open"
    RecordStore(tmp_path).write(record)
    code, error = command(f"from={record.run_id}", f"results_dir={tmp_path}", monkeypatch=monkeypatch, capsys=capsys)
    assert code != 0 and "Traceback" not in error and "told" not in error and not mark.exists()


def test_names_in_a_manifest_lead_nowhere(run_tiny: Callable[..., Record], tmp_path: Path) -> None:
    record = run_tiny(*CHECKPOINTED, "train.keep_after=true")
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    (folder, *_) = (tmp_path / "checkpoints" / record.run_id).glob("step-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["../../../outside.json"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run_tiny(*CHECKPOINTED, "force=true")
    assert outside.read_text() == "{}"
