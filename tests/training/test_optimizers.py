from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import ROOT, compose
from wlora.experiment.run import run
from wlora.methods.parameter_groups import ParameterGroup
from wlora.training.optimizers import Optimizers, ReleaseAdamW, linear_schedule


def parameter(value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.tensor([value], dtype=torch.float64))


def test_linear_schedule_rises_from_zero_and_falls_to_zero() -> None:
    factors = [linear_schedule(step, warmup=2, total=6) for step in range(7)]
    assert factors == [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert linear_schedule(0, warmup=0, total=4) == 1.0


def test_schedule_and_clipping_spare_the_groups_that_opt_out() -> None:
    a, omega = parameter(), parameter()
    groups = [ParameterGroup([a], 1e-3), ParameterGroup([omega], 2.0, rule="sgd", scheduled=False, clipped=False)]
    optimizers = Optimizers(groups, weight_decay=0.0)
    optimizers.set_schedule(1, warmup=2, total=6)
    a.grad, omega.grad = torch.tensor([30.0], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    optimizers.clip(1.0)
    assert float(a.grad) == pytest.approx(1.0, abs=1e-5) and float(omega.grad) == 3.0
    optimizers.step()
    assert float(omega.detach()) == 1.0 - 2.0 * 3.0
    assert float(a.detach()) == pytest.approx(1.0 - 0.5e-3, abs=1e-6)


def test_a_group_that_starts_later_warms_up_on_its_own() -> None:
    early, late = parameter(), parameter()
    optimizers = Optimizers([ParameterGroup([early], 1.0), ParameterGroup([late], 1.0, start=4)], weight_decay=0.0)
    rates = []
    for step in range(4, 8):
        optimizers.set_schedule(step, warmup=2, total=8)
        (rule,) = optimizers._rules.values()
        rates.append(tuple(group["lr"] for group in rule.param_groups))
    assert rates == [(4 / 6, 0.0), (3 / 6, 0.5), (2 / 6, 1.0), (1 / 6, 0.5)]


@pytest.mark.parametrize("method", ["increlora", "wlora_plus"])
def test_the_step_of_a_change_has_the_scheduled_rate(method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """IncreLoRA grows, and the release's WLoRA+ cuts, between setting the rates and the step."""
    rates: list[set[float]] = []
    step = Optimizers.step

    def noted(optimizers: Optimizers) -> None:
        rates.append({group["lr"] / group["peak"] for rule in optimizers._rules.values() for group in rule.param_groups})
        step(optimizers)

    monkeypatch.setattr(Optimizers, "step", noted)
    words = ["compat=release", "method.select_steps=4"] if method == "wlora_plus" else ["rank=2"]
    words += ["task=story_nli", "model=tiny_bert", f"method={method}", "train.max_steps=24", "warmup=12", "precision=fp32"]
    record = run(compose(*words, "task.max_train_rows=96", "task.max_eval_rows=8", f"results_dir={tmp_path}"))
    assert any(2 < event["step"] < 12 for event in record.events), "the structure changes during the warm-up"
    whole = [linear_schedule(done, warmup=12, total=24) for done in range(12)]
    assert [max(found) for found in rates[:12]] == pytest.approx(whole), "nothing trains at the peak during the warm-up"


def test_rebuild_keeps_survivors_starts_newcomers_and_drops_the_rest() -> None:
    stays, leaves, comes = parameter(), parameter(), parameter()
    optimizers = Optimizers([ParameterGroup([stays, leaves], 1e-2)], weight_decay=0.0)
    for p in (stays, leaves):
        p.grad = torch.ones_like(p)
    optimizers.step()
    optimizers.rebuild([ParameterGroup([stays, comes], 1e-2)])
    assert optimizers.holds_state(stays)
    assert not optimizers.holds_state(leaves) and not optimizers.holds_state(comes)


def test_release_adamw_against_its_formula_and_unlike_torch() -> None:
    ours, theirs = parameter(2.0), parameter(2.0)
    settings = {"lr": 0.1, "eps": 1e-2, "weight_decay": 0.1}
    release, torch_adamw = ReleaseAdamW([{"params": [ours]}], **settings), torch.optim.AdamW([theirs], **settings)
    for p, optimizer in ((ours, release), (theirs, torch_adamw)):
        p.grad = torch.tensor([0.5], dtype=torch.float64)
        optimizer.step()
    m, v = 0.1 * 0.5, 0.001 * 0.25
    stepped = 2.0 - 0.1 * (0.001**0.5) / 0.1 * m / (v**0.5 + 1e-2)
    assert float(ours.detach()) == pytest.approx(stepped - 0.1 * 0.1 * stepped, abs=1e-12)
    assert abs(float(ours.detach()) - float(theirs.detach())) > 1e-4


def test_the_golden_trajectory_of_the_release() -> None:
    """ω and losses of all 60 steps to 1e-8, on a copy of the figures the release printed."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("golden", ROOT / "scripts" / "golden.py")
    assert spec is not None and spec.loader is not None
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    figures = json.loads((ROOT / "tests" / "golden" / "wlora_release.json").read_text())
    assert len(figures["trajectory"]) == 60
    worst_omega, worst_loss = golden.replay(figures)
    assert worst_omega < 1e-8 and worst_loss < 1e-8
    figures["settings"]["adam_eps"], figures["settings"]["lr_omega"] = 1e-6, 0.51
    assert max(golden.replay(figures)) > 1e-4, "another trajectory must not pass"
