"""What is hashed is what is read: a file that changes in between is refused, never recorded under the identity of before."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, compose
from wlora.adapters.peft_format import CONFIG, WEIGHTS
from wlora.config import untrusted_yaml as foreign
from wlora.config.schema import config_folder
from wlora.errors import ConfigError
from wlora.experiment import build
from wlora.experiment import run as experiment
from wlora.experiment import shared_inputs as stock
from wlora.experiment.export import export
from wlora.experiment.shared_inputs import SharedInputs
from wlora.storage.content_hash import hash_file, read_as_hashed
from wlora.storage.records import RecordStore

pytestmark = pytest.mark.integration

SHORT = ["method=lora", "train.max_steps=2", "task.max_train_rows=16", "task.max_eval_rows=8"]


def write_rows(folder: Path, label: str = "neutral") -> Path:
    """Write a folder of a few rows, all of one class."""
    folder.mkdir(exist_ok=True)
    rows = "".join(f"a dog ran {n}\tit moved\t{label}\n" for n in range(16))
    for split in ("train", "validation"):
        (folder / f"{split}.tsv").write_text(f"premise\thypothesis\tlabel\n{rows}")
    return folder


def replaced(file: Path, content: bytes) -> None:
    """Put another file in the place of one, with the times of the first."""
    times = file.stat()
    other = file.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, file)


@pytest.fixture
def saved(run_tiny: Callable[..., Any], tmp_path: Path) -> tuple[Path, Path]:
    """Return folders with a model and with adapters, as runs leave them behind."""
    record = run_tiny(*SHORT, "train.save_model=true", results=tmp_path / "saved")
    return tmp_path / "saved" / "models" / record.run_id, tmp_path / "saved" / "adapters" / record.run_id


def test_data_that_change_between_hash_and_read_are_refused_and_so_is_what_a_sweep_keeps_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, kept = write_rows(tmp_path / "data"), SharedInputs()
    first = (data / "train.tsv").read_bytes()
    second = first.replace(b"neutral", b"entailm")[: len(first)].replace(b"entailm", b"entailment")
    config = compose(*TINY, *SHORT, f"task.path={data}", f"results_dir={tmp_path / 'r'}")
    load = stock.load_splits

    def swap(task: Any, *, offline: bool) -> Any:
        replaced(data / "train.tsv", second)
        return load(task, offline=offline)

    monkeypatch.setattr(stock, "load_splits", swap)
    with pytest.raises(ConfigError, match=rf"task\.path={data}: the files changed between being hashed and being read"):
        experiment.run(config, (), kept)
    assert not list((tmp_path / "r").glob("records/*")) and kept._material is None
    monkeypatch.setattr(stock, "load_splits", load)
    replaced(data / "train.tsv", first)
    record = experiment.run(config, (), kept)
    assert record.status == "success" and RecordStore(tmp_path / "r").load(record.run_id) is not None


@pytest.mark.parametrize("back", [False, True], ids=["stays", "put back"])
def test_rows_that_change_while_they_are_read_are_refused_even_if_the_first_come_back(
    back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "data")
    file = data / "validation.tsv"
    first = file.read_bytes()
    from wlora.data import local_files as files

    read = files.read_table

    def swap(table: Path, columns: Any, *given: Any) -> Any:
        replaced(file, first.replace(b"dog", b"cat"))
        found = read(table, columns, *given)
        if back:
            replaced(file, first)
        return found

    monkeypatch.setattr(files, "read_table", swap)
    with pytest.raises(ConfigError, match="the files changed"):
        experiment.run(compose(*TINY, *SHORT, f"task.path={data}", f"results_dir={tmp_path / 'r'}"))
    assert not list((tmp_path / "r").glob("records/*"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_model_s_file_that_is_replaced_between_hash_and_read_is_refused(
    name: str, saved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = saved
    loader = "load_tokenizer" if name.startswith("tokenizer") else "load_base"
    load = getattr(stock, loader)

    def swap(*given: Any, **named: Any) -> Any:
        content = (model / name).read_bytes()
        replaced(model / name, content[:-1] + bytes([content[-1] ^ 1]) if name.endswith(".safetensors") else content + b" ")
        return load(*given, **named)

    monkeypatch.setattr(stock, loader, swap)
    config = compose(*TINY, *SHORT, f"model.path={model}", f"results_dir={tmp_path / 'r'}")
    with pytest.raises(ConfigError, match=rf"model\.path={model}: the files changed"):
        experiment.run(config)
    assert not list((tmp_path / "r").glob("records/*"))


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_adapters_to_start_from_are_those_that_were_hashed(
    name: str, saved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapters = saved
    config = compose(*TINY, *SHORT, f"adapter.path={adapters}", f"results_dir={tmp_path / 'r'}")
    read = build.read_adapter

    def swap(path: str) -> Any:
        content = (adapters / name).read_bytes()
        replaced(adapters / name, content[:-1] + bytes([content[-1] ^ 1]) if name == WEIGHTS else content + b" ")
        return read(path)

    monkeypatch.setattr(build, "read_adapter", swap)
    with pytest.raises(ConfigError, match=rf"adapter\.path={adapters}: the files changed"):
        experiment.run(config)
    assert not list((tmp_path / "r").glob("records/*"))


def test_an_export_holds_the_bytes_that_were_hashed(
    run_tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run_tiny(*SHORT)
    folder = tmp_path / "adapters" / record.run_id
    expected = {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    from wlora.experiment import export as module

    hashed = module.trained_adapters

    def swap(*given: Any) -> Any:
        found = hashed(*given)
        for name in expected:
            replaced(folder / name, b"{}")
        return found

    monkeypatch.setattr(module, "trained_adapters", swap)
    there = f"results_dir={tmp_path}"
    peft = export([record.run_id, there, "compact=true"])
    assert {name: (peft / name).read_bytes() for name in expected} == expected
    for name, content in expected.items():
        (folder / name).write_bytes(content)
    assert (export([record.run_id, "format=merged", there]) / "model.safetensors").is_file()


def test_what_a_record_does_not_vouch_for_is_not_merged(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    record = run_tiny(*SHORT)
    del record.model["adapter_config"]  # as before the configuration was hashed
    RecordStore(tmp_path).write(record)
    with pytest.raises(ConfigError, match=rf"format=merged: .* allowed is format=peft\nway out: .* from={record.run_id} "):
        export([record.run_id, "format=merged", f"results_dir={tmp_path}"])


def test_a_file_that_changes_within_one_tick_of_the_clock_is_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"first")
    stamp = file.stat()
    monkeypatch.setattr("wlora.storage.content_hash._stamp", lambda file: (0, 0, 5, stamp.st_mtime_ns, stamp.st_ctime_ns))
    before = hash_file(file)
    file.write_bytes(b"other")
    assert hash_file(file) != before
    monkeypatch.setattr(time, "time", lambda: stamp.st_mtime + 60)
    assert hash_file(file) == hash_file(file)


def test_a_touched_file_is_hashed_once_more_and_one_that_is_gone_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"first")
    digest = hash_file(file)
    with read_as_hashed("key", digest, lambda: (hash_file(file), [file])):
        pass
    with (
        pytest.raises(ConfigError, match="cannot be read .No such file"),
        read_as_hashed("key", digest, lambda: (hash_file(file), [file])),
    ):
        file.unlink()


def test_a_link_to_a_file_of_the_package_is_read_where_it_led_when_it_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "task").mkdir()
    link, other = tmp_path / "task" / "x.yaml", tmp_path / "other.yaml"
    link.symlink_to(config_folder() / "task" / "rte.yaml")
    other.write_text("_target_: os.system\n")

    def swap() -> Path:
        link.unlink()
        link.symlink_to(other)
        return config_folder()

    monkeypatch.setattr(foreign, "config_folder", swap)
    found = foreign.FileConfigSource(provider="test", path=f"file://{tmp_path}").load_config("task/x")
    assert found.config.name == "rte" and found.path == f"file://{tmp_path}"
