"""What runs of one process share leaves no trace: a run after another equals a run alone, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, compose
from wlora.experiment import run as experiment
from wlora.experiment import shared_inputs as stock_module
from wlora.experiment.shared_inputs import SharedInputs
from wlora.models.source import locate
from wlora.storage.records import Record

SHARED = [*TINY, "task.epochs=1", "precision=fp32"]


def run(results: Path, stock: SharedInputs | None, *words: str) -> tuple[Record, list[Any]]:
    record = experiment.run(compose(*SHARED, f"results_dir={results}", *words), shared=stock)
    lines = (results / "records" / f"{record.run_id}.jsonl").read_text().splitlines()
    return record, [json.loads(line) for line in lines]


@pytest.mark.parametrize("before", ["lora", "wlora", "full", "milora", "nora", "lora_drop", "flexlora", "dora", "vera"])
def test_a_run_after_another_equals_a_run_alone(before: str, tmp_path: Path) -> None:
    stock = SharedInputs()
    words = ["method.outer_rank=16"] if before == "nora" else []
    run(tmp_path / "a", stock, f"method={before}", "seed=3", *words)
    found, curve = run(tmp_path / "a", stock, "method=wlora", "seed=1", "train.eval_every=4")
    alone, expected = run(tmp_path / "b", None, "method=wlora", "seed=1", "train.eval_every=4")
    assert curve == expected and (found.metrics, found.adapters, found.events) == (
        alone.metrics,
        alone.adapters,
        alone.events,
    )
    assert found.parameters == alone.parameters and found.task == alone.task


def test_in_low_precision_and_with_a_saved_model_too(tmp_path: Path) -> None:
    stock = SharedInputs()
    for words in (["train.save_model=true"], ["precision=bf16", "seed=2"], ["train.gradient_checkpointing=true", "seed=4"]):
        run(tmp_path / "a", stock, "method=lora", *words)
    assert run(tmp_path / "a", stock, "method=lora", "seed=5")[1] == run(tmp_path / "b", None, "method=lora", "seed=5")[1]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note what is loaded."""
    done: list[str] = []
    for name in ("load_base", "load_splits", "load_tokenizer"):
        before = getattr(stock_module, name)

        def noted(*args: Any, name: str = name, before: Callable[..., Any] = before, **options: Any) -> Any:
            done.append(name)
            return before(*args, **options)

        monkeypatch.setattr(stock_module, name, noted)
    return done


def test_everything_is_loaded_once_per_model_and_task(tmp_path: Path, loads: list[str]) -> None:
    stock = SharedInputs()
    for words in (["method=lora"], ["method=wlora", "seed=1"], ["method=rlora", "lr=1e-2"]):
        run(tmp_path, stock, *words)
    assert sorted(loads) == ["load_base", "load_splits", "load_tokenizer"]
    run(tmp_path, stock, "method=lora", "task.max_train_rows=64")
    assert loads[3:] == ["load_splits", "load_tokenizer"]
    run(tmp_path, stock, "method=lora", "model=tiny_deberta")
    assert loads[5:] == ["load_splits", "load_tokenizer", "load_base"]


def hand_out(stock: SharedInputs, *words: str, own: bool = False) -> Any:
    config = compose(*SHARED, *words)
    source = locate(config.model)
    material = stock.material(config, source)
    cpu = torch.device("cpu")
    return stock.model(config, source, material, seed=0, own=own, device=cpu, dtype=torch.float32)


def test_frozen_weights_are_shared_and_heads_are_not(loads: list[str]) -> None:
    stock = SharedInputs()
    first, second, third = hand_out(stock), hand_out(stock), hand_out(stock, own=True)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    places = [model.get_parameter(name).data_ptr() for model in (first, second, third)]
    assert places[0] == places[1] != places[2]
    heads = [model.get_parameter("classifier.weight") for model in (first, second, third)]
    assert len({head.data_ptr() for head in heads}) == 3 and torch.equal(heads[0], heads[1])


def test_a_base_that_was_written_into_is_loaded_again(loads: list[str]) -> None:
    stock = SharedInputs()
    name = "bert.encoder.layer.0.attention.self.query.weight"
    expected = hand_out(stock).get_parameter(name).clone()
    hand_out(stock).get_parameter(name).add_(1)
    assert torch.equal(hand_out(stock).get_parameter(name), expected)
    assert loads.count("load_base") == 2


def test_one_run_alone_keeps_no_second_base() -> None:
    stock = SharedInputs(keep=False)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert hand_out(stock).get_parameter(name).data_ptr() != hand_out(stock).get_parameter(name).data_ptr()
    assert stock._base is None
