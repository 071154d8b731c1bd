"""A step reads nothing from the device: what is logged is read then, and a loss that is not finite ends a run soon after."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import TINY, compose
from wlora.experiment import run as experiment
from wlora.storage.records import Record, RecordStore
from wlora.training import losses
from wlora.training import trainer as loop
from wlora.training.losses import Diverged, Losses
from wlora.training.prefetch import Prefetcher
from wlora.training.settings import Computed
from wlora.training.trainer import Trainer

# What a GPU would have to be waited for.
READING = ["item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__"]
# transformers' BERT looks at its mask in every pass; DeBERTa does not.
QUIET = ["model=tiny_deberta", "precision=fp32", "train.max_steps=24", "train.eval_every=24", "train.checkpoint_every=0"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """Note by step what is read of a tensor inside of it; steps without any have an empty list."""
    seen: dict[int, list[str]] = {}
    inside: list[int] = []
    compute, take_step = experiment.compute_gradients, Trainer._take_step

    def compute_gradients(trainer: Trainer, batches: list[list[int]]) -> Computed:
        seen[trainer.step + 1] = []
        inside.append(trainer.step + 1)
        return compute(trainer, batches)

    def take(self: Trainer, step: int, loss: Tensor) -> None:
        take_step(self, step, loss)
        inside.pop()

    def watch(name: str) -> None:
        original = getattr(Tensor, name)

        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1).f_code
            tables = ("occurring_positions", "_divisor")  # of DeBERTa: made on the CPU, once per length and once
            if inside and threading.current_thread() is threading.main_thread() and caller.co_name not in tables:
                seen[inside[-1]].append(f"{name} in {caller.co_filename}:{sys._getframe(1).f_lineno}")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, read)

    monkeypatch.setattr(experiment, "compute_gradients", compute_gradients)
    monkeypatch.setattr(Trainer, "_take_step", take)
    monkeypatch.setattr(loop, "CURVE_POINTS", 1)
    for name in READING:
        watch(name)
    return seen


# With the step of every change of structure, whose decision the host takes.
METHODS = {
    "lora": [],
    "wlora k=2 method.select_steps=8": [8],
    "wlora_plus k=2 method.select_steps=8": [8],
    "wlora_depth k=2 method.select_steps=8": [8],
    "rlora k=2 method.select_steps=8": [8],
    "adalora method.start_steps=2 method.final_steps=6 method.every=2": [18],
    "increlora method.every=6": None,
}


@pytest.mark.parametrize("words", METHODS)
def test_no_step_reads_from_the_device_but_those_of_events(
    words: str, run_tiny: Callable[..., Record], reads: dict[int, list[str]]
) -> None:
    method, *rest = words.split()
    record = run_tiny(*QUIET, f"method={method}", "rank=2", *rest)
    events = {event["step"] for event in record.events}
    assert METHODS[words] is None or events == set(METHODS[words] or [])
    assert list(reads) == list(range(1, 25))
    assert {step: found for step, found in reads.items() if found and step not in events} == {}


def test_the_prefix_is_replayed_without_a_read(run_tiny: Callable[..., Record], reads: dict[int, list[str]]) -> None:
    words = ["method=wlora_depth", "k=2", "method.depth_cost=0.5", "method.select_steps=8", "train.prefix_cache=memory"]
    record = run_tiny(*QUIET, *words)
    assert record.memory["prefix_layers"] == 1
    # The store is filled in the first step behind the cut.
    assert [step for step, found in reads.items() if found] in ([8, 9], [9])


def test_losses_are_read_when_a_point_is_logged_or_after_a_few_steps(
    run_tiny: Callable[..., Record], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The curve is the same however seldom losses are read."""
    counts: list[int] = []
    before = Losses.read

    def read(self: Losses) -> None:
        counts.append(len(self._unread))
        before(self)

    monkeypatch.setattr(Losses, "read", read)
    monkeypatch.setattr(loop, "CURVE_POINTS", 2)
    curves = []
    for every in (1, 5):
        counts.clear()
        monkeypatch.setattr(losses, "READ_EVERY", every)
        record = run_tiny("method=lora", "train.max_steps=24", "train.eval_every=12", results=tmp_path / str(every))
        curves.append((tmp_path / str(every) / "records" / f"{record.run_id}.jsonl").read_text())
    assert max(counts) == 5 and sum(counts) == 24 and len([count for count in counts if count]) == 6
    assert curves[0] == curves[1] and [json.loads(line)["step"] for line in curves[0].splitlines()] == [12, 12, 24, 24]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the loss of one step, counted from 1, be not a number."""

    def at(bad: int) -> None:
        before = experiment.compute_gradients

        def gradients(trainer: Trainer, batches: list[list[int]]) -> Computed:
            computed = before(trainer, batches)
            if trainer.step + 1 != bad:
                return computed
            for p in trainer.optimizers.parameters():
                assert p.grad is not None
                p.grad.fill_(torch.nan)
            return computed._replace(loss=computed.loss * torch.nan)

        monkeypatch.setattr(experiment, "compute_gradients", gradients)
        monkeypatch.setattr(loop, "CURVE_POINTS", 1)

    return at


@pytest.mark.parametrize("method", ["lora", "wlora", "adalora", "increlora"])
def test_a_loss_that_is_not_finite_ends_the_run_within_a_few_steps_and_names_its_own(
    method: str, poison: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    poison(5)
    steps: list[int] = []
    before = Trainer._take_step

    def take_step(self: Trainer, step: int, loss: Tensor) -> None:
        steps.append(step)
        before(self, step, loss)

    monkeypatch.setattr(Trainer, "_take_step", take_step)
    words = [f"method={method}", "k=2"] if method == "wlora" else [f"method={method}"]
    with pytest.raises(Diverged, match="the loss is nan at step 5 of 32"):
        experiment.run(compose(*TINY, f"results_dir={tmp_path}", "train.checkpoint_every=0", *words))
    (record,) = RecordStore(tmp_path)
    assert record.status == "diverged" and record.error is not None and "the loss is nan at step 5 of 32" in record.error
    assert steps[-1] <= losses.READ_EVERY


def test_no_checkpoint_holds_a_loss_that_is_not_finite(poison: Callable[[int], None], tmp_path: Path) -> None:
    poison(5)
    config = compose(*TINY, f"results_dir={tmp_path}", "method=lora", "train.checkpoint_every=3")
    for _ in range(2):  # afresh, and from the checkpoint before
        with pytest.raises(Diverged, match="the loss is nan at step 5 of 32"):
            experiment.run(config)
    assert [folder.name for folder in (tmp_path / "checkpoints").glob("*/*") if folder.is_dir()] == ["step-00000003"]


def test_what_fails_behind_a_loss_that_is_not_finite_is_told_as_that(
    poison: Callable[[int], None], run_tiny: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, step: int) -> list[Any]:
        if step == 6:
            raise AssertionError("a method met numbers that are not finite")
        return []

    monkeypatch.setattr("wlora.methods.lora.LoRA.after_step", fail)
    poison(5)
    with pytest.raises(Diverged, match="the loss is nan at step 5 of 32"):
        run_tiny("method=lora")


def test_batches_are_collated_ahead_and_a_wrong_guess_does_no_harm() -> None:
    threads: list[tuple[list[int], bool]] = []

    def collate(rows: list[int]) -> dict[str, Tensor]:
        threads.append((rows, threading.current_thread() is threading.main_thread()))
        return {"rows": torch.tensor(rows)}

    prefetch = Prefetcher(collate)
    prefetch.expect([1])  # outside of the block nothing is done ahead
    assert threads == []
    with prefetch.running():
        prefetch.expect([1, 2])
        assert prefetch.take([1, 2])["rows"].tolist() == [1, 2]
        prefetch.expect([3])
        assert prefetch.take([4])["rows"].tolist() == [4]
    assert threads[0] == ([1, 2], False) and ([4], True) in threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("collate")]


def test_a_fault_of_the_thread_is_met_where_its_batch_is_taken() -> None:
    def collate(rows: list[int]) -> dict[str, Tensor]:
        raise ValueError("no such row")

    prefetch = Prefetcher(collate)
    with prefetch.running():
        prefetch.expect([1])
        with pytest.raises(ValueError, match="no such row"):
            prefetch.take([1])


def test_a_run_expects_the_rows_that_it_then_takes(run_tiny: Callable[..., Record], monkeypatch: pytest.MonkeyPatch) -> None:
    hits: list[bool] = []
    before = Prefetcher.take

    def take(self: Prefetcher, rows: list[int]) -> dict[str, Tensor]:
        hits.append(self._expected is not None and self._expected[0] == rows)
        return before(self, rows)

    monkeypatch.setattr(Prefetcher, "take", take)
    run_tiny("method=lora", "train.accumulation_steps=3", "train.max_steps=12")
    assert hits == [False] + [True] * (len(hits) - 1) and len(hits) > 30
