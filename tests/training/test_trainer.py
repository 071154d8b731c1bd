from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import TINY, compose
from tests.support.outputs import losses
from wlora.errors import ConfigError, RunFault
from wlora.experiment import run as experiment
from wlora.storage.records import RecordStore
from wlora.tasks.classification import SequenceClassification
from wlora.training import batch_order as batching
from wlora.training import gradients
from wlora.training import trainer as loop
from wlora.training.batch_order import evaluation_batches, group_for_steps, share, training_batches
from wlora.training.losses import Diverged
from wlora.training.optimizers import Optimizers
from wlora.training.prefetch import Prefetcher
from wlora.training.run_length import make_plan
from wlora.training.settings import Computed

LENGTHS = [(7 * row) % 41 + 3 for row in range(230)]


def test_every_row_comes_once_per_epoch_in_batches_of_similar_length() -> None:
    batches = training_batches(LENGTHS, 8, seed=1, epoch=3)
    assert sorted(row for batch in batches for row in batch) == list(range(230))
    assert [len(batch) for batch in batches].count(8) == 28
    padded = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)
    assert padded < 1.1 * sum(LENGTHS)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first = training_batches(LENGTHS, 8, seed=1, epoch=0)
    assert first == training_batches(LENGTHS, 8, seed=1, epoch=0)
    assert first != training_batches(LENGTHS, 8, seed=1, epoch=1)
    assert first != training_batches(LENGTHS, 8, seed=2, epoch=0)


def test_the_longest_batch_comes_first_in_the_first_epoch() -> None:
    batches = training_batches(LENGTHS, 8, seed=1, epoch=0)
    assert max(LENGTHS[row] for row in batches[0]) == max(LENGTHS)


def test_shares_of_processes_cover_a_batch_once() -> None:
    batch = [5, 3, 8, 1, 9]
    assert sorted(row for rank in range(3) for row in share(batch, rank, 3)) == sorted(batch)
    assert share([4], 1, 2) == []


def test_evaluation_covers_all_rows_and_steps_group_micro_batches() -> None:
    assert sorted(row for batch in evaluation_batches(LENGTHS, 64) for row in batch) == list(range(230))
    assert group_for_steps([[0], [1], [2], [3], [4]], 2) == [[[0], [1]], [[2], [3]], [[4]]]


def planned(rows: int, *overrides: str) -> Any:
    return make_plan(compose("task=rte", "model=tiny_bert", *overrides), rows)


def test_plan_counts_optimiser_steps_and_shortens_the_default_warm_up() -> None:
    plan = planned(2490, "train.accumulation_steps=6", "task.batch_size=32", "task.epochs=1")
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup) == (13, 13, 1)  # 13 steps of RTE, as the paper's B.1
    assert "100 to 1" in plan.notice
    long = planned(2490, "train.max_steps=2000")
    assert (long.total_steps, long.warmup, long.notice) == (2000, 100, "")


def test_accumulation_defaults_to_six_for_glue_on_deberta_only() -> None:
    assert compose("task=rte").train.accumulation_steps == 6
    assert compose("task=story_nli").train.accumulation_steps == 1
    assert compose("task=rte", "model=minilm").train.accumulation_steps == 1


@pytest.mark.parametrize("override", ["warmup=13", "train.eval_every=14"])
def test_explicit_values_that_do_not_fit_are_refused_with_the_numbers(override: str) -> None:
    with pytest.raises(ConfigError, match="13"):
        planned(2490, "train.accumulation_steps=6", "task.batch_size=32", "task.epochs=1", override)


