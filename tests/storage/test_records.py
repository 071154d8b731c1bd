from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from tests.conftest import ROOT, TINY, compose
from wlora.config.identity import run_id, scientific_fields, stream_seed
from wlora.config.schema import restore_config
from wlora.errors import ConfigError, RunFault
from wlora.storage import atomic_write as staging
from wlora.storage import records
from wlora.storage.records import MissingFile, Record, RecordStore


def identity(*overrides: str, precision: str = "fp32", data: str | None = "d") -> str:
    config = compose(*TINY, *overrides)
    return run_id(scientific_fields(config, task_data=data, model_data=None, precision=precision))


def test_run_id_changes_with_a_methods_revision_and_the_rate_of_the_head() -> None:
    config = compose("method=wlora")
    assert config.method["revision"] == 2 and "revision" not in compose("method=wlora", "method.select_steps=20").method
    now = scientific_fields(config, task_data=None, model_data=None, precision="fp32")
    del config.method["revision"]
    assert run_id(scientific_fields(config, task_data=None, model_data=None, precision="fp32")) != run_id(now)
    assert len({identity(), identity("head_lr=1e-3"), identity("head_lr=2e-3"), identity("head_lr=null")}) == 3


def test_run_id_ignores_paths_and_logging_and_sees_the_science() -> None:
    same = [
        "results_dir=elsewhere",
        "train.eval_every=5",
        "task.eval_batch_size=7",
        "offline=true",
        "task.path=x",
        "force=true",
    ]
    assert {identity(word) for word in same} == {identity()}
    other = ["seed=1", "rank=4", "lr=2e-3", "method=lora", "compat=release", "task.max_train_rows=64", "warmup=3", "k=2"]
    assert len({identity(word) for word in other} | {identity()}) == len(other) + 1
    assert identity(precision="bf16") != identity() != identity(data="other")


def test_run_id_sees_only_the_keys_its_method_reads() -> None:
    assert identity("method=lora", "k=2") == identity("method=lora")
    assert identity("method=probe", "rank=4", "targets=all") == identity("method=probe")


def test_keys_added_later_count_only_off_their_defaults() -> None:
    before = scientific_fields(compose(*TINY), task_data="d", model_data=None, precision="fp32")
    assert not {"gguf_file", "quantization"} & set(before["model"]) and "gradient_checkpointing" not in before["train"]
    package = ["model=minilm", "task=story_nli"]
    plain, packed = (compose(*package, f"model.quantization={kind}") for kind in ("none", "nf4"))
    ids = [run_id(scientific_fields(c, task_data="d", model_data="m", precision="fp32")) for c in (plain, packed)]
    assert ids[0] != ids[1]
    hub = compose("model=smollm2_135m", "task=story_nli", "model.gguf_file=q4.gguf")
    assert scientific_fields(hub, task_data="d", model_data=None, precision="fp32")["model"]["gguf_file"] == "q4.gguf"
    # The content of a local file says more than its name.
    assert "gguf_file" not in scientific_fields(hub, task_data="d", model_data="m", precision="fp32")["model"]


@pytest.mark.parametrize("study", sorted(path.parent.name for path in (ROOT / "results").glob("*/records")))
def test_committed_records_are_still_found(study: str) -> None:
    """Their configurations, without the keys that came later, hash to the names they were stored under."""
    records = list(RecordStore(ROOT / "results" / study))
    assert records
    for record in records:
        config = restore_config(record.config)
        data = {"task_data": record.task["data"], "model_data": record.model["fingerprint"]}
        assert run_id(scientific_fields(config, **data, precision=record.environment["precision"])) == record.run_id


def test_streams_of_a_seed_are_independent_and_stable() -> None:
    seeds = {stream_seed(seed, name) for seed in range(3) for name in ("init", "order", "dropout", "choice", "adapters")}
    assert len(seeds) == 15
    assert stream_seed(0, "init") == stream_seed(0, "init") < 2**63


