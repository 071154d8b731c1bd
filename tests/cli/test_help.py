"""What `--help` says, of every method and of the whole."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, enter_main
from tests.support.conf_files import METHODS, read, read_method
from wlora.cli.help import list_keys, read_comments, show
from wlora.config.rules import RULES
from wlora.config.schema import METHOD_NOTES


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """Return the help of each method, and that of the whole as "". tests/cli/test_run.py shows that they need no torch."""
    found = {}
    for name in [*METHODS, ""]:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            assert enter_main(patch, *([f"method={name}"] if name else []), "--help") == 0
        found[name] = out.getvalue()
    return found


def row(text: str, key: str) -> str:
    """Return the line of a key or a method; a line that another one wraps into is indented deeper."""
    (line,) = [line for line in text.splitlines() if re.match(rf" {{2,4}}{re.escape(key)}( |$)", line)]
    return line


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_help_has_a_line_for_each_key(name: str, said: dict[str, str]) -> None:
    text, content = said[name], read_method(name)
    rules = content.get("allowed", {})
    for key in set(content) - {"name", *METHOD_NOTES}:
        if key in rules:
            line = row(text, f"method.{key}")
            assert f" {show(content[key])} " in line and f" {rules[key]} " in line
        else:
            assert RULES[key] in row(text, key)
    for meaning in read_comments(ROOT / "conf" / "method" / f"{name}.yaml").values():
        assert meaning in " ".join(text.split())
    assert RULES["lr"] in row(text, "lr") and RULES["warmup"] in row(text, "warmup")


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_help_tells_paper_authors_values_and_what_is_ambiguous(name: str, said: dict[str, str]) -> None:
    text, content = " ".join(said[name].split()), read_method(name)
    assert content["about"] in text and f"Paper: {content['paper']}" in text
    assert all(item in text for item in content.get("ambiguous", []))
    assert ("method.preset=authors sets" in text) == ("presets" in content)
    for task, values in content.get("presets", {}).get("authors", {}).items():
        told = values if isinstance(values, str) else " ".join(f"{key}={show(value)}" for key, value in values.items())
        assert f" {task.replace('_', ' ')} {told}" in text


def test_the_help_of_the_whole_has_a_line_per_method_and_the_keys_that_runs_turn(said: dict[str, str]) -> None:
    text = said[""]
    for name in METHODS:
        assert read_method(name)["about"] in row(text, name)
    for key, rule in RULES.items():
        assert rule in row(text, key)
    assert "method=NAME --help" in text and "experiment=demo" in text and "method.select_steps" not in text


def test_the_help_of_a_task_tells_the_values_of_its_presets(said: dict[str, str], run_main: Any) -> None:
    assert row(said[""], "task.preset").split()[1] == "null" and "task.presets" not in said[""]
    text = " ".join(run_main("task=xsum", "model=bart_large", "--help")[1].split())
    preset = read("task", "xsum")["presets"]["release"]
    assert "task.preset=release sets what is not given explicitly" in text and preset["source"] in text
    assert f" lora {' '.join(f'{key}={show(value)}' for key, value in preset['lora'].items())}" in text
    assert "task.presets" not in text


def test_help_shows_the_values_that_the_command_line_has_composed(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from wlora.cli import run

    monkeypatch.setattr(sys, "argv", ["run", "method=milora", "rank=4", "--help"])
    with pytest.raises(SystemExit) as end:
        run.main()
    assert not end.value.code
    assert row(capsys.readouterr().out, "alpha").split()[1] == "4.0"


def test_comments_are_read_from_behind_keys_only(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "# about all\na: 1  # first\nb: ${a}\nm:\n  c: null    # null: none\npresets:\n  x:\n    a: 2  # not this\n"
    )
    assert read_comments(file) == {"a": "first", "c": "null: none"}


def test_the_page_of_keys_is_made_from_the_schema() -> None:
    assert list_keys() in (ROOT / "docs" / "keys.md").read_text()
