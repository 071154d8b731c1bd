"""RLoRA: survivors drawn at random, all else as in WeightLoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, compose
from tests.support.toy_model import SETTINGS, N, Rig, Tanh
from wlora.methods.base import Setting, Steps
from wlora.methods.registry import build_method
from wlora.methods.selection import top_k
from wlora.methods.wlora import WLoRA
from wlora.models.architectures import read_architecture
from wlora.models.targets import Target, list_targets

_randperm = torch.randperm


def test_rlora_with_weightloras_set_is_weightlora_bit_for_bit(
    run_tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["k=2", "rank=4", "method.select_steps=10", "train.eval_every=4"]
    sets: list[list[str]] = []

    def watch(method: WLoRA, omega: torch.Tensor) -> torch.Tensor:
        mask = top_k(omega, method.k)
        if len(omega.unique()) > 1:  # before the first gradient of ω nothing is projected
            sets.append([name for name, kept in zip(method.adapters, mask.tolist(), strict=True) if kept])
        return mask

    with monkeypatch.context() as patch:
        patch.setattr(WLoRA, "mask", watch)
        chosen = run_tiny("method=wlora", *words, results=tmp_path / "chosen")
    assert len(sets) > 3 and all(names == sets[0] for names in sets), "the same set from the first projection on"

    order = [target.name for target in list_targets(read_architecture(compose(*TINY).model), "qkv")]
    drawn = torch.tensor(sorted(range(len(order)), key=lambda index: order[index] not in sets[0]))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n, **more: drawn if n == len(order) else _randperm(n, **more))
        random = run_tiny("method=rlora", *words, results=tmp_path / "random")
    assert random.run_id != chosen.run_id
    assert (random.metrics, random.adapters, random.curve) == (chosen.metrics, chosen.adapters, chosen.curve)
    assert random.events == chosen.events


def test_rlora_draws_a_set_per_seed_that_acts_from_the_first_projection_on() -> None:
    kept = {tuple(Rig("rlora", seed=seed, select_steps=12).run(12).method.adapters) for seed in range(6)}
    assert len(kept) > 2 and all(len(names) == 2 for names in kept)
    again = tuple(Rig("rlora", seed=3, select_steps=12).run(12).method.adapters)
    assert again in kept
    rig = Rig("rlora", select_steps=12).run(1)
    assert rig.omega == [1.0] * N, "no gradient, no projection"
    rig.run(10)
    acting = [name for name, omega in zip(rig.method.adapters, rig.omega, strict=True) if omega > 0]
    assert len(rig.method.adapters) == N and len(acting) == 2
    assert rig.run(1).events[0].details["kept"] == acting == list(rig.method.adapters)


def test_rlora_at_start_has_k_adapters_before_the_first_step() -> None:
    rig = Rig("rlora", draw="at_start")
    assert len(rig.method.adapters) == 2
    assert rig.run(20).events == []


def test_rlora_of_the_release_loses_draws_that_hit_no_trainable_module() -> None:
    method = build_method({"name": "rlora", **SETTINGS["rlora"], "k": 4}, release=True)
    method.plan(Steps(total=40, per_epoch=40))
    model = Tanh()
    targets = [Target(f"layers.{index}", index, "linear") for index in range(4)]
    universe = [t for target in targets for t in (target, Target(f"{target.name}.frozen", target.layer, "frozen"))]
    method.attach(model, Setting(targets, universe, torch.Generator().manual_seed(0)))
    # Four draws below n = 4, counted over the universe: two of its first four are frozen, layers 2 and 3 never drawn.
    assert sorted(method.adapters) == ["layers.0", "layers.1"]
