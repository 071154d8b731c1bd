"""Readers of a study with an index say what they say without, whatever has become of the files or of the index."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.damage import KINDS, damage, flip
from tests.support.synthetic import make_record, watch_loads
from wlora.analysis.study_reader import read_study
from wlora.analysis.tables.best import read_best
from wlora.cli import report
from wlora.distributed import TOLD
from wlora.storage import index
from wlora.storage.index import Entry, Index
from wlora.storage.packing import Unpacker, pack
from wlora.storage.records import Record, RecordStore

KEPT = {"name": "bert.encoder.layer.5.attention.self.query", "omega": 0.5, "rank": 8}
CUT = {"step": 10, "kind": "cut", "kept": [KEPT["name"]], "omega": {KEPT["name"]: 0.5, "another": 0.0}, "lowest_layer": 5}


@pytest.fixture(autouse=True)
def _small_studies_have_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "UNINDEXED", 1)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of two methods with curves, none of whose files has changed of late."""
    for seed in range(2):
        add_run(tmp_path, "method=lora", f"seed={seed}", score=0.7 + seed / 100)
        add_run(tmp_path, "method=wlora", "k=5", f"seed={seed}", score=0.8, adapters=[KEPT], events=[CUT])
    add_run(tmp_path, "method=lora", "lr=1e-2", score=0.6)
    make_record(tmp_path, "task=rte", "method=probe", status="diverged")
    settle(tmp_path)
    return tmp_path


def add_run(results: Path, *words: str, score: float, **fields: Any) -> Record:
    """Write a record and its curve, of which the middle is the best."""
    record, store = make_record(results, "task=sst2", *words, metrics=score, **fields), RecordStore(results)
    curve = store.curve(record.run_id)
    for step in (10, 20, 30):
        curve({"step": step, "loss": 1 / step})
        curve({"step": step, "metrics": {"accuracy": score + (step == 20) / 10}})
    record.curve = curve.checksum()
    store.write(record)
    return record


def settle(results: Path) -> None:
    """Let all files of a study be an hour old."""
    for file in (results / "records").iterdir():
        stat = file.stat()
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns - 3600 * 10**9))


def forget(results: Path) -> None:
    for name in (".index", ".curves"):
        (results / "records" / name).unlink(missing_ok=True)


def told(results: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str], dict[str, Any]]:
    """Return all that a study says to a new command: its records, settings, faults and best scores."""
    TOLD.clear()
    runs, faults = read_study(results)
    return [plain(run.record) for run in runs], [run.setting for run in runs], faults, dict(read_best(results, runs))


def plain(record: Record) -> dict[str, Any]:
    """Return a record as mappings and lists alone."""
    content = dict(vars(record))
    for name in ("adapters", "events", "evaluations"):
        content[name] = list(content[name])
    if "overrides" in record.environment:
        content["environment"] = {**record.environment, "overrides": list(record.environment["overrides"])}
    return content


def test_a_packed_record_is_the_record_to_the_order_of_its_keys() -> None:
    unpack, seen = Unpacker(), 0
    for study in ("cpu_study", "qa_nlg", "baselines"):
        for record in RecordStore(ROOT / "results" / study):
            assert repr(plain(unpack(pack(record)))) == repr(asdict(record))
            seen += 1
    assert seen > 200