def test_same_seed_gives_bit_equal_results_and_another_does_not(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    first = run_tiny("method=wlora", results=tmp_path / "a")
    again = run_tiny("method=wlora", results=tmp_path / "b")
    other = run_tiny("method=wlora", "seed=1", results=tmp_path / "a")
    assert first.run_id == again.run_id != other.run_id
    assert first.metrics == again.metrics and first.adapters == again.adapters and first.events == again.events
    curves = [(tmp_path / folder / "records" / f"{first.run_id}.jsonl").read_bytes() for folder in ("a", "b")]
    assert curves[0] == curves[1] and len(curves[0].splitlines()) > 10
    assert other.metrics["loss"] != first.metrics["loss"]


def test_accumulated_micro_batches_give_the_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two micro-batches of 4 train like one of 8 where dropout is off and rows are the same."""
    monkeypatch.setattr(batching, "training_batches", _plain_batches)

    def run(*overrides: str) -> list[float]:
        architecture = ["+model.architecture.hidden_dropout_prob=0", "+model.architecture.attention_probs_dropout_prob=0"]
        config = compose(*TINY, *architecture, "dropout=0", "method=lora", f"results_dir={tmp_path}", *overrides)
        return losses(tmp_path, experiment.run(config).run_id)

    whole = run("task.batch_size=8", "train.accumulation_steps=1")
    parts = run("task.batch_size=4", "train.accumulation_steps=2")
    assert whole == pytest.approx(parts, rel=1e-4) and len(set(whole)) > 10


def _plain_batches(lengths: list[int], batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    return [list(range(start, min(start + batch_size, len(lengths)))) for start in range(0, len(lengths), batch_size)]


def test_the_first_step_asserts_the_trainable_set(run_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.Trainer._groups
    monkeypatch.setattr(loop.Trainer, "_groups", lambda self: original(self)[:1])  # a head that no optimiser updates
    with pytest.raises(AssertionError, match="is in an optimiser=False"):
        run_tiny("method=lora")


def test_head_and_pooler_train_in_paper_mode_and_stay_as_drawn_in_the_release(run_tiny: Callable[..., Any]) -> None:
    for compat, expected in (("paper", 32 * 32 + 32 + 3 * 32 + 3), ("release", 0)):
        assert run_tiny("method=lora", f"compat={compat}").parameters["head"] == expected


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_head_may_have_a_rate_of_its_own(
    method: str, run_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: dict[str, set[float]] = {}
    check = Optimizers.check

    def note(optimizers: Optimizers, model: torch.nn.Module) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        for group in optimizers.groups:
            for parameter in group.parameters:
                part = "head" if names[parameter].startswith(("classifier.", "bert.pooler.")) else "body"
                peaks.setdefault(part, set()).add(group.lr)
        check(optimizers, model)

    monkeypatch.setattr(Optimizers, "check", note)
    run_tiny(f"method={method}", "lr=1e-3", "head_lr=3e-2")
    assert peaks == {"body": {1e-3}, "head": {3e-2}}
    peaks.clear()
    run_tiny(f"method={method}", "lr=1e-3")
    assert peaks == {"body": {1e-3}, "head": {1e-3}}


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="at step"):
        run_tiny("method=full", "lr=1e30", "warmup=0")
    (record,) = RecordStore(tmp_path)
    assert record.status == "diverged" and record.error is not None and "loss is" in record.error


def refuse_bare_nan(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def diverge(results: Path, *words: str) -> str:
    """Let a run diverge, twice by force; returns what its record says, after looking at all that it wrote."""
    config = compose(*TINY, "method=lora", "precision=fp32", "warmup=0", f"results_dir={results}", *words)
    for force in (False, True):
        config.force = force
        with pytest.raises(Diverged, match="^(?!.*before)"):
            experiment.run(copy.deepcopy(config))
        (record,) = RecordStore(results)
        assert (record.status, record.metrics) == ("diverged", {}) and record.steps and record.seconds
    for file in results.rglob("*.json*"):
        for line in [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines():
            json.loads(line, parse_constant=refuse_bare_nan)
    config.force = False
    with pytest.raises(Diverged, match=f"{record.run_id} has diverged before: .*; force=true repeats it"):
        experiment.run(copy.deepcopy(config))
    assert record.error is not None
    return record.error


SUMMARIES = ["task=story_summary", "model=tiny_bart", "targets=all", "task.generation.max_new_tokens=4"]


@pytest.mark.parametrize(
    ("words", "step"),
    [
        (["train.max_steps=1"], "step 1 of 1"),
        (["train.max_steps=3", "train.eval_every=1", "train.checkpoint_every=1"], "step 1 of 3"),
        (["task=story_qa", "train.max_steps=1"], "step 1 of 1"),  # no validation loss, and scores that hide it
        ([*SUMMARIES, "train.max_steps=1"], "step 1 of 1"),
        (["train.max_steps=1", "model=tiny_llama"], "step 1 of 1"),
    ],
)
def test_logits_that_are_not_finite_at_an_evaluation_end_the_run_as_diverged(
    words: list[str], step: str, tmp_path: Path
) -> None:
    sizes = ["task.max_train_rows=24", "task.max_eval_rows=8"]
    assert f"the logits are not finite on validation at {step}" in diverge(tmp_path, "lr=1e38", *sizes, *words)


def test_a_score_that_is_not_finite_ends_the_run_as_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([0.5, math.nan] * 2)
    monkeypatch.setattr(SequenceClassification, "score", lambda *_: {"accuracy": next(found)})
    words = ["train.max_steps=4", "train.eval_every=2", "train.checkpoint_every=2"]
    assert "accuracy is nan at step 4 of 4" in diverge(tmp_path, *words)


def test_a_change_of_structure_by_numbers_that_are_not_finite_ends_the_run_as_diverged(tmp_path: Path) -> None:
    words = ["method=lora_drop", "lr=1e38", "train.max_steps=3", "train.checkpoint_every=1", "task.max_train_rows=24"]
    assert "the numbers of event cut are not finite at step 1 of 3" in diverge(tmp_path, *words)


def test_what_fails_for_numbers_that_are_not_finite_has_diverged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, step: int) -> None:
        raise RuntimeError("the input has values that are not finite")

    monkeypatch.setattr("wlora.methods.lora.LoRA.after_step", fail)
    assert "the norm of what trains is not finite at step 1" in diverge(tmp_path / "nan", "lr=1e38")
    with pytest.raises(RuntimeError, match="the input has values"):
        experiment.run(compose(*TINY, "method=lora", f"results_dir={tmp_path / 'bug'}"))


def test_evaluation_every_n_steps_does_not_change_the_training(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    sparse = run_tiny("method=lora", results=tmp_path / "a")
    dense = run_tiny("method=lora", "train.eval_every=3", results=tmp_path / "b")
    assert sparse.run_id == dense.run_id and sparse.metrics == dense.metrics
    points = (tmp_path / "b" / "records" / f"{dense.run_id}.jsonl").read_text()
    assert points.count('"metrics"') == 32 // 3 + 1


def test_precision_of_the_adapters_is_float32_over_a_low_base(run_tiny: Callable[..., Any]) -> None:
    for precision in ("bf16", "fp16"):
        record = run_tiny("method=wlora", f"precision={precision}")
        assert record.status == "success" and record.environment["precision"] == precision


def test_loss_scaling_changes_no_update_and_skips_overflown_steps() -> None:
    from torch import nn

    from wlora.methods.parameter_groups import ParameterGroup
    from wlora.training.optimizers import Optimizers

    p, omega = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [ParameterGroup([p], 0.1), ParameterGroup([omega], 1.0, rule="sgd")]
    optimizers, scaler = Optimizers(groups, weight_decay=0.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((2 * p + 3 * omega).sum()).backward()
    assert optimizers.unscale(scaler)
    assert p.grad is not None and float(p.grad) == 2.0 and float(omega.grad or 0) == 3.0
    optimizers.step()
    scaler.update()
    assert float(omega.detach()) == -2.0
    for overflown in (math.inf, math.nan):
        p.grad, omega.grad = torch.tensor([overflown]), torch.tensor([1.0])
        assert not optimizers.unscale(scaler)
        scaler.update()
    assert scaler.get_scale() == 256.0


def scale_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loop scale losses in float32, which is exact, by a factor that doubles with every step."""
    begin = loop.Trainer.begin

    def scaled(trainer: loop.Trainer) -> None:
        begin(trainer)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)

    monkeypatch.setattr(loop.Trainer, "begin", scaled)


