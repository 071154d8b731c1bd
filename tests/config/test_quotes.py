"""Paths and columns with characters that Hydra reads only in quotes: they need none on the command line."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunMain, compose
from tests.support.own_tables import tickets, write
from wlora.cli import sweep
from wlora.config.spelling import explain, quote_texts
from wlora.experiment import dry_run

NAMES = ["données.csv", "größe & co.csv", "it's #1.csv", "tick (1).csv", "tick=1.csv", "tick [1].csv", "[1] é.csv"]
TABLE = ["task=text_classification", "model=tiny_bert", "method=lora"]


def read(word: str) -> Any:
    """Return the value that Hydra reads from a word."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (override,) = OverridesParser.create().parse_overrides([word])
    return override.value()


def refuse(*words: str) -> str:
    """Return the message about words that Hydra cannot read."""
    from hydra.errors import HydraException

    with pytest.raises(HydraException) as caught:
        [read(word) for word in quote_texts(words)]
    return explain(caught.value, words)


@pytest.mark.parametrize("text", [*NAMES, "~/x.csv", "data(1)", "größe text", "C:\\é\\", "{a}.csv", '"a".csv', "folds=5"])
@pytest.mark.parametrize("key", ["task.path", "+task.text", "model.gguf_file"])
def test_a_text_that_hydra_cannot_read_is_read_as_it_is_written(key: str, text: str) -> None:
    (word,) = quote_texts([f"{key}={text}"])
    assert word.startswith(f"{key}='") and read(word) == text


@pytest.mark.parametrize(
    "word",
    [
        *("task.path=a b.csv", "task.path=a\\(1\\).csv", "task.path=C:\\x\\y", "task.path='d/é.csv'", 'task.path="é"'),
        *("task.path=", "task.path=null", "task.text=[a,b]", "task.text=2020", "task.path=a,b", "task.path=choice(a,b)"),
        *("task.path=${oc.env:HOME}/x", "task.validation=0.1", "~task.path", "-m", "task.labels=[é]", "rank=[1"),
        *("task.path=glob(é*)", "task.text=[é]", "task.text={é: 1}"),
    ],
)
def test_other_words_are_not_changed(word: str) -> None:
    assert quote_texts([word]) == [word]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("task.text=[größe,text]", 'of ö\nway out: quotes, as in \'task.text=["größe","text"]\''),
        ("task.path=a,é.csv", 'of é\nway out: quotes, as in \'task.path="a,é.csv"\' or \'task.path="a","é.csv"\''),
        ("task.subset=größe", "of ö\nway out: quotes, as in 'task.subset=\"größe\"'"),
        ("rank=[1", "of [\nallowed is int >= 1"),
    ],
)
def test_what_is_not_quoted_is_named_with_its_quotes(word: str, told: str) -> None:
    assert refuse(word) == f"{word}: the value cannot be read because {told}"
    if "way out" in told:  # what is told can be typed
        assert all(read(shown) for shown in shlex.split(told.partition("as in ")[2].replace(" or ", " ")))


def test_control_characters_are_not_printed() -> None:
    assert refuse("task.subset=é\x1d") == "task.subset=é: the value cannot be read; allowed are printable characters"


def test_a_single_text_with_a_comma_is_shown_with_quotes(run_main: RunMain) -> None:
    code, _, error = run_main(*TABLE, "task.path=Anna, Ben.csv")
    assert code == 2 and error.endswith("\na single text with a comma needs quotes: 'task.path=\"Anna, Ben.csv\"'\n"), error


@pytest.fixture
def unforeseen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(dry_run, "estimate", fail)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_reads_the_file(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, tickets())
    found = compose(*TABLE, f"task.path={file}")
    assert found.task.path == str(file) and found.task.labels == ["bug", "praise", "question"]
    (cell,) = sweep.survey([[*TABLE, f"task.path={file}", "seed=0,1"]])
    assert cell.config.task.path == str(file) and len(cell.wanted) == 2


def test_runs_and_sweeps_read_the_file_and_its_columns(unforeseen: None, run_main: RunMain, tmp_path: Path) -> None:
    columns = tickets()
    named = {"größe text": columns["text"], "Art (neu)": columns["category"]}
    words = [*TABLE, f"task.path={write(tmp_path / 'données (1).csv', named)}", "task.text=größe text"]
    words += ["task.label=Art (neu)", "dry_run=true", f"results_dir={tmp_path / 'é = 1'}"]
    for more in ([], ["-m", "seed=0,1"]):
        code, told, error = run_main(*more, *words)
        assert (code, error) == (0, "") and "task.text=[größe text], task.label=Art (neu)" in told