def test_a_record_holds_the_keys_of_the_design(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    record = run_tiny("method=wlora")
    content = json.loads((tmp_path / "records" / f"{record.run_id}.json").read_text())
    assert content["status"] == "success" and content["primary_metric"] in content["metrics"]
    assert set(content["parameters"]) >= {"adapter_initial", "adapter_final", "head", "total", "stored"}
    assert set(content["seconds"]) == {"train", "eval", "total"}
    assert content["evaluations"][-1] == {"step": content["steps"]["total"], "seconds": content["seconds"]["train"]}
    assert content["resumed_at"] == [] and content["config"]["method"]["k"] == 5
    assert [event["kind"] for event in content["events"]] == ["cut"]
    for adapter in content["adapters"]:
        assert set(adapter) == {"name", "omega", "rank"} and adapter["omega"] > 0 and adapter["rank"] == 8
    assert content["parameters"]["adapter_final"] == len(content["adapters"]) * 8 * 64
    assert content["environment"]["packages"]["torch"] and content["memory"]["process"] > 0 < content["memory"]["saved"]


def test_a_finished_run_is_not_repeated_unless_forced(
    run_tiny: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_tiny("method=probe")
    capsys.readouterr()
    assert run_tiny("method=probe") == first
    assert "is done" in capsys.readouterr().out
    assert run_tiny("method=probe", "force=true").seconds != first.seconds


def test_a_run_that_did_not_succeed_is_repeated(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    record = run_tiny("method=probe")
    store = RecordStore(tmp_path)
    record.status = "interrupted"
    store.write(record)
    assert run_tiny("method=probe").status == "success"


def test_a_torn_or_foreign_record_counts_as_none(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for text in ("", "{", "[]", "[" * 100_000, '{"schema": 99}', '{"schema": 1, "bogus": 2}', '{"checksum": 1}'):
        store.folder.mkdir(exist_ok=True)
        store.path("x").write_text(text)
        assert store.read("x") is None
        with pytest.raises(ConfigError, match="x.json is damaged"):
            store.load("x")
    assert list(store) == []


def test_a_full_disk_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RecordStore(tmp_path)
    record = Record(run_id="x", status="running", config={})
    store.write(record)
    before = store.path("x").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    record.status = "success"
    with pytest.raises(RunFault, match="No space left"):
        store.write(record)
    assert store.path("x").read_bytes() == before
    assert [file.name for file in store.folder.iterdir()] == ["x.json"]


def test_a_record_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RecordStore(tmp_path)
    record = Record(run_id="x", status="success", config={})
    store.write(record)
    monkeypatch.setattr(staging, "_PAUSES", (0, 0, 0))
    read, faults = records.read_file, 99

    def fail(path: Path) -> bytes:
        nonlocal faults
        if faults:
            faults -= 1
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(records, "read_file", fail)
    with pytest.raises(RunFault, match="x.json cannot be read .Input/output error.; the file is kept"):
        store.read("x")
    faults = 2
    assert store.read("x") == record


def test_a_curve_that_is_removed_or_replaced_is_written_again(tmp_path: Path) -> None:
    curve = RecordStore(tmp_path).curve("x")
    file, elsewhere = tmp_path / "records" / "x.jsonl", tmp_path / "elsewhere"
    elsewhere.write_text("precious")

    def link() -> None:
        file.unlink()
        file.symlink_to(elsewhere)

    changes = (file.unlink, lambda: file.write_text("torn"), link, lambda: shutil.rmtree(file.parent))
    for step, change in enumerate(changes):
        curve({"step": step})
        change()
    curve({"step": 4})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2, 3, 4]
    file.unlink()
    assert curve.finish() == hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    assert elsewhere.read_text() == "precious"


def test_a_non_finite_number_never_reaches_a_record(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        RecordStore(tmp_path).write(Record(run_id="x", status="success", config={}, metrics={"loss": float("nan")}))
    assert not RecordStore(tmp_path).path("x").exists()


@pytest.mark.parametrize(
    ("words", "columns"),
    [
        (["task=story_nli", "model=tiny_bert"], {"label", "prediction", "scores"}),
        (["task=story_qa", "model=tiny_bert", "task.max_train_rows=32"], {"prediction", "exact", "f1", "no_answer"}),
        (
            ["task=story_summary", "model=tiny_bart", "targets=all"],
            {"prediction", "rouge1", "rouge2", "rougeL", "rougeLsum"},
        ),
    ],
)
def test_a_run_keeps_its_predictions_of_the_dev_set(
    words: list[str], columns: set[str], run_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    record = run_tiny("method=lora", "train.max_steps=4", "task.max_eval_rows=40", *words)
    store = RecordStore(tmp_path)
    table = store.read_predictions(record)
    assert table is not None and set(table.column_names) == {"split", "row", *columns} and len(table) == 40
    assert table["row"].to_pylist() == list(range(40)) and set(table["split"].to_pylist()) == {"validation"}
    found = {name: table[name].to_pylist() for name in table.column_names}
    if "scores" in columns:
        assert [max(range(3), key=lambda k: row[k]) for row in found["scores"]] == found["prediction"]
        assert mean(a == b for a, b in zip(found["label"], found["prediction"], strict=True)) == record.metrics["accuracy"]
    else:
        for name in columns - {"prediction", "no_answer"}:
            assert mean(found[name]) == pytest.approx(record.metrics[name], abs=1e-3)
        assert all(isinstance(text, str) for text in found["prediction"])


def test_damaged_predictions_are_told_and_their_loss_costs_no_run(
    run_tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run_tiny("method=probe")
    store = RecordStore(tmp_path)
    file = store.path(record.run_id).with_suffix(".parquet")
    content = file.read_bytes()
    for damaged in (content[:-9], content[:99] + bytes([content[99] ^ 1]) + content[100:], b""):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match="predictions .* are damaged: they do not match their checksum"):
            store.read_predictions(record)
    file.unlink()
    with pytest.raises(MissingFile, match="predictions .* are missing"):
        store.read_predictions(record)
    monkeypatch.setattr(RecordStore, "write_predictions", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    again = run_tiny("method=probe", "force=true")
    assert again.status == "success" and again.predictions is None and store.read_predictions(again) is None
    assert "predictions" in capsys.readouterr().out
