"""Records, curves and their neighbours that hold something else: wrong types, endless nesting, pipes and devices."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.synthetic import make_record
from wlora.analysis.figures.footprint import memory
from wlora.analysis.study_reader import read_study
from wlora.cli import figures, report, sweep, tables
from wlora.errors import ConfigError, RunFault
from wlora.experiment import export, rerun
from wlora.reading import MOST_LEVELS, find_misfit, read_json
from wlora.storage.records import Record, RecordStore
from wlora.storage.sealing import seal, unseal
from wlora.training.checkpoints import CheckpointStore

DEEP = {"lists": "[" * 10_000 + "]" * 10_000, "objects": '{"a":' * 10_000 + "1" + "}" * 10_000}
DEEP["levels that Python parses"] = "[" * 400 + "]" * 400
KINDS = ("pipe", "socket", "device", "folder")
WRONG: list[Any] = [None, 5, -1, 0.5, "x", [], {}, True, [1], {"a": 1}, 10**40, "../../x", "\n| a"]


@pytest.fixture(autouse=True)
def _nothing_waits_for_ever() -> Iterator[None]:
    """End a test that waits for a pipe, far beyond the time that any takes."""

    def stop(*_: Any) -> None:
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """Write a study of one run with its curve; neither carries a checksum that would show a change."""
    cut = {"step": 5, "kind": "cut", "kept": ["a"], "omega": {"a": 1.0, "b": 0.5}}
    details: dict[str, Any] = {"adapters": [{"name": "a", "omega": 1.0, "rank": 8}], "events": [cut]}
    made = make_record(tmp_path, "task=sst2", "method=wlora", name="0123456789abcdef", **details)
    curve = RecordStore(tmp_path).curve(made.run_id)
    curve({"step": 5, "loss": 0.5})
    curve({"step": 5, "epoch": 1.0, "metrics": made.metrics})
    return made


def replace(file: Path, kind: str) -> None:
    """Put something that is no regular file in the place of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        with pytest.MonkeyPatch.context() as patch, socket.socket(socket.AF_UNIX) as end:
            patch.chdir(file.parent)  # the name of a socket may not be long
            end.bind(file.name)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()


def read_all(results: Path, run_id: str) -> list[str]:
    """Let every program read a study; returns what those refuse that are asked for the one record. None may crash."""
    sweep.read_records.cache_clear()
    refused = []
    everything: list[Callable[[], object]] = [lambda: tables.main(["all", f"results_dir={results}"])]
    everything += [lambda: tables.main(["summary", f"results_dir={results}"]), lambda: sweep.read_records(results)]
    everything += [lambda: read_study(results, {("sst2", "wlora")})]
    everything += [lambda: report.main([f"results_dir={results}"])]
    asked: list[Callable[[], object]] = [lambda: rerun.prepare([f"from={run_id}", f"results_dir={results}"])]
    asked += [lambda: export.export([run_id, f"results_dir={results}"])]
    for act in [*everything, *asked]:
        try:
            act()
        except SystemExit as end:
            assert end.code in (0, 2)
        except (ConfigError, RunFault) as fault:
            assert len(str(fault).splitlines()) <= 2 and act in asked
            refused.append(str(fault))
    return refused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["0123456789abcdef.json", "0123456789abcdef.jsonl", ".index", "fedcba9876543210.json"])
