from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.conftest import ROOT, compose
from tests.support.synthetic import make_record
from wlora.analysis.study import flatten, name_rows, read_value, read_words, require_one_setting, select
from wlora.analysis.study_reader import read_curve, read_runs
from wlora.config.schema import restore_config
from wlora.errors import ConfigError
from wlora.storage.records import RecordStore


def test_a_restored_configuration_is_the_recorded_one(tmp_path: Path) -> None:
    record = make_record(tmp_path, "task=rte", "method=wlora", "k=3")
    again = restore_config({**record.config, "dropped": 1})
    assert again.task.name == "rte" and again.method["k"] == 3 and again.model.name == "minilm"
    assert restore_config({key: value for key, value in record.config.items() if key != "tune_on"}).tune_on is None


@pytest.mark.parametrize(
    "words",
    [
        ["task.columns=[left,right]"],
        ["task.labels=[YES,NO,MAYBE]"],
        ["task.metrics=[accuracy,f1]"],
        ["task.validation=[test]"],
        ["task.kind=question_answering"],
        ["task.path=null", "task.hub_id=me/mine"],
    ],
)
def test_rows_that_are_not_the_benchmarks_have_a_name_of_their_own(words: list[str]) -> None:
    assert name_rows(asdict(compose("task=rte", "task.path=data", *words).task)) == "rte_own"


def test_a_sample_or_a_copy_of_the_benchmark_keeps_its_name() -> None:
    for words in (["task.path=data"], ["task.max_train_rows=10", "task.max_eval_rows=5"], ["task.revision=abc"]):
        assert name_rows(asdict(compose("task=rte", *words).task)) == "rte"
    assert name_rows({"name": "mine", "columns": ["text"]}) == "mine"


def test_runs_of_different_settings_are_refused_with_the_way_to_choose(tmp_path: Path) -> None:
    for epochs in (1, 2):
        make_record(tmp_path, "task=sst2", f"task.epochs={epochs}", f"seed={epochs}")
    with pytest.raises(ConfigError, match=r"here: runs of different settings \(task.epochs: 1.0 \| 2.0\)\nway out: .*=1.0"):
        require_one_setting(read_runs(tmp_path), "here")
    require_one_setting(read_runs(tmp_path), "here", part="method.")
    require_one_setting(read_runs(tmp_path), "here", but="task.")
    require_one_setting(select(read_runs(tmp_path), {"task.epochs": "1"}), "here")


def test_a_key_that_only_some_runs_of_a_method_have_sets_them_apart(tmp_path: Path) -> None:
    """Keys added later are left out of the setting of runs that were recorded before, or have them off."""
    old = make_record(tmp_path, "task=sst2", "method=wlora_plus", "method.schedule=halvings", "seed=0")
    del old.config["method"]["revision"]
    RecordStore(tmp_path).write(old)
    make_record(tmp_path, "task=sst2", "method=wlora_plus", "method.schedule=halvings", "seed=1")
    make_record(tmp_path, "task=sst2", "method=lora", "seed=1")
    runs = read_runs(tmp_path)
    with pytest.raises(ConfigError, match=r"\(method.revision: 2 \| null\)"):
        require_one_setting(runs, "here", part="method.revision")
    assert [run.seed for run in select(runs, {"method.revision": "null", "method": "wlora_plus"})] == [0]
    assert {run.method for run in select(runs, {"method.revision": "2"})} == {"wlora_plus", "lora"}
    grown = [
        make_record(tmp_path, "task=mrpc", f"seed={i}", f"train.grow_batch={kind}")
        for i, kind in enumerate(("off", "micro"))
    ]
    with pytest.raises(ConfigError, match=r"train.grow_batch: micro \| off"):
        require_one_setting([run for run in read_runs(tmp_path) if run.record in grown], "here")


def test_selection_by_any_key(tmp_path: Path) -> None:
    make_record(tmp_path, "task=sst2", "method=wlora", "k=3", "lr=5e-4")
    make_record(tmp_path, "task=sst2", "method=wlora", "k=5", "lr=5e-3")
    make_record(tmp_path, "task=mrpc", "method=full")
    runs = read_runs(tmp_path)
    for run in runs[:2]:  # older than the key, and a name that looks like a number
        del run.record.config["train"]["fast_step"]
        run.record.config["model"]["head"] = "1234567e89012345"
    for filters, number in [
        ({"train.fast_step": "false"}, 3),
        ({"train.fast_step": "true"}, 0),
        ({"model.head": "1234567e89012345"}, 2),
        ({"task": "sst2"}, 2),
        ({"task": "sst2,mrpc"}, 3),
        ({"lr": "5e-3"}, 1),
        ({"method.k": "3"}, 2),  # full has no k: it passes
        ({"method": "wlora", "method.k": "3"}, 1),
        ({"warmup": "null"}, 3),
        ({"seed": "1"}, 0),
    ]:
        assert len(select(runs, filters)) == number, filters
    with pytest.raises(ConfigError, match="did you mean task.epochs"):
        select(runs, {"task.epoch": "1"})
    assert select([], {"whatever": "1"}) == []


def test_words_of_the_command_line() -> None:
    assert [read_value(word) for word in ("null", "true", "3", "5e-4", "qkv")] == [None, True, 3, 5e-4, "qkv"]
    assert read_words(["1", "a=b=c", "model=x"], {"model": None, "n": "0"}) == (
        ["1"],
        {"model": "x", "n": "0"},
        {"a": "b=c"},
    )
    with pytest.raises(ConfigError, match="key=value"):
        read_words(["task="], {})
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}


def test_unreadable_records_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_record(tmp_path, "task=sst2")
    (tmp_path / "records" / "torn.json").write_text("{")
    assert len(read_runs(tmp_path)) == 1
    told = capsys.readouterr().err
    assert told == f"notice: record {tmp_path}/records/torn.json is damaged: it is not complete JSON; it is left out\n"


def test_lost_curves_are_told_once_and_a_damaged_one_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = RecordStore(tmp_path)
    for seed in range(3):
        record = make_record(tmp_path, "task=sst2", f"seed={seed}")
        record.curve = "0" * 16
        store.write(record)
    damaged = store.path(record.run_id).with_suffix(".jsonl")
    damaged.write_text("")
    for run in [*read_runs(tmp_path)] * 2:
        assert read_curve(store, run) == []
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all(line.startswith("notice: learning curve ") for line in told)
    assert sum(line.endswith(".jsonl is missing; all missing learning curves are left out") for line in told) == 1
    damage = "it does not match its checksum in the record"
    assert f"notice: learning curve {damaged} is damaged: {damage}; it is left out" in told


def test_reading_never_imports_torch() -> None:
    code = "import sys, wlora.analysis.study, wlora.cli.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_equal_parts_of_records_are_kept_once(tmp_path: Path) -> None:
    for seed in range(2):
        make_record(tmp_path, "task=sst2", "method=lora", "lr=1e-4", f"seed={seed}")
    first, second = read_runs(tmp_path)
    assert first.seed != second.seed and first.setting is second.setting
    assert first.record.config["model"] is second.record.config["model"]
