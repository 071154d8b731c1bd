"""`train.best` ends with the adapters of the best evaluation, `train.patience` stops early; neither acts before the cut."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, compose
from wlora.config.identity import run_id, scientific_fields
from wlora.errors import ConfigError
from wlora.storage.records import RecordStore
from wlora.training import trainer as training
from wlora.training.best import Best
from wlora.training.interruption import Interrupted

SCORES = {8: 0.9, 16: 0.4, 24: 0.7, 32: 0.6}
WORDS = ("method=wlora", "k=2", "method.select_steps=10", "train.eval_every=8", "train.max_steps=32")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, torch.Tensor]]:
    """Let evaluations score as `SCORES`; returns the trained head at each of them."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    evaluate = training.Trainer._score

    def score(self: training.Trainer) -> dict[str, float]:
        metrics = evaluate(self)
        head = {name: p.detach().clone() for name, p in self.bare_model.named_parameters() if "classifier" in name}
        if self.step not in seen:
            seen[self.step] = head
            metrics["accuracy"] = SCORES[self.step]
        else:
            seen[-1] = head  # the one after the end
        return metrics

    monkeypatch.setattr(training.Trainer, "_score", score)
    return seen


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def kinds(record: Any) -> list[tuple[int, str]]:
    return [(event["step"], event["kind"]) for event in record.events if event["kind"] in ("best", "stopped")]


def test_the_best_evaluation_after_the_cut_is_kept(
    scripted: Any, run_tiny: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    record = run_tiny(*WORDS, "train.best=accuracy")
    assert kinds(record) == [(24, "best")], "not step 8, which is before the cut at 10"
    assert same(scripted[-1], scripted[24]) and not same(scripted[24], scripted[32])
    assert len(record.adapters) == 2 and record.predictions
    assert "\nbest       accuracy after step 24 (train.best)\n" in capsys.readouterr().out


def test_by_default_the_last_step_is_reported(scripted: Any, run_tiny: Callable[..., Any]) -> None:
    record = run_tiny(*WORDS)
    assert record.metrics["accuracy"] == SCORES[32] and kinds(record) == [] and -1 not in scripted


def test_patience_stops_after_evaluations_without_a_better_one(
    scripted: Any, run_tiny: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    SCORES.update({40: 0.1, 48: 0.1})
    words = [*WORDS[:-1], "train.max_steps=48", "train.patience=2"]
    record = run_tiny(*words)
    assert kinds(record) == [(40, "stopped")] and max(scripted) == 40
    assert record.metrics["accuracy"] == 0.1, "without train.best the last evaluation counts"
    assert "\nstopped    after step 40 of 48 (train.patience)\n" in capsys.readouterr().out


def test_an_interrupted_run_keeps_the_best_of_before(
    scripted: Any, run_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    step = training.Trainer._take_step

    def stop(self: training.Trainer, number: int, loss: torch.Tensor) -> None:
        if number == 27 and stopped.pop():
            raise KeyboardInterrupt
        step(self, number, loss)

    stopped = [True]
    monkeypatch.setattr(training.Trainer, "_take_step", stop)
    words = [*WORDS, "train.best=accuracy", "train.checkpoint_every=8"]
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        run_tiny(*words)
    stopped = [False]
    best = scripted[24]
    record = run_tiny(*words)
    assert record.resumed_at == [24] and kinds(record) == [(24, "best")] and same(scripted[-1], best)


@pytest.mark.parametrize("words", [("train.best=accuracy",), ("train.patience=2",)])
def test_an_evaluation_where_a_run_is_stopped_does_not_count(
    words: tuple[str, ...], scripted: Any, run_tiny: Callable[..., Any]
) -> None:
    SCORES.update({20: 1.0, 40: 0.1, 48: 0.1})
    words = (*WORDS[:-1], "train.max_steps=48", *words)
    assert run_tiny(*words, "train.until=0.41").status == "stopped" and 20 in scripted
    assert kinds(run_tiny(*words)) == ([(24, "best")] if "best" in words[-1] else [(40, "stopped")])


def test_a_run_that_is_interrupted_after_its_last_evaluation_has_its_predictions(
    scripted: Any, run_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    SCORES.update({40: 0.1, 48: 0.1})
    evaluate = training.Trainer._evaluate

    def stop(self: training.Trainer, step: int) -> dict[str, Any]:
        point = evaluate(self, step)
        if step == 40 and stopped.pop():
            signal.raise_signal(signal.SIGTERM)
        return point

    stopped = [True]
    monkeypatch.setattr(training.Trainer, "_evaluate", stop)
    words = (*WORDS[:-1], "train.max_steps=48", "train.patience=2")
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        run_tiny(*words)
    record = run_tiny(*words)
    assert record.resumed_at == [40] and kinds(record) == [(40, "stopped")] and record.predictions


def test_both_are_part_of_the_identity_only_where_they_are_set() -> None:
    def identity(*words: str) -> str:
        return run_id(scientific_fields(compose(*TINY, *words), task_data="x", model_data=None, precision="fp32"))

    found = [identity(*words) for words in ([], ["train.best=accuracy"], ["train.patience=3"])]
    assert len(set(found)) == 3 and identity("train.best=null", "train.patience=null") == found[0]
    assert identity("train.eval_every=5") == found[0], "evaluations change nothing without them"
    assert len({identity("train.patience=3", f"train.eval_every={n}") for n in ("null", 5, 10)}) == 3


def test_a_metric_that_is_not_computed_is_refused() -> None:
    with pytest.raises(ConfigError, match="train.best=f1: allowed is accuracy, loss, or null"):
        compose(*TINY, "train.best=f1")


def test_a_lower_loss_is_better_and_equal_scores_are_not() -> None:
    class Still:
        adapters: dict[str, Any] = {}

        def last_change(self) -> int:
            return 0

    best, model = Best("loss", 2, "accuracy"), torch.nn.Linear(1, 1)
    for step, loss in enumerate((0.5, 0.4, 0.4, 0.6), start=1):
        best.observe(step, {"loss": loss}, model, Still())  # type: ignore[arg-type]
    assert best.step == 2 and best.exhausted


@pytest.mark.parametrize("method", ["adalora", "increlora", "lora_drop", "wlora_plus", "vera", "full"])
def test_methods_that_change_their_structure_end_with_a_whole_model(method: str, run_tiny: Callable[..., Any]) -> None:
    record = run_tiny(f"method={method}", "train.best=loss", "train.eval_every=4", "train.max_steps=24", "targets=all")
    assert record.status == "success" and [step for step, kind in kinds(record) if kind == "best"]


def test_balanced_weights_raise_the_rare_class(run_tiny: Callable[..., Any], tmp_path: Path) -> None:
    from wlora.tasks.classification import balance_classes

    weights = balance_classes([0, 0, 0, 1], 3)
    assert weights == pytest.approx([2 / 3, 2.0, 0.0]) and sum(weights[n] for n in [0, 0, 0, 1]) == pytest.approx(4)
    lines = "".join(f"{'Anna' if n % 6 else 'Ben'} left,{'many' if n % 6 else 'few'}\n" for n in range(60))
    (tmp_path / "t.csv").write_text(f"text,label\n{lines}")
    words = ["task=text_classification", f"task.path={tmp_path / 't.csv'}", "train.max_steps=16", "method=lora"]
    plain, weighted = run_tiny(*words), run_tiny(*words, "task.class_weights=balanced")
    assert plain.run_id != weighted.run_id
    first = [RecordStore(tmp_path).read_curve(record)[0]["loss"] for record in (plain, weighted)]
    assert first[0] != first[1], "the training loss is another one"
