"""`~` at the start of a path is the home folder, for every key and command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, compose
from tests.support.llama_folder import write_gguf
from tests.support.model_folders import build_model_folder
from tests.support.own_tables import tickets, write
from wlora.cli import export, figures, predict, report, tables
from wlora.config.spelling import expand_home
from wlora.errors import ConfigError
from wlora.experiment.build import read_start
from wlora.experiment.rerun import prepare
from wlora.models.architectures import read_architecture
from wlora.models.source import locate
from wlora.models.tokenizer import load_tokenizer

TABLE = ["task=text_classification", "model=tiny_bert", "method=lora"]
STRANGE = "~no-such-user/x"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a new folder the home folder and the current one, in which nothing may be named `~`."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    return folder


def test_the_paths_of_data_and_results_are_expanded(home: Path) -> None:
    write(home / "t.csv", tickets())
    found = compose(*TABLE, "task.path=~/t.csv", "results_dir=~/r")
    assert found.task.path == "~/t.csv" and len(found.task.labels) == 3 and found.results_dir == str(home / "r")
    assert expand_home("task.path", "a/~b") == "a/~b"


def test_the_path_of_a_model_is_expanded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_model_folder("bert", home / "m")
    found = compose("task=story_nli", "model.path=~/m").model
    assert (found.path, found.name, read_architecture(found)["model_type"]) == ("~/m", "m", "bert")
    assert locate(found).location == str(home / "m") and load_tokenizer(found, locate(found)).vocab_size > 0
    write_gguf(home / "m" / "q.gguf")
    found = compose("task=story_nli", "model=smollm2_135m", "model.path=~/m", "model.gguf_file=q.gguf").model
    assert locate(found).location == str(home / "m") and read_architecture(found)["model_type"] == "llama"
    monkeypatch.setenv("HOME", str(home / "m"))
    assert compose("task=story_nli", "model.path=~").model.name == "m"


def test_the_paths_of_adapters_and_of_a_repetition_are_expanded(home: Path, run_tiny: Callable[..., Any]) -> None:
    record = run_tiny("method=lora", "train.max_steps=1", results=home / "r")
    found = compose(*TINY, "method=lora", f"adapter.path=~/r/adapters/{record.run_id}")
    assert found.adapter.path.startswith("~") and len(read_start(found).adapters) == 6
    again = prepare([f"from={record.run_id}", "results_dir=~/r"])[1]
    assert again.results_dir == str(home / "r" / "reruns")
    export.main([record.run_id, "results_dir=~/r", "to=~/e"])
    assert (home / "e" / "adapter_config.json").is_file() and not (home / "~").exists()


@pytest.mark.parametrize("key", ["task.path", "task.validation", "results_dir", "model.path", "adapter.path"])
def test_an_unknown_home_folder_is_refused(key: str, home: Path) -> None:
    write(home / "t.csv", tickets())
    with pytest.raises(ConfigError) as caught:
        compose(*TABLE, "task.path=~/t.csv", f"{key}={STRANGE}.csv")
    allowed = f"a path in an existing home folder, or ./{STRANGE}.csv for a name that begins with ~"
    assert str(caught.value) == f"{key}={STRANGE}.csv: allowed is {allowed}"


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (tables.main, ["summary"]),
        (figures.main, ["all"]),
        (report.main, []),
        (export.main, ["0123"]),
        (predict.main, ["0123", "x.csv"]),
    ],
)
def test_an_unknown_home_folder_is_refused_by_other_commands(
    main: Callable[[list[str]], None], words: list[str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, f"results_dir={STRANGE}"])
    assert end.value.code == 2 and f"results_dir={STRANGE}: allowed is a path" in capsys.readouterr().err
    assert not list(home.iterdir())