@pytest.mark.parametrize("name", ["increlora", "adalora", "wlora_plus", "flexora"])
def test_loss_scaling_changes_no_number(
    name: str, run_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not the scores that a policy takes from the backward pass, nor the step at which the structure changes."""
    words = (f"method={name}", "precision=fp32", "rank=4", "train.max_steps=40", *STILL)
    plain = run_tiny(*words, results=tmp_path / "plain")
    scale_losses(monkeypatch)
    scaled = run_tiny(*words, results=tmp_path / "scaled")
    assert plain.events or name == "adalora"
    assert (scaled.metrics, scaled.events, scaled.adapters) == (plain.metrics, plain.events, plain.adapters)


def test_a_step_that_overflows_changes_nothing(run_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The release clips ω, which has an optimiser of its own, together with the rest."""
    scale_losses(monkeypatch)
    compute, seen = experiment.compute_gradients, list[list[torch.Tensor]]()

    def overflow(trainer: loop.Trainer, batches: list[list[int]]) -> Computed:
        computed = compute(trainer, batches)
        if trainer.step == 5:
            trainer.optimizers.parameters()[0].grad.fill_(math.nan)  # type: ignore[union-attr]
        if trainer.step in (5, 6):
            seen.append([p.detach().clone() for p in trainer.optimizers.parameters()])
        return computed

    monkeypatch.setattr(experiment, "compute_gradients", overflow)
    record = run_tiny("method=wlora", "compat=release", "precision=fp32", "k=2", "train.max_steps=10")
    assert record.status == "success"
    before, after = seen
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_a_model_handed_over_in_evaluation_mode_trains_in_training_mode(
    run_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers hands out every loaded model in evaluation mode: without dropout in the base.
    modes: list[bool] = []
    accumulate = gradients._accumulate

    def watch(trainer: loop.Trainer, batches: list[list[int]]) -> torch.Tensor:
        modes.append(all(module.training for module in trainer.bare_model.modules()))
        return accumulate(trainer, batches)

    monkeypatch.setattr(gradients, "_accumulate", watch)
    run_tiny("model=minilm", "method=lora", "train.max_steps=4", "task.max_train_rows=16", "train.eval_every=2")
    assert modes == [True] * 4


STILL = ["dropout=0", "+model.architecture.hidden_dropout_prob=0", "+model.architecture.attention_probs_dropout_prob=0"]


@pytest.mark.parametrize("method", ["wlora", "increlora"])
def test_out_of_memory_a_step_is_tried_again_in_parts(
    method: str, run_tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_tiny(f"method={method}", *STILL, "precision=fp32", results=tmp_path / "whole")
    before, sizes = Accelerator.backward, []

    def backward(self: Accelerator, loss: torch.Tensor) -> None:
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("as on a small GPU")
        before(self, loss)

    def take(self: Prefetcher, rows: list[int]) -> Any:
        sizes.append(len(rows))
        return kept_take(self, rows)

    kept_take = Prefetcher.take
    monkeypatch.setattr(Prefetcher, "take", take)
    monkeypatch.setattr(Accelerator, "backward", backward)
    parts = run_tiny(f"method={method}", *STILL, "precision=fp32", results=tmp_path / "parts")
    assert [event for event in parts.events if event["kind"] == "out_of_memory"] == [
        {"step": 1, "kind": "out_of_memory", "rows_at_once": 4},
        {"step": 1, "kind": "out_of_memory", "rows_at_once": 2},
    ]
    assert parts.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)
    assert parts.adapters == [{**a, "omega": pytest.approx(a["omega"])} for a in whole.adapters]


def test_a_row_that_does_not_fit_ends_the_run(run_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(self: Accelerator, loss: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("as on a tiny GPU")

    monkeypatch.setattr(Accelerator, "backward", backward)
    with pytest.raises(RunFault, match="out of memory with one row at once"):
        run_tiny("method=lora")
