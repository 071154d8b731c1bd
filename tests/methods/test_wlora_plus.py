"""WLoRA+: the cut of WeightLoRA, and the growth of what it keeps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.toy_model import SETTINGS, N, Rig
from wlora.methods.base import Setting, Steps
from wlora.methods.parameter_groups import ParameterGroup
from wlora.methods.registry import build_method
from wlora.models.targets import Target
from wlora.training.optimizers import Optimizers


@pytest.mark.parametrize("k", [1, 2, 3])
def test_wlora_plus_keeps_exactly_what_wlora_keeps(k: int) -> None:
    for seed in range(3):
        plain, plus = (Rig(name, k=k, seed=seed, select_steps=12).run(12) for name in ("wlora", "wlora_plus"))
        assert list(plus.method.adapters) == list(plain.method.adapters)
        assert plus.omega == plain.omega and plus.events[0].details == plain.events[0].details


def test_wlora_plus_keeps_exactly_what_wlora_keeps_in_a_whole_run(run_tiny: Any) -> None:
    plain, plus = (run_tiny(f"method={name}", "k=2", "rank=4") for name in ("wlora", "wlora_plus"))
    assert [(a["name"], a["omega"]) for a in plain.adapters] == [(a["name"], a["omega"]) for a in plus.adapters]
    assert plus.parameters["adapter_final"] == plus.parameters["adapter_initial"] > plain.parameters["adapter_final"]


def test_wlora_plus_halves_twice_and_keeps_the_number_of_parameters() -> None:
    rig = Rig("wlora_plus", schedule="halvings", select_steps=12)
    start = rig.method.adapters.count()
    rig.run(6)
    assert [len(rig.method.adapters), {a.rank for a in rig.method.adapters.values()}] == [3, {4}]
    assert rig.method.adapters.count() == start
    rig.run(6)
    assert [len(rig.method.adapters), {a.rank for a in rig.method.adapters.values()}] == [2, {6}]
    assert rig.method.adapters.count() == start
    assert [event.kind for event in rig.events] == ["cut", "extend", "cut", "extend"]


def test_the_second_halving_cannot_bring_idle_adapters_before_active_ones() -> None:
    # Without projections between the cuts active adapters overshoot to below 1, the value that idle ones still have.
    for seed in range(3):
        halved = Rig("wlora_plus", schedule="halvings", select_steps=30, seed=seed).run(30)
        plain = Rig("wlora", k=2, select_steps=30, seed=seed).run(30)
        first, _, second, _ = halved.events
        acting = {name for name, omega in first.details["omega"].items() if omega > 0}
        assert set(second.details["kept"]) == acting == set(plain.method.adapters)


def test_ranks_spend_the_budget_to_within_one_component() -> None:
    # 18 adapters of rank 8 on 5 survivors: 144 components are 29, 29, 29, 29, 28, more to the larger ω.
    ranks = spread([(64, 64)] * 18, [3, 5, 7, 11, 17])
    assert ranks == {17: 29, 11: 29, 7: 29, 5: 29, 3: 28}
    # Linears of three shapes: what is left over is less than one component of the largest.
    shapes = [(32, 32), (32, 128), (128, 32), (64, 64)] * 3
    for kept in ([0, 1, 2], [1, 5], [0, 3, 4, 7], [2, 9, 10]):
        ranks = spread(shapes, kept)
        spent, budget = sum(rank * sum(shapes[index]) for index, rank in ranks.items()), 8 * sum(map(sum, shapes))
        widest = all(rank == min(shapes[index]) for index, rank in ranks.items())
        assert spent <= budget and (budget - spent < 160 or widest), (kept, ranks)


def spread(shapes: list[tuple[int, int]], survivors: list[int]) -> dict[int, int]:
    """Attach adapters of rank 8 to linears and return the ranks that the survivors grow to, ω rising with the index."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(*shape) for shape in shapes)
    method = build_method({"name": "wlora_plus", **SETTINGS["wlora_plus"], "rank": 8, "k": len(survivors)})
    method.plan(Steps(total=40, per_epoch=40))
    targets = [Target(f"layers.{index}", index, "linear") for index in range(len(shapes))]
    method.attach(model, Setting(targets, targets, torch.Generator().manual_seed(0)))
    for index, adapter in enumerate(method.adapters.values()):
        assert adapter.omega is not None
        adapter.omega.data.fill_(1 + index / 100 if index in survivors else 0.0)
    _, extend = method.after_step(4)
    return {int(name.rpartition(".")[2]): rank for name, rank in extend.details["ranks"].items()}