def test_the_report_is_the_same_byte_by_byte_with_and_without_an_index(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pages() -> dict[str, bytes]:
        report.main([f"results_dir={study}"])
        return {"report.html": (study / "report.html").read_bytes()}

    read = watch_loads(monkeypatch)
    first = pages()
    assert len(read) == 6 and (study / "records" / ".index").is_file() and (study / "records" / ".curves").is_file()
    read.clear()
    assert pages() == first and not read
    monkeypatch.setattr(index, "UNINDEXED", 1000)
    forget(study)
    assert pages() == first and len(read) == 6 and not (study / "records" / ".index").exists()


def write_again(file: Path, store: RecordStore) -> None:
    record = store.load(file.stem)
    assert record is not None
    record.metrics["accuracy"] = 0.1
    store.write(record)


CHANGES: dict[str, Callable[[Path, RecordStore], object]] = {
    "added": lambda file, store: add_run(store.folder.parent, "method=lora", "seed=7", score=0.9),
    "removed": lambda file, store: (file.unlink(), file.with_suffix(".jsonl").unlink()),
    "written again": write_again,
    "edited in place": lambda file, store: file.write_text(file.read_text().replace("fp32", "fp16")),
    "of another curve": lambda file, store: file.with_suffix(".jsonl").write_text(
        '{"step": 1, "metrics": {"accuracy": 1.0}}'
    ),
    **{kind: lambda file, store, kind=kind: damage(file, kind) for kind in KINDS},
    **{f"{kind} curve": lambda file, store, kind=kind: damage(file.with_suffix(".jsonl"), kind) for kind in KINDS},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_becomes_of_a_file_is_seen(change: str, study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = told(study)
    assert told(study) == before and (study / "records" / ".index").is_file()
    store = RecordStore(study)
    file = next(store.path(record.run_id) for record in store if record.config["method"]["name"] == "wlora")
    CHANGES[change](file, store)
    capsys.readouterr()
    indexed, notices = told(study), capsys.readouterr().err
    forget(study)
    assert indexed == told(study) != before and notices == capsys.readouterr().err


def test_a_damaged_index_costs_time_only(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = told(study)
    read = watch_loads(monkeypatch)
    for name in (".index", ".curves"):
        file = study / "records" / name
        content = file.read_bytes()
        spoilt = [flip(content, place) for place in range(0, len(content), len(content) // 40)]
        spoilt += [content[:length] for length in range(0, len(content), len(content) // 20)]
        spoilt += [b"", b"{}", b"wlora index 1\n" + content.partition(b"\n")[2], content + content.partition(b"\n")[2]]
        for text in spoilt:
            file.write_bytes(text)
            assert told(study) == whole
    assert read
    read.clear()
    assert told(study) == whole and not read, "what was damaged has been written anew"


def test_an_index_that_cannot_be_written_or_read_is_done_without(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(target: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index, "write_whole", full)
    whole = told(study)
    assert not list((study / "records").glob(".*"))
    monkeypatch.undo()
    for name in (".index", ".curves"):
        (study / "records" / name).mkdir()
    assert told(study) == whole


def test_a_file_that_has_just_changed_is_read_again(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    added = add_run(study, "method=lora", "seed=7", score=0.9)
    told(study)
    read = watch_loads(monkeypatch)
    told(study)
    assert read == [added.run_id], "it may change again within one tick of the clock"
    settle(study)
    read.clear()
    told(study)
    told(study)
    assert len(read) == 7, "once more, as all times have changed"


def test_what_killed_writers_left_is_removed(study: Path) -> None:
    left, young = study / "records" / "..index.0", study / "records" / "..index.1"
    left.touch()
    settle(study)
    young.touch()
    told(study)
    assert young.exists() and not left.exists()


def test_of_several_that_write_the_last_counts(study: Path) -> None:
    store = RecordStore(study)
    names = sorted(store.stamps())
    first, second = Index(store, ".json"), Index(store, ".json")
    first.add(Entry(names[0], b"{}", (b"1",)))
    second.add(Entry(names[0], b"{}", (b"2",)))
    second.add(Entry(names[1], b"{}", (b"2",)))
    first.write()
    second.write()
    assert [(entry.name, entry.columns) for entry in Index(store, ".json")] == [(names[0], (b"1",)), (names[1], (b"2",))]
    third = Index(store, ".json")
    (study / "records" / ".index").unlink()
    third.add(Entry(names[2], b"{}", (b"3",)))
    third.write()
    assert [entry.name for entry in Index(store, ".json")] == [names[2]]
    assert len(told(study)[0]) == 6, "columns of another version are none"