def test_what_is_no_file_among_the_records_is_told(
    name: str, kind: str, record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "records" / name
    replace(file, kind)
    refused = read_all(tmp_path, record.run_id)
    assert os.path.lexists(file) and "Traceback" not in capsys.readouterr().err
    if name == f"{record.run_id}.json":
        reason = "Is a directory" if kind == "folder" else "No such device" if kind == "socket" else "not a regular file"
        assert all(f"record {file} cannot be read" in line and reason in line for line in refused), refused


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_among_checkpoints_and_measurements_is_told(kind: str, tmp_path: Path) -> None:
    for name in ("manifest.json", "tensors.safetensors"):
        replace(tmp_path / "checkpoints" / "run" / "step-00000001" / name, kind)
    with contextlib.suppress(RunFault):
        list(CheckpointStore(tmp_path, "run", keep=1).read())
    replace(tmp_path / "memory" / "a.json", kind)
    with pytest.raises(ConfigError, match="figure memory: "):
        memory(tmp_path / "memory")


@pytest.mark.parametrize("text", DEEP)
@pytest.mark.parametrize("part", [None, "config", "metrics", "environment", "events", "adapters", "curve"])
def test_a_record_nested_without_end_is_told(
    part: str | None, text: str, record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = RecordStore(tmp_path)
    file = store.path(record.run_id)
    if part == "curve":
        file.with_suffix(".jsonl").write_text(f"{DEEP[text]}\n" * 2)
    elif part is None:
        file.write_text(DEEP[text])
    else:
        content = unseal(file.read_text()) | {part: {"task": "DEEP"}}
        file.write_text(json.dumps(content).replace('"DEEP"', DEEP[text]))
    with pytest.raises(ConfigError, match="is damaged: "):
        store.read_curve(record) if part == "curve" else store.load(record.run_id)
    read_all(tmp_path, record.run_id)
    assert "Traceback" not in capsys.readouterr().err


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside another; of a list the first two."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from places(one, (*path, key))


@pytest.mark.parametrize("number", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_records_of_wrong_types_stop_no_reader(
    number: int, record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys are replaced by something else or removed."""
    file = RecordStore(tmp_path).path(record.run_id)
    whole = unseal(file.read_text())
    cases = [(path, value) for path in places(whole) for value in (*WRONG, ...)]
    chance = random.Random(0)
    for path, value in chance.sample(cases, number):
        content = copy.deepcopy(whole)
        *parents, last = path
        node: Any = content
        for key in parents:
            node = node[key]
        if value is ...:
            del node[last]
        else:
            node[last] = value
        file.write_text(seal(content))
        try:
            read_all(tmp_path, record.run_id)
        except Exception as error:
            raise AssertionError(f"{'.'.join(map(str, path))} = {value!r}") from error
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("metrics", [0.5], "metrics is [0.5], not dict"),
        ("metrics.accuracy", "0.9", "metrics.accuracy is '0.9', not float"),
        ("metrics", {}, "metrics has no accuracy"),
        ("adapters", [{"name": "a", "rank": 8}], "adapters[0].omega is missing"),
        ("events", [{"step": 5, "kind": "cut", "omega": {"a": True}}], "events[0].omega.a is True, not float"),
        ("config.task.columns", 5, "config.task.columns is 5, not list"),
        ("config.lr", "fast", "config.lr is 'fast', not float"),
        ("environment", {"packages": ["torch"]}, "environment.packages is ['torch'], not dict"),
    ],
)
def test_what_is_wrong_in_a_record_is_named(path: str, value: Any, told: str, record: Record, tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    content = unseal(store.path(record.run_id).read_text())
    *parents, last = path.split(".")
    node = content
    for key in parents:
        node = node[key]
    node[last] = value
    store.path(record.run_id).write_text(seal(content))
    with pytest.raises(ConfigError) as fault:
        store.load(record.run_id)
    assert told in str(fault.value) and store.read(record.run_id) is None


def test_a_figure_of_wrong_records_is_no_crash(record: Record, tmp_path: Path) -> None:
    file = RecordStore(tmp_path).path(record.run_id)
    content = unseal(file.read_text())
    for event in ({"step": 5, "kind": "cut"}, {"step": 5, "kind": "cut", "omega": {}}):
        file.write_text(seal(content | {"events": [event]}))
        with contextlib.suppress(SystemExit):
            figures.main(["all", f"results_dir={tmp_path}"])


def test_numbers_and_levels_have_bounds() -> None:
    assert read_json("[" * MOST_LEVELS + "]" * MOST_LEVELS)
    with pytest.raises(ValueError, match="nested"):
        read_json("[" * (MOST_LEVELS + 1) + "]" * (MOST_LEVELS + 1))
    assert find_misfit(1, float) is None and find_misfit(None, float | None) is None
    for value in (True, "1", float("nan"), float("inf"), 10**400, None):
        assert find_misfit(value, float, "x")
