"""Files made to run code are refused or left alone: a checkpoint, a data set, a configuration, a record.

Models and adapters have theirs beside their other tests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from tests.conftest import TINY, compose, enter_main
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
    capsys.readouterr()
    return enter_main(monkeypatch, *words), capsys.readouterr().err


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


@pytest.mark.parametrize("flag", ["--experimental-rerun", "--experimental-re"])
def test_hydras_way_to_start_from_a_pickle_is_closed(
    flag: str, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(Bomb(mark)))
    words = [flag, str(tmp_path / "config.pickle"), f"results_dir={tmp_path / 'r'}"]
    code, error = command(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "is never read" in error and not mark.exists()


CALL = "_target_: builtins.open\n    file: {mark}\n    mode: w\n"
LOGGING = "handlers:\n      boom:\n        (): builtins.open\n        file: {mark}\n        mode: w\n"
GLOBAL = "# @package _global_\n"
BOMB = "per_task:\n  a0: &a0 [x, x]\n" + "".join(f"  a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
# What a file from elsewhere may not say: where it stands, its text, and what the answer names.
FOREIGN = {
    "a call": ("experiment/x", GLOBAL + f"hydra:\n  callbacks:\n   boom:\n    {CALL}", "hydra.callbacks.boom._target_"),
    "a handler": ("experiment/x", GLOBAL + f"hydra:\n  job_logging:\n    {LOGGING}", "handlers.boom.()"),
    "a plugin": ("experiment/x", GLOBAL + "hydra: {launcher: {_target_: hydra_plugins.x.Y}}\n", "launcher._target_"),
    "variables": ("experiment/x", GLOBAL + "hydra: {job: {env_set: {PATH: /tmp}}}\n", "hydra.job.env_set.PATH"),
    "a shell": ("hardware/x", GLOBAL + "hydra: {launcher: {setup: [rm]}}\n", "hydra.launcher.setup"),
    "lines for sbatch": ("hardware/x", GLOBAL + 'hydra: {launcher: {constraint: "a\\nrm"}}\n', "launcher.constraint"),
    "a search path": ("experiment/x", GLOBAL + "hydra: {searchpath: [/tmp]}\n", "hydra.searchpath"),
    "a sweep of Hydra's": (
        "experiment/x",
        GLOBAL + "hydra: {sweeper: {params: {hydra.job.env_set.A: b}}}\n",
        "params.hydra",
    ),
    "a hidden secret": (
        "experiment/x",
        GLOBAL + "hydra: {sweeper: {params: {tune_on: '$\\{oc.env\\:SECRET\\}'}}}\n",
        "hydra.sweeper.params.tune_on",
    ),
    "a secret": ("experiment/x", GLOBAL + "model: {revision: '${oc.env:SECRET}'}\n", "${oc.env:SECRET}"),
    "Hydra's own": ("experiment/x", GLOBAL + "tune_on: ${hydra.runtime.cwd}\n", "${hydra.runtime.cwd}"),
    "a place": ("experiment/x", GLOBAL + "results_dir: /tmp/elsewhere\n", "results_dir"),
    "a preset's keys": ("task/x", "presets: {mine: {all: {results_dir: /tmp}}}\n", "task.presets"),
    "another package": ("task/x", "# @package hydra.job.env_set\nPATH: /tmp\n", "@package hydra.job.env_set"),
    "a group of Hydra's": ("hydra/job_logging/x", "root: {level: DEBUG}\n", "hydra/job_logging/x"),
    "a choice of Hydra's": ("experiment/x", GLOBAL + "defaults: [override /hydra/job_logging: default]\n", "job_logging"),
    "a place for a choice": ("experiment/x", GLOBAL + "defaults: [/model@hydra.job: y]\n", "model@hydra.job"),
    "a bomb of aliases": ("experiment/x", GLOBAL + BOMB, "*a0"),
    "a bomb of references": ("experiment/x", GLOBAL + "per_task: {a: {x: '${per_task.b}'}, b: {}}\n", "per_task.a.x"),
    "depth": ("experiment/x", GLOBAL + "per_task: " + "[" * 10_000 + "]" * 10_000, "levels"),
    "size": ("experiment/x", GLOBAL + "#" * 100_000, "more than 64 KiB"),
    "an unknown key": ("model/x", "name: x\nnope: 1\n", "model.nope"),
    "no mapping": ("model/x", "[1, 2]\n", "list"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_file_from_elsewhere_sets_only_keys_of_ours(
    what: str, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECRET", "whispered")
    path = os.environ["PATH"]
    place, text, named = FOREIGN[what]
    file = tmp_path / "conf" / f"{place}.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text.replace("{mark}", str(mark)))
    group = place.removesuffix("/x")
    words = [f"--config-dir={tmp_path / 'conf'}", f"{group}=x"]
    code, error = command(*words, f"results_dir={tmp_path / 'r'}", "dry_run=true", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and named in error and "x.yaml: " in error and len(error.splitlines()) == 1, error
    assert not mark.exists() and not (tmp_path / "r").exists() and os.environ["PATH"] == path and "whispered" not in error


@pytest.mark.parametrize(
    "way", ["--config-dir=", "-cd=", "--config-d=", "a linked folder", "a linked file", "a search path"]
)
def test_every_way_to_a_file_from_elsewhere_is_guarded(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, given = tmp_path / "its place" / "experiment", tmp_path / "its link"
    real.mkdir(parents=True)
    (real / "x.yaml").write_text(GLOBAL + "hydra: {job: {env_set: {A: b}}}\n")
    given.mkdir()
    if way == "a linked file":
        (given / "experiment").mkdir()
        (given / "experiment" / "x.yaml").symlink_to(real / "x.yaml")
    else:
        (given / "experiment").symlink_to(real)
    flag = way + str(given) if way[0] == "-" else f"--config-dir={given}"
    words = [f"hydra.searchpath=['file://{given}']" if way == "a search path" else flag, "experiment=x", "dry_run=true"]
    code, error = command(*words, f"results_dir={tmp_path / 'r'}", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "hydra.job.env_set.A" in error and len(error.splitlines()) == 1 and "A" not in os.environ, error


@pytest.mark.parametrize("word", ["--config-path=/tmp", "-cp=/tmp", "-cn=other", "hydra.searchpath=['pkg://json']"])
def test_no_other_configuration_takes_the_place_of_the_programs(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = command(word, "dry_run=true", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "allowed" in error and len(error.splitlines()) == 1, error


def test_a_file_that_is_not_chosen_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bomb.yaml").write_text(GLOBAL + BOMB)
    words = [
        f"--config-dir={tmp_path}",
        "task=story_nli",
        "model=tiny_bert",
        f"results_dir={tmp_path / 'r'}",
        "dry_run=true",
    ]
    assert command(*words, monkeypatch=monkeypatch, capsys=capsys)[0] == 0


@pytest.mark.filterwarnings("ignore:Callback")
def test_hydra_would_have_called_it(
    mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hydra._internal.core_plugins.file_config_source import FileConfigSource

    monkeypatch.setattr("wlora.config.untrusted_yaml.FileConfigSource", FileConfigSource)
    (tmp_path / "experiment").mkdir()
    for kind, content in (("callbacks", f"callbacks:\n  boom:\n    {CALL}"), ("logging", f"job_logging:\n    {LOGGING}")):
        text = "# @package _global_\nhydra:\n  " + content.format(mark=mark).replace("\n  ", "\n    ")
        (tmp_path / "experiment" / f"{kind}.yaml").write_text(text)
        words = [f"--config-dir={tmp_path}", f"experiment={kind}", f"results_dir={tmp_path / 'r'}", "dry_run=true"]
        command(*words, monkeypatch=monkeypatch, capsys=capsys)
        assert mark.exists(), f"{kind}: the bomb is a dud, so the tests around show nothing"
        mark.unlink()


def test_a_configuration_from_elsewhere_may_set_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "experiment/mine": GLOBAL + "defaults:\n  - override /task: mine\n  - override /model: tiny_bert\nrank: 3\n"
        "per_task: {story_nli: {steps: 4}}\ntrain: {max_steps: '${per_task.${task.name}.steps}'}\n"
        "hydra: {sweeper: {params: {lr: '1e-3,1e-4', task.batch_size: 8}}}\n",
        "task/mine": "defaults: [story_nli, _self_]\nmax_train_rows: 64\n",
        "hardware/mine": GLOBAL + "defaults: [override /hydra/launcher: submitit_local]\nprecision: fp32\n"
        "hydra: {launcher: {timeout_min: 9, mem_gb: 8}}\n",
    }
    for name, text in files.items():
        file = tmp_path / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(text)
    words = [
        f"--config-dir={tmp_path / 'conf'}",
        "experiment=mine",
        "hardware=mine",
        f"results_dir={tmp_path}",
        "dry_run=true",
    ]
    code, error = command(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, error


def test_git_is_asked_of_this_checkout_alone(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _git_state()
    fake = tmp_path / "git"
    fake.write_text(f"#!/bin/sh\ntouch {mark}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    if shutil.which("git", path=os.defpath):
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert _git_state() == before and not mark.exists()


FUZZED = int(os.environ.get("WLORA_FOREIGN_FILES", "25"))
"""How many files the test below makes; 2,000 for a thorough search."""


def make_foreign(chance: random.Random, mark: Path) -> tuple[str, Any]:
    """Return a group and a file's content of Hydra's, logging's and our own keys at random."""
    keys = [
        "hydra",
        "job",
        "env_set",
        "env_copy",
        "callbacks",
        "job_logging",
        "hydra_logging",
        "handlers",
        "formatters",
        "()",
    ]
    keys += [
        "_target_",
        "_args_",
        "class",
        "filename",
        "ext",
        "run",
        "dir",
        "sweep",
        "launcher",
        "sweeper",
        "params",
        "setup",
    ]
    keys += [
        "searchpath",
        "output_subdir",
        "help",
        "mode",
        "chdir",
        "name",
        "path",
        "task",
        "model",
        "method",
        "train",
        "rank",
    ]
    values = [
        "builtins.open",
        "logging.FileHandler",
        "pathlib.Path.write_text",
        f"ext://{mark}",
        str(mark),
        "w",
        1,
        None,
        "off",
    ]
    values += [
        "${oc.env:SECRET}",
        "${rank}",
        "${hydra:runtime.cwd}",
        "${method}",
        "${",
        "nope",
        True,
        -1,
        "1,2",
        [1],
        "\x00",
    ]

    def node(depth: int) -> Any:
        if depth == 0 or chance.random() < 0.3:
            return chance.choice(values)
        return {chance.choice(keys): node(depth - 1) for _ in range(chance.randint(1, 3))}

    content = {chance.choice(keys): node(4) for _ in range(chance.randint(1, 2))}
    if chance.random() < 0.3:
        entries = [
            "_self_",
            "x",
            {"override /hydra/job_logging": "default"},
            {"override /task": "rte"},
            {"/task@hydra.job": "x"},
        ]
        content["defaults"] = chance.sample(entries, 2)
    return chance.choice(["experiment", "hardware", "task", "model", "method", "train", "hydra/callbacks"]), content


