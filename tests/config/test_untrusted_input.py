"""Files made to run code are refused or left alone: a checkpoint, a data set, a record, a model.

Adapters have theirs beside their other tests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.conftest import TINY, RunMain, compose
from tests.support.bombs import Bomb
from tests.support.hub_folder import build_folder
from wlora.config.schema import config_folder
from wlora.errors import ConfigError
from wlora.experiment.export import find_record
from wlora.experiment.run import open_record
from wlora.models.source import locate
from wlora.storage.atomic_write import PARTS, put, staged, write_whole
from wlora.storage.environment import _git_state
from wlora.storage.records import Record, RecordStore
from wlora.storage.sealing import seal, unseal
from wlora.training import interruption as guard
from wlora.training.checkpoints import CheckpointStore
from wlora.training.interruption import Interrupted
from wlora.training.precision import choose_precision

CHECKPOINTED = ["method=wlora", "train.checkpoint_every=4", "train.max_steps=12"]


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
        manifest = unseal((file.parent / "manifest.json").read_text())
        manifest["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        (file.parent / "manifest.json").write_text(seal(manifest))
    found = run_tiny(*CHECKPOINTED)
    assert capsys.readouterr().out.count("is damaged and skipped") == 2
    assert not mark.exists() and found.resumed_at == [] and found.metrics == expected.metrics


@pytest.mark.parametrize("name", [f"train.{kind}" for kind in ("parquet", "json", "jsonl", "csv", "tsv", "pkl", "py")])
def test_a_data_set_that_is_a_pickle_or_a_script_is_refused(
    name: str, mark: Path, tmp_path: Path, run_main: RunMain
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for file in (name, name.replace("train", "validation")):
        content = pickle.dumps(Bomb(mark))
        (folder / file).write_bytes(f"open({str(mark)!r}, 'w')\n".encode() if name.endswith(".py") else content)
    words = ["task=sst2", f"task.path={folder}", "model=tiny_bert", "method=lora", f"results_dir={tmp_path / 'r'}"]
    code, _, error = run_main(*words)
    assert code == 2 and "task.path" in error and 1 <= len(error.splitlines()) <= 2, error
    assert not mark.exists() and not list((tmp_path / "r").rglob("*.json"))


def test_a_target_in_a_configuration_is_no_call(mark: Path, tmp_path: Path, run_main: RunMain) -> None:
    words = ["task=story_nli", "model=tiny_bert", "+task._target_=builtins.open", f"+task._args_=[{mark},w]"]
    code, _, error = run_main(*words, f"results_dir={tmp_path / 'r'}")
    assert code == 2 and "_target_" in error and not mark.exists()


def test_a_record_that_is_repeated_is_data(
    mark: Path,
    tmp_path: Path,
    run_tiny: Callable[..., Record],
    monkeypatch: pytest.MonkeyPatch,
    run_main: RunMain,
) -> None:
    monkeypatch.setenv("SECRET", "told")
    record = run_tiny("method=lora", "train.max_steps=10")
    record.config["task"]["name"] = "${oc.env:SECRET}"
    record.config["model"]["path"] = f"$(touch {mark})"
    record.config["method"]["_target_"] = "builtins.open"
    RecordStore(tmp_path).write(record)
    code, _, error = run_main(f"from={record.run_id}", f"results_dir={tmp_path}")
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


@pytest.mark.parametrize("flag", ["--experimental-rerun", "--experimental-re"])
def test_hydras_way_to_start_from_a_pickle_is_closed(flag: str, mark: Path, tmp_path: Path, run_main: RunMain) -> None:
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(Bomb(mark)))
    words = [flag, str(tmp_path / "config.pickle"), f"results_dir={tmp_path / 'r'}"]
    code, _, error = run_main(*words)
    assert code == 2 and "is never read" in error and not mark.exists()


def test_git_is_asked_of_this_checkout_alone(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _git_state()
    fake = tmp_path / "git"
    fake.write_text(f"#!/bin/sh\ntouch {mark}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    if shutil.which("git", path=os.defpath):
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    _git_state.cache_clear()
    assert _git_state() == before and not mark.exists()


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("task", "hub_id", "${oc.env:SECRET}", "contains an interpolation"),
        ("method", "select", "${oc.env:SECRET}", "contains an interpolation"),
        ("method", "_target_", "builtins.open", "_target_"),
        ("method", "name", "../../evil", "method.name=../../evil is unknown"),
        ("method", "name", "base", "method.name=base is unknown"),
    ],
)
def test_each_trick_in_a_record_is_refused_by_itself(
    section: str,
    key: str,
    value: str,
    told: str,
    tmp_path: Path,
    run_tiny: Callable[..., Record],
    monkeypatch: pytest.MonkeyPatch,
    run_main: RunMain,
) -> None:
    monkeypatch.setenv("SECRET", "whispered")
    record = run_tiny("method=lora", "train.max_steps=1")
    record.config[section][key] = value
    RecordStore(tmp_path).write(record)
    code, _, error = run_main(f"from={record.run_id}", f"results_dir={tmp_path}")
    assert code == 2 and told in error and "Traceback" not in error and "whispered" not in error, error


@pytest.mark.parametrize("part", [*PARTS, "checkpoints/RUN"])
def test_a_linked_folder_that_a_run_would_write_into_is_refused(
    part: str, run_tiny: Callable[..., Record], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "step-00000001").mkdir(parents=True)
    source = locate(compose(*TINY).model)
    identity = open_record(compose(*TINY, *CHECKPOINTED), source, choose_precision("auto", torch.device("cpu"))).run_id
    link = tmp_path / "results" / part.replace("RUN", identity)
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=f"{link} is a link: allowed is a real folder"):
        run_tiny(*CHECKPOINTED, results=tmp_path / "results")
    assert [path.name for path in elsewhere.iterdir()] == ["step-00000001"]


def test_what_is_written_as_a_whole_takes_the_place_of_a_link(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    for precious in (folder / "precious", file):
        precious.write_text("precious")
    for name, target in (("a", folder), ("b", file), ("c", tmp_path / "nowhere")):
        (tmp_path / name).symlink_to(target)
        with staged(tmp_path / name) as staging:
            staging.mkdir()
            (staging / "new").write_text("new")
            put(staging, tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["new"] and not (tmp_path / name).is_symlink()
    (tmp_path / "d").symlink_to(file)
    write_whole(tmp_path / "d", b"new")
    assert (tmp_path / "d").read_text() == "new" and file.read_text() == (folder / "precious").read_text() == "precious"
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "nowhere").exists()
    CheckpointStore(tmp_path, "run", keep=1).folder.parent.mkdir()
    CheckpointStore(tmp_path, "run", keep=1).folder.symlink_to(folder)
    CheckpointStore(tmp_path, "run", keep=1).remove()
    assert not (tmp_path / "checkpoints").exists() and (folder / "precious").is_file()


def test_a_record_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    content = Record(run_id="../../outside", status="success", config={})
    store.folder.mkdir()
    store.path("inside").write_text(seal(dataclasses.asdict(content)))
    with pytest.raises(ConfigError, match="is damaged: its run_id is ../../outside"):
        find_record(str(tmp_path), "inside")


def test_shards_outside_the_folder_are_refused(mark: Path, tmp_path: Path, run_main: RunMain) -> None:
    torch.save({"bert.x": Bomb(mark)}, tmp_path / "evil.bin")
    folder = tmp_path / "model"
    folder.mkdir()
    config = OmegaConf.to_container(OmegaConf.load(config_folder() / "model" / "tiny_bert.yaml").architecture)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"bert.x": "../evil.bin"}}))
    (folder / "model-1.safetensors").write_bytes(b"")
    words = ["task=story_nli", "model=tiny_bert", f"model.path={folder}", "method=lora", f"results_dir={tmp_path / 'r'}"]
    code, _, error = run_main(*words)
    assert code == 2 and "model.safetensors.index.json names ../evil.bin" in error and not mark.exists()


def test_code_beside_a_models_weights_is_not_run(mark: Path, tmp_path: Path, run_main: RunMain) -> None:
    folder = build_folder(tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nEvil = None\n")
    for file, entries in (
        ("config.json", ("AutoConfig", "AutoModelForSequenceClassification")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        content = json.loads((folder / file).read_text())
        content["auto_map"] = dict.fromkeys(entries, "evil.Evil")
        (folder / file).write_text(json.dumps(content))
    words = ["task=story_nli", "model=deberta_v3_base", f"model.path={folder}", "method=lora", "train.max_steps=1"]
    words += ["task.max_train_rows=8", "task.max_eval_rows=8", "task.batch_size=8", "train.accumulation_steps=1"]
    run_main(*words, f"results_dir={tmp_path / 'r'}")
    assert not mark.exists()
