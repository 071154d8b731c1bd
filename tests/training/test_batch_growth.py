"""After a cut the micro-batch grows into the memory that it freed: the same rows per step, or more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, compose
from wlora.experiment.dry_run import describe
from wlora.storage.records import Record
from wlora.training import batch_growth as growth_module
from wlora.training import gradients
from wlora.training import interruption as guard
from wlora.training import trainer as loop
from wlora.training.interruption import Interrupted
from wlora.training.trainer import Trainer

DEPTH = ["method=wlora_depth", "k=2", "method.depth_cost=0.5", "method.select_steps=4", "precision=fp32", "dropout=0"]
QUIET = [f"+model.architecture.{key}=0.0" for key in ("hidden_dropout_prob", "attention_probs_dropout_prob")]
GROWING = [*DEPTH, *QUIET, "task.batch_size=4", "train.accumulation_steps=4", "task.epochs=3"]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let larger micro-batches count as faster, as on a GPU."""
    monkeypatch.setattr(growth_module, "larger_is_faster", lambda device: True)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, float]]:
    """Note the step, micro-batches, rows and learning rate of every update."""
    seen: list[tuple[int, int, int, float]] = []
    before = gradients._accumulate
    passes: list[int] = []

    def accumulate(trainer: Trainer, batches: list[list[int]]) -> Any:
        passes.append(len(trainer.growth.regroup(batches, trainer.data.train.lengths)))
        rate = trainer.optimizers._rules["adamw"].param_groups[0]["lr"]
        seen.append((trainer.step, passes[-1], sum(map(len, batches)), rate))
        return before(trainer, batches)

    monkeypatch.setattr(gradients, "_accumulate", accumulate)
    return seen


def growth(record: Record) -> dict[str, Any]:
    (event,) = [event for event in record.events if event["kind"] == "grow_batch"]
    return event


@pytest.mark.usefixtures("as_on_a_gpu")
def test_micro_keeps_rows_and_rates_and_takes_fewer_passes(
    run_tiny: Callable[..., Record], tmp_path: Path, updates: list[tuple[int, int, int, float]]
) -> None:
    plain = run_tiny(*GROWING, results=tmp_path / "a")
    expected = list(updates)
    updates.clear()
    grown = run_tiny(*GROWING, "train.grow_batch=micro", results=tmp_path / "b")
    event = growth(grown)
    assert event["step"] == 4 and event["bytes_after"] < event["bytes_before"]
    assert event["growth"] == min(4, event["bytes_before"] // event["bytes_after"]) >= 2
    assert [(step, rows, rate) for step, _, rows, rate in updates] == [
        (step, rows, rate) for step, _, rows, rate in expected
    ]
    assert {passes for _, passes, _, _ in updates[:4]} == {4} and max(passes for _, passes, _, _ in updates[4:]) == 2
    assert grown.metrics == pytest.approx(plain.metrics, rel=1e-4) and grown.run_id != plain.run_id


@pytest.mark.usefixtures("as_on_a_gpu")
def test_effective_takes_several_steps_of_the_plan_at_once_and_ends_with_it(
    run_tiny: Callable[..., Record], tmp_path: Path, updates: list[tuple[int, int, int, float]]
) -> None:
    run_tiny(*GROWING, results=tmp_path / "a")
    rates = {step: rate for step, _, _, rate in updates}
    rows = sum(rows for _, _, rows, _ in updates)
    updates.clear()
    record = run_tiny(*GROWING, "train.grow_batch=effective", results=tmp_path / "b")
    grown = growth(record)["growth"]
    starts = [step for step, *_ in updates]
    assert starts[:5] == [0, 1, 2, 3, 4] and starts[5] == 4 + grown
    assert 8 in starts and 16 in starts, "an update never takes rows of two epochs"
    assert sum(count for _, _, count, _ in updates) == rows
    assert all(rate == rates[step] for step, _, _, rate in updates)
    lines = (tmp_path / "b" / "records" / f"{record.run_id}.jsonl").read_text().splitlines()
    assert [point["step"] for point in map(json.loads, lines) if "metrics" in point] == [8, 16, 24]


def test_on_a_cpu_micro_is_off(run_tiny: Callable[..., Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run is that without growth, in its identity, too; whoever asks is told once."""
    words = [*DEPTH, "task.epochs=1", "train.accumulation_steps=2", "train.grow_batch=micro"]
    micro = [run_tiny(*words, f"seed={seed}", results=tmp_path / "a") for seed in (0, 1)]
    assert capsys.readouterr().out.count("notice: train.grow_batch=micro is off on this cpu") == 1
    off = run_tiny(*words[:-1], results=tmp_path / "b")
    assert micro[0].run_id == off.run_id and micro[0].config["train"]["grow_batch"] == "off"
    assert (micro[0].metrics, micro[0].events) == (off.metrics, off.events)
    assert micro[0].run_id in describe(compose(*TINY, *words, f"results_dir={tmp_path / 'a'}"))


def test_on_a_cpu_effective_keeps_its_rows_in_the_micro_batches_of_the_plan(
    run_tiny: Callable[..., Record], updates: list[tuple[int, int, int, float]]
) -> None:
    record = run_tiny(*GROWING, "train.grow_batch=effective")
    grown = growth(record)
    assert grown["growth"] >= 2 and grown["micro_batch"] == 4
    assert all(rows == 4 * passes for _, passes, rows, _ in updates) and max(rows for _, _, rows, _ in updates) > 16


@pytest.mark.usefixtures("as_on_a_gpu")
def test_without_a_cut_nothing_grows(run_tiny: Callable[..., Record]) -> None:
    record = run_tiny("method=lora", "train.grow_batch=micro", "train.accumulation_steps=4")
    assert record.events == []


@pytest.mark.usefixtures("as_on_a_gpu")
def test_what_is_measured_leaves_no_trace(
    run_tiny: Callable[..., Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*DEPTH, "dropout=0.1", "task.batch_size=4"]
    plain = run_tiny(*words, results=tmp_path / "a")
    monkeypatch.setattr(loop, "activation_bytes", lambda model, batch: model(**batch).loss.backward() or 10)
    same = run_tiny(*words, "train.grow_batch=micro", results=tmp_path / "b")
    assert same.metrics == plain.metrics and growth(same)["growth"] == 1
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kind", ["micro", "effective"])
def test_a_stopped_run_goes_on_bit_for_bit(
    kind: str, run_tiny: Callable[..., Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*GROWING, "dropout=0.1", f"train.grow_batch={kind}", "train.prefix_cache=memory"]
    expected = run_tiny(*words, results=tmp_path / "a")
    before = guard.Guard.__call__

    def stop(self: Any, trainer: Any) -> None:
        if trainer.step >= 10 and not self.record.resumed_at:
            self.save(trainer)
            raise Interrupted(15, trainer.step)
        before(self, trainer)

    monkeypatch.setattr(guard.Guard, "__call__", stop)
    with pytest.raises(Interrupted):
        run_tiny(*words, results=tmp_path / "b")
    found = run_tiny(*words, results=tmp_path / "b")
    assert found.resumed_at and (found.metrics, found.adapters, found.events) == (
        expected.metrics,
        expected.adapters,
        expected.events,
    )