def test_foreign_files_of_hydras_own_keys_do_nothing(
    mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECRET", "whispered")
    monkeypatch.chdir(tmp_path)
    # The first run of a sound file, with offline=true, sets these, as it may.
    for name, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_OFFLINE", "1"), ("WANDB_MODE", "offline")):
        monkeypatch.setenv(name, value)
    chance, variables = random.Random(0), {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"}
    for number in range(FUZZED):
        group, content = make_foreign(chance, mark)
        file = tmp_path / "conf" / group / "x.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        package = chance.choice(["", GLOBAL, GLOBAL, "# @package hydra\n"])
        file.write_text(package + yaml.safe_dump(content))
        words = ["--config-dir=conf", f"{'+' if group[:5] == 'hydra' else ''}{group}=x", "offline=true", "dry_run=true"]
        capsys.readouterr()
        code = enter_main(monkeypatch, *words, "results_dir=r", *([] if group == "task" else ["task=story_nli"]))
        out, error = capsys.readouterr()
        assert code in (0, 2) and "Traceback" not in error and "whispered" not in out + error, (number, content, error)
        assert code == 0 or len(error.splitlines()) <= 2, (number, content, error)
        assert {key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"} == variables, (number, content)
        file.unlink()
        if number % 100 == 99 and "WLORA_FOREIGN_FILES" in os.environ:
            with capsys.disabled():
                print(f"{number + 1} files", flush=True)
        assert {path.name for path in tmp_path.iterdir()} <= {"conf", "r"}, (number, content)


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("task", "hub_id", "${oc.env:SECRET}", "has an interpolation"),
        ("method", "select", "${oc.env:SECRET}", "has an interpolation"),
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
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SECRET", "whispered")
    record = run_tiny("method=lora", "train.max_steps=1")
    record.config[section][key] = value
    RecordStore(tmp_path).write(record)
    code, error = command(f"from={record.run_id}", f"results_dir={tmp_path}", monkeypatch=monkeypatch, capsys=capsys)
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
    with pytest.raises(ConfigError, match="is damaged: it is of run ../../outside"):
        find_record(str(tmp_path), "inside")


def test_shards_outside_the_folder_are_refused(
    mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"bert.x": Bomb(mark)}, tmp_path / "evil.bin")
    folder = tmp_path / "model"
    folder.mkdir()
    config = OmegaConf.to_container(OmegaConf.load(config_folder() / "model" / "tiny_bert.yaml").architecture)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"bert.x": "../evil.bin"}}))
    (folder / "model-1.safetensors").write_bytes(b"")
    words = ["task=story_nli", "model=tiny_bert", f"model.path={folder}", "method=lora", f"results_dir={tmp_path / 'r'}"]
    code, error = command(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "model.safetensors.index.json names ../evil.bin" in error and not mark.exists()


def test_code_beside_a_models_weights_is_not_run(
    mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    command(*words, f"results_dir={tmp_path / 'r'}", monkeypatch=monkeypatch, capsys=capsys)
    assert not mark.exists()
