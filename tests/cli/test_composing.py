"""A command composes each of its configurations once."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra

from tests.conftest import ROOT, TINY, RunMain
from wlora.cli.composing import composing_once

CHECK = [*TINY, "method=lora", "rank=0"]  # refused once it is composed


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The overrides of everything that Hydra composes."""
    compose, found = ConfigLoaderImpl._load_configuration_impl, list[tuple[str, ...]]()

    def watch(self: Any, *given: Any, **named: Any) -> Any:
        found.append(tuple(named["overrides"]))
        return compose(self, *given, **named)

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", watch)
    return found


def test_a_run_and_every_run_of_a_sweep_are_composed_once(run_main: RunMain, composed: list[tuple[str, ...]]) -> None:
    assert run_main(*CHECK)[0] == 2 and len(composed) == 1
    composed.clear()
    code, _, error = run_main("-m", *CHECK, "seed=0,1,2")
    assert code == 2 and error.count("rank=0: allowed is int >= 1") == 3
    assert len(composed) == len(set(composed)) == 4, "the command line and its three runs"


def test_the_mode_of_hydra_can_still_be_chosen(run_main: RunMain) -> None:
    assert run_main(*CHECK, "seed=0,1", "hydra.mode=MULTIRUN")[2].count("rank=0: allowed is int >= 1") == 2


def test_what_a_caller_changes_is_not_handed_on() -> None:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from wlora.config.schema import config_folder, register_schema

    register_schema()
    before = ConfigLoaderImpl.load_configuration
    with composing_once(), initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
        loader = GlobalHydra.instance().config_loader()
        for _ in range(3):
            found = loader.load_configuration("config", ["seed=3"], RunMode.RUN)
            assert found.seed == 3
            found.seed = 4
    assert ConfigLoaderImpl.load_configuration is before


ALIKE = """
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from wlora.cli.composing import merging_once
from wlora.config.schema import config_folder, register_schema

LINES = [
    ["seed=3"],
    ["seed=4", "rank=2", "+per_task={}"],
    ["method=lora", "rank=16"],
    ["method=lora", "hydra.job.chdir=true"],
    ["experiment=demo", "method=wlora", "k=2"],
    ["experiment=demo", "method=wlora", "++method.new=[1,2]"],
]
read = ConfigLoaderImpl._load_single_config
files = []
ConfigLoaderImpl._load_single_config = lambda self, default, repo: files.append(default) or read(self, default, repo)
register_schema()
with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
    load = GlobalHydra.instance().config_loader().load_configuration
    compose = lambda: [OmegaConf.to_yaml(load("config", line, RunMode.RUN)) for line in LINES]
    plain = compose()
    every = len(files)
    with merging_once(), merging_once():
        assert compose() == plain
        once = len(files) - every
        assert compose() == plain and len(files) == every + once, "the second time nothing is read"
    assert compose() == plain and len(files) == 2 * every + once, "afterwards all is as before"
print(every / once)
"""


def test_runs_that_choose_the_same_files_are_what_they_are_without_it() -> None:
    done = subprocess.run([sys.executable, "-c", ALIKE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 1.9, "three choices of six lines"


def test_help_does_not_list_groups_that_its_text_leaves_out(run_main: RunMain, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[object] = []
    monkeypatch.setattr(Hydra, "list_all_config_groups", lambda *given: listed.append(given) or [])
    assert "rank" in run_main("--help")[1] and not listed
    assert run_main("--hydra-help")[0] == 0 and listed
