"""YAML files from outside the package may set keys of ours and nothing else."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import RunMain, enter_main


@pytest.mark.parametrize("tag", ["object/apply:builtins.open", "object/new:builtins.open", "name:builtins.open"])
def test_a_configuration_with_pythons_tags_is_refused(tag: str, mark: Path, tmp_path: Path, run_main: RunMain) -> None:
    folder = tmp_path / "conf" / "task"
    folder.mkdir(parents=True)
    value = f"!!python/{tag}" + ("" if tag.startswith("name") else f" ['{mark}', 'w']")
    (folder / "evil.yaml").write_text(f"name: {value}\n")
    words = ["--config-dir", str(tmp_path / "conf"), "task=evil", f"results_dir={tmp_path / 'r'}"]
    code, _, error = run_main(*words)
    assert code == 2 and 1 <= len(error.splitlines()) <= 2 and "Traceback" not in error, error
    assert not mark.exists()


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
    what: str, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_main: RunMain
) -> None:
    monkeypatch.setenv("SECRET", "whispered")
    path = os.environ["PATH"]
    place, text, named = FOREIGN[what]
    file = tmp_path / "conf" / f"{place}.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(text.replace("{mark}", str(mark)))
    group = place.removesuffix("/x")
    words = [f"--config-dir={tmp_path / 'conf'}", f"{group}=x"]
    code, _, error = run_main(*words, f"results_dir={tmp_path / 'r'}", "dry_run=true")
    assert code == 2 and named in error and "x.yaml: " in error and len(error.splitlines()) == 1, error
    assert not mark.exists() and not (tmp_path / "r").exists() and os.environ["PATH"] == path and "whispered" not in error


@pytest.mark.parametrize(
    "way", ["--config-dir=", "-cd=", "--config-d=", "a linked folder", "a linked file", "a search path"]
)
def test_every_way_to_a_file_from_elsewhere_is_guarded(way: str, tmp_path: Path, run_main: RunMain) -> None:
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
    code, _, error = run_main(*words, f"results_dir={tmp_path / 'r'}")
    assert code == 2 and "hydra.job.env_set.A" in error and len(error.splitlines()) == 1 and "A" not in os.environ, error


@pytest.mark.parametrize("word", ["--config-path=/tmp", "-cp=/tmp", "-cn=other", "hydra.searchpath=['pkg://json']"])
def test_no_other_configuration_takes_the_place_of_the_programs(word: str, run_main: RunMain) -> None:
    code, _, error = run_main(word, "dry_run=true")
    assert code == 2 and "allowed" in error and len(error.splitlines()) == 1, error


def test_a_file_that_is_not_chosen_is_not_read(tmp_path: Path, run_main: RunMain) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bomb.yaml").write_text(GLOBAL + BOMB)
    words = [
        f"--config-dir={tmp_path}",
        "task=story_nli",
        "model=tiny_bert",
        f"results_dir={tmp_path / 'r'}",
        "dry_run=true",
    ]
    assert run_main(*words)[0] == 0


@pytest.mark.filterwarnings("ignore:Callback")
def test_hydra_would_have_called_it(mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_main: RunMain) -> None:
    from hydra._internal.core_plugins.file_config_source import FileConfigSource

    monkeypatch.setattr("wlora.config.untrusted_yaml.FileConfigSource", FileConfigSource)
    (tmp_path / "experiment").mkdir()
    for kind, content in (("callbacks", f"callbacks:\n  boom:\n    {CALL}"), ("logging", f"job_logging:\n    {LOGGING}")):
        text = "# @package _global_\nhydra:\n  " + content.format(mark=mark).replace("\n  ", "\n    ")
        (tmp_path / "experiment" / f"{kind}.yaml").write_text(text)
        words = [f"--config-dir={tmp_path}", f"experiment={kind}", f"results_dir={tmp_path / 'r'}", "dry_run=true"]
        run_main(*words)
        assert mark.exists(), f"{kind}: the bomb is a dud, so the tests around show nothing"
        mark.unlink()


def test_a_configuration_from_elsewhere_may_set_things(tmp_path: Path, run_main: RunMain) -> None:
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
    code, _, error = run_main(*words)
    assert code == 0, error


FUZZED = int(os.environ.get("WLORA_FOREIGN_FILES", "25"))
"""How many files the test below makes; 2,000 for a thorough search."""


KEYS = [
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
CODE = ["builtins.open", "logging.FileHandler", "pathlib.Path.write_text"]
LOOKUPS = ["${oc.env:SECRET}", "${rank}", "${hydra:runtime.cwd}", "${method}", "${"]
PLAIN = ["w", 1, None, "off", "nope", True, -1, "1,2", [1], "\x00"]


def make_foreign(chance: random.Random, mark: Path) -> tuple[str, Any]:
    """Return a group and a file's content of Hydra's, logging's and our own keys at random."""
    values = [*CODE, f"ext://{mark}", str(mark), *LOOKUPS, *PLAIN]

    def node(depth: int) -> Any:
        if depth == 0 or chance.random() < 0.3:
            return chance.choice(values)
        return {chance.choice(KEYS): node(depth - 1) for _ in range(chance.randint(1, 3))}

    content = {chance.choice(KEYS): node(4) for _ in range(chance.randint(1, 2))}
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