@pytest.mark.parametrize("extension", ["qr", "gaussian"])
def test_wlora_plus_extension_leaves_the_outputs_unchanged(extension: str) -> None:
    for rescale, moments in itertools.product((False, True), repeat=2):
        settings = {"extension": extension, "rescale": rescale, "keep_moments": moments}
        plain, plus = Rig("wlora", select_steps=12).run(12), Rig("wlora_plus", select_steps=12, **settings).run(12)
        assert {a.rank for a in plus.method.adapters.values()} == {6}
        assert {a.scale for a in plus.method.adapters.values()} == {4 / 6 if rescale else 4 / 2}
        torch.testing.assert_close(plus.model(plus.x), plain.model(plain.x), atol=1e-5, rtol=0)


def test_moments_are_kept_where_the_old_components_stay() -> None:
    for extension, kept in (("gaussian", True), ("qr", False)):
        rig = Rig("wlora_plus", select_steps=12, extension=extension, keep_moments=True, rescale=True).run(12)
        for adapter in rig.method.adapters.values():
            assert rig.optimizers.holds_state(adapter.A) is kept is rig.optimizers.holds_state(adapter.B)
        rig.run(3)


def test_extended_moments_are_those_of_before_and_what_rescaling_makes_of_them() -> None:
    adapter = Rig("lora").method.adapters["layers.0"]
    optimizers = Optimizers([ParameterGroup([adapter.A, adapter.B], 1e-2)], weight_decay=0.0)
    for scale in (1.0, 3.0):
        adapter.A.grad, adapter.B.grad = scale * torch.rand_like(adapter.A), scale * torch.rand_like(adapter.B)
        optimizers.step()
    before = {name: dict(optimizers._rules["adamw"].state[getattr(adapter, name)]) for name in "AB"}
    adapter.extend(5, how="gaussian", generator=torch.Generator(), keep_moments=True)
    adapter.rescale(adapter.scale / 4)
    optimizers.rebuild([ParameterGroup([adapter.A, adapter.B], 1e-2)])
    for name, dim, factor in (("A", 0, 1), ("B", 1, 4)):
        state = optimizers._rules["adamw"].state[getattr(adapter, name)]
        assert int(state["step"]) == 2
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            old, new = before[name][key], state[key] * factor**power
            torch.testing.assert_close(new.narrow(dim, 0, 2), old)
            fresh = old.mean(dim, keepdim=True) if key == "exp_avg_sq" else torch.zeros(1, 1)
            torch.testing.assert_close(new.narrow(dim, 2, 3), fresh.expand_as(new.narrow(dim, 2, 3)))


def test_wlora_plus_single_cut_spends_the_budget_on_k_survivors() -> None:
    rig = Rig("wlora_plus", schedule="single", k=2, select_steps=12)
    start = rig.method.adapters.count()
    rig.run(12)
    kept = len(rig.method.adapters)
    assert kept <= 2 and {a.rank for a in rig.method.adapters.values()} == {2 * N // kept}
    assert rig.method.adapters.count() == start


def test_wlora_plus_of_the_release_extends_first_and_disconnects_nothing() -> None:
    rig = Rig("wlora_plus", release=True, schedule="halvings", select_steps=12).run(12)
    assert [event.kind for event in rig.events] == ["extend", "select", "extend", "select"]
    assert len(rig.method.adapters) == N
    assert sorted({a.rank for a in rig.method.adapters.values()}) == [4, 8]
    trained = rig.optimizers.parameters()
    chosen = rig.events[-1].details["kept"]
    assert len(chosen) <= 1 and len(trained) == 2 * len(chosen)
