"""Shared pieces of the tests: runs of the real entry point on tiny models, in this process or a fresh one."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.bombs import Bomb
from wlora.distributed import TOLD

ROOT = Path(__file__).parent.parent
# Numbers are compared to the last bit, and with a second process on the same machine: all but test_gpu.py runs on the CPU.
# Kept in the environment, which the processes of xdist inherit.
GPUS = os.environ.setdefault("TEST_GPUS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
RunMain = Callable[..., tuple[int, str, str]]
TINY = [
    "task=story_nli",
    "model=tiny_bert",
    "task.max_train_rows=128",
    "task.max_eval_rows=48",
    "task.batch_size=8",
    "task.epochs=2",
    "lr=1e-3",
]


# What a test asks for if it needs a whole run or command.
WHOLE = {"run_tiny", "run_main"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put every test that is not slow into one of the tiers `unit` and `integration`."""
    for item in items:
        if not any(item.get_closest_marker(tier) for tier in ("slow", "integration")):
            whole = WHOLE & set(getattr(item, "fixturenames", ()))
            item.add_marker(pytest.mark.integration if whole else pytest.mark.unit)


@pytest.fixture(scope="session", autouse=True)
def _single_thread() -> None:
    """Tiny models run faster on one thread, and results do not depend on the number of cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _captured_streams_stay_open() -> None:
    """The logger of rouge-score's absl closes the stream of its import, here pytest's, when Hydra sets up logging."""
    from absl import logging

    logging.get_absl_handler().python_handler.setStream(sys.__stderr__)


@pytest.fixture(scope="session", autouse=True)
def _a_yaml_file_is_parsed_once() -> Iterator[None]:
    """Every composition reads the same files with a parser in Python: a third of its time."""
    parse, parsed = yaml.load, dict[tuple[Any, str], Any]()

    def load(stream: Any, Loader: Any) -> Any:
        text = stream if isinstance(stream, str) else stream.read()
        key = (text, Loader.__qualname__)  # OmegaConf makes its loader anew for every file
        if key not in parsed:
            parsed[key] = parse(text, Loader=Loader)
        return copy.deepcopy(parsed[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "load", load)
        yield


@pytest.fixture(scope="session", autouse=True)
def _the_same_files_are_merged_once() -> Iterator[None]:
    """Composing takes half of the time of a command that stops early. No test changes a file in its place."""
    from wlora.cli.composing import merging_once

    with merging_once():
        yield


@pytest.fixture(autouse=True)
def _nothing_is_told_yet() -> None:
    """A command tells a notice once; every test is a command of its own."""
    TOLD.clear()


def compose(*overrides: str) -> Any:
    """Compose the real configuration with overrides and resolve it, as the entry point does."""
    from wlora.cli.sweep import compose as compose_quickly

    return compose_quickly(overrides)


@pytest.fixture
def run_tiny(tmp_path: Path) -> Callable[..., Any]:
    """Return a function that runs a tiny experiment in this process and returns its record."""

    def run(*overrides: str, results: Path = tmp_path) -> Any:
        from wlora.experiment import run as experiment

        return experiment.run(compose(*TINY, f"results_dir={results}", *overrides))

    return run


def enter_main(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the entry point in this process, which spares the imports of a fresh one; returns the exit code."""
    from wlora.cli import run

    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the entry point sets it; the test restores it
    with pytest.raises(SystemExit) as end:
        run.main()
    return int(end.value.code or 0)


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunMain:
    """Return `enter_main` with the test's own `monkeypatch`; its result is exit code, output and errors."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what came before is not the command's
        return enter_main(monkeypatch, *words), *capsys.readouterr()

    return call


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Return the file that a bomb makes, once it is shown that one does."""
    file = tmp_path / "boom"
    pickle.loads(pickle.dumps(Bomb(file)))
    assert file.exists()
    file.unlink()
    return file


def run_cli(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m wlora.run` in a fresh process that cannot reach a hub."""
    settings = {"OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT)}
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | settings | environment
    return subprocess.run(
        [sys.executable, "-m", "wlora.run", *words],
        capture_output=True,
        text=True,
        cwd=cwd or ROOT,
        env=env,
        timeout=300,
    )
