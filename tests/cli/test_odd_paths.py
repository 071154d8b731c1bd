"""Paths that cannot be: names that are too long, links, files where folders belong, disks that are full or read-only."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, enter_main
from tests.support.synthetic import make_record
from wlora.adapters.peft_format import CONFIG, WEIGHTS
from wlora.cli import export as export_command
from wlora.cli import figures, memory, report, sweep, tables
from wlora.experiment import export
from wlora.storage.atomic_write import PARTS

LONG = "x" * 300
ENTRIES: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
    "tables": (tables.main, ["all"]),
    "figures": (figures.main, ["all"]),
    "report": (report.main, []),
    "export": (export_command.main, ["0123456789abcdef"]),
    "memory": (memory.main, ["model=tiny_bert", "task=story_nli"]),
}


def survey(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask `wlora.cli.sweep` for one sweep."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(" ".join(words)))
    sweep.main([])


def end(
    program: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Run a program in this process; returns its exit code and the lines of its error."""
    capsys.readouterr()
    if program == "run":
        code = enter_main(monkeypatch, *words)
    else:
        try:
            if program == "sweep":
                survey(words, monkeypatch)
            else:
                entry, first = ENTRIES[program]
                entry([*first, *words])
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return code, "\n".join(line for line in error.splitlines() if not line.startswith("notice: "))


@pytest.mark.parametrize("program", ["run", "sweep", *ENTRIES])
@pytest.mark.parametrize("kind", ["dangling", "long", "a file"])
def test_a_results_folder_that_cannot_be_is_told_in_a_line(
    kind: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a file").write_text("")
    place = tmp_path / (LONG if kind == "long" else kind)
    words = [] if program in ENTRIES else [*TINY, "method=lora"]
    code, error = end(program, [*words, f"results_dir={str(place).replace(' ', chr(92) + ' ')}"], monkeypatch, capsys)
    assert code == 2 and error.startswith("error: ") and len(error.splitlines()) <= 2, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "dangling"]


@pytest.mark.parametrize("key", ["task.path", "model.path", "adapter.path", "model.gguf_file", "from"])
def test_a_name_that_no_file_can_have_is_told_in_a_line(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [f"model.path={tmp_path}"] if key == "model.gguf_file" else []
    words = [f"from={LONG}"] if key == "from" else [*TINY, "method=lora", *first, f"{key}={LONG}"]
    code, error = end("run", [*words, f"results_dir={tmp_path}"], monkeypatch, capsys)
    assert code == 2 and LONG[:250] in error and len(error.splitlines()) <= 2, error


@pytest.mark.parametrize("word", [f"to={LONG}", f"model.path={LONG}", LONG])
def test_an_export_of_or_to_such_a_name_is_told_in_a_line(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = make_record(tmp_path, "task=sst2", "method=lora", name="0123456789abcdef", adapters=[kept()])
    folder = tmp_path / "adapters" / record.run_id
    write_plain(folder)
    monkeypatch.setattr(export, "trained_adapters", lambda results, record: {CONFIG: b"{}", WEIGHTS: b""})
    monkeypatch.setattr(export, "_refuse_unknown_scale", lambda record, results: None)
    monkeypatch.setitem(ENTRIES, "export", (export_command.main, []))
    words = [word] if word == LONG else [record.run_id, word]
    if "model.path" in word:
        words.append("format=merged")
    code, error = end("export", [*words, f"results_dir={tmp_path}"], monkeypatch, capsys)
    assert code in (1, 2) and "xxx" in error and len(error.splitlines()) <= 2, error
    assert not (tmp_path / "exports").exists() or not any((tmp_path / "exports").iterdir())


def kept() -> dict[str, Any]:
    """Return what a record says of an adapter."""
    return {"name": "a", "omega": None, "rank": 1}


def write_plain(folder: Path) -> None:
    """Write the files that make up a folder of adapters; nothing here reads them."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text("{}")
    (folder / WEIGHTS).write_bytes(b"")


@pytest.mark.parametrize("kind", ["a link", "not a folder"])
@pytest.mark.parametrize(
    ("program", "part"),
    [("tables", "tables"), ("figures", "figures"), ("memory", "memory")]
    + [("export", "exports"), ("run", "reruns"), ("run", "tracking"), *(("run", part) for part in PARTS)],
)
def test_what_stands_for_a_folder_that_is_written_into_is_refused(
    program: str, part: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, elsewhere = tmp_path / "results", tmp_path / "elsewhere"
    elsewhere.mkdir()
    record = make_record(results, "task=sst2", "method=lora", name="0123456789abcdef", adapters=[kept()])
    write_plain(results / "adapters" / record.run_id)
    monkeypatch.setattr(export, "trained_adapters", lambda results, record: {CONFIG: b"{}", WEIGHTS: b""})
    monkeypatch.setattr("wlora.experiment.rerun._refuse_other_content", lambda *_: None)
    place = results / part
    if place.exists():
        place.rename(tmp_path / "aside")
    if kind == "a link":
        (tmp_path / "aside" if (tmp_path / "aside").exists() else elsewhere).rename(elsewhere)
        place.symlink_to(elsewhere)
    else:
        place.write_text("precious")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    words = {"reruns": [f"from={record.run_id}"], "tracking": [*TINY, "method=lora", "track=tensorboard"]}
    mine = words.get(part, [*TINY, "method=lora"]) if program == "run" else []
    code, error = end(program, [*mine, f"results_dir={results}"], monkeypatch, capsys)
    assert code == 2 and f"{place} is {kind}: allowed is a real folder" in error, error
    assert len(error.splitlines()) == 1 and not (place.is_file() and place.read_text() != "precious")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("word", ["from=0123456789abcdef", *[" ".join([*TINY, "method=lora"])]])
def test_a_read_only_results_folder_is_told_in_a_line(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_record(tmp_path, "task=sst2", "method=lora", name="0123456789abcdef")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK and allowed(path, mode))  # root may write all
    code, error = end("run", [*word.split(), f"results_dir={tmp_path}"], monkeypatch, capsys)
    assert code == 2 and error.startswith("error: results_dir=") and "can be written" in error, error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("part", ["locks", "memory"])
def test_a_full_disk_is_told_in_a_line(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = os.mkdir

    def full(path: Any, *rest: Any, **named: Any) -> None:
        if Path(path).name == part:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        make(path, *rest, **named)

    monkeypatch.setattr(os, "mkdir", full)
    monkeypatch.setattr(memory, "measure", lambda *_: [])
    words = [*TINY, "method=lora"] if part == "locks" else []
    program = "run" if part == "locks" else "memory"
    code, error = end(program, [*words, f"results_dir={tmp_path}"], monkeypatch, capsys)
    assert code == 1 and str(tmp_path / part) in error and "No space left" in error, error
    assert len(error.splitlines()) == 1 and not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("name", ["../../outside", LONG])
def test_a_measurement_stays_in_its_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "measure", lambda *_: [])
    code, error = end("memory", [f"model.name={name}", f"results_dir={tmp_path / 'a' / 'b'}"], monkeypatch, capsys)
    assert code == 2 and "model.name=" in error and not list(tmp_path.rglob("*.json")), error
