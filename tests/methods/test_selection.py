"""Selection of adapters: projection, the cut at T, depth; WeightLoRA as the paper and the release have it."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import pytest
import torch

from tests.support.toy_model import SETTINGS, WIDTH, N, Rig, Tanh
from wlora.adapters.layer import AdaptedLinear
from wlora.errors import ConfigError
from wlora.methods.base import Steps
from wlora.methods.registry import build_method
from wlora.methods.selection import project, top_k, top_k_above


def test_top_k_agrees_with_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    for k in range(1, 7):
        omega = torch.randn(6, generator=generator)
        best = max(itertools.combinations(range(6), k), key=lambda chosen: float(omega[list(chosen)].sum()))
        assert torch.nonzero(top_k(omega, k)).flatten().tolist() == sorted(best)


def test_top_k_ranks_by_signed_value_and_breaks_ties_by_index() -> None:
    assert top_k(torch.tensor([-5.0, 1.0, 0.5]), 1).tolist() == [False, True, False]
    assert top_k(torch.tensor([1.0, 1.0, 1.0]), 2).tolist() == [True, True, False]


def test_depth_and_adapters_are_chosen_together() -> None:
    omega, layers = torch.tensor([0.9, 0.2, 0.5, 0.4, 0.3, -1.0]), [0, 0, 1, 1, 2, 2]
    search = lambda k, cost: top_k_above(omega, layers, k, depth_cost=cost, num_layers=3)  # noqa: E731

    # From layer 0: 0.9 + 0.5 − 3c; from 1: 0.5 + 0.4 − 2c; from 2: 0.3 − c. The first two meet at c = 0.5, the last at 0.6.
    for cost, kept, value in ((0.0, [0, 2], 1.4), (0.4, [0, 2], 0.2), (0.55, [2, 3], -0.2), (0.7, [4], -0.4)):
        mask, objective = search(2, cost)
        assert torch.nonzero(mask).flatten().tolist() == kept
        assert objective == pytest.approx(value)
    assert not search(6, 0.0)[0][5], "an ω that is not positive is never kept"


def test_depth_search_agrees_with_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [0, 0, 1, 1, 2, 2, 3]
    for cost in (0.0, 0.2, 0.5, 1.0):
        for k in (1, 3, 7):
            omega = torch.randn(7, generator=generator)
            positive = [i for i in range(7) if omega[i] > 0]
            sets = [c for size in range(1, k + 1) for c in itertools.combinations(positive, size)]
            worth = max(float(omega[list(c)].sum()) - cost * (4 - min(layers[i] for i in c)) for c in sets)
            assert top_k_above(omega, layers, k, depth_cost=cost, num_layers=4)[1] == pytest.approx(worth, abs=1e-6)


def test_depth_decided_once_is_not_projected_and_its_cost_follows_the_spread(run_tiny: Any) -> None:
    words = ["method=wlora_depth", "k=2", "rank=4", "method.rule=once", "method.select_steps=8"]
    spreads = []
    for scale in (1.0, 10.0):  # of the gradients, as another model might have them
        record = run_tiny(*words, "method.depth_cost=0.5", f"method.lr_omega={scale}")
        (cut,) = record.events
        assert all(omega != 0 for omega in cut["omega"].values()), "nothing was set to zero before the cut"
        spread = statistics.pstdev(cut["omega"].values())
        best = sum(sorted((cut["omega"][name] for name in cut["kept"]), reverse=True))
        assert cut["objective"] == pytest.approx(best - 0.5 * spread * cut["layers_to_differentiate"], abs=1e-5)
        spreads.append(spread)
    assert spreads[1] > 2 * spreads[0]
    dear = run_tiny(*words, "method.depth_cost=1e6").events[0]
    assert dear["layers_to_differentiate"] == 1 and dear["predicted_cost"] == {"stored": 0.5, "recomputed": 0.75}


def test_a_free_depth_is_weightlora_and_a_dear_one_cuts_higher(run_tiny: Any) -> None:
    plain = run_tiny("method=wlora", "k=2", "rank=4")
    free = run_tiny("method=wlora_depth", "k=2", "rank=4", "method.depth_cost=0")
    assert (free.metrics, free.adapters) == (plain.metrics, plain.adapters)
    dear = run_tiny("method=wlora_depth", "k=2", "rank=4", "method.depth_cost=100")
    (cut,) = dear.events
    assert cut["lowest_layer"] == 1 and cut["layers_to_differentiate"] == 1
    assert cut["objective"] == pytest.approx(sum(a["omega"] for a in dear.adapters) - 100, abs=1e-4)


def test_nothing_is_projected_before_omega_has_a_gradient() -> None:
    rig = Rig("wlora").run(1)  # B = 0 at the first step, so every gradient of ω is exactly 0
    assert rig.omega == [1.0] * N
    project(rig.method.adapters.values(), lambda omega: top_k(omega, 2))
    assert rig.omega == [1.0] * N


@pytest.mark.parametrize("name", ["lora", "wlora", "wlora_plus", "rlora"])
def test_step_zero_is_the_base_model(name: str) -> None:
    torch.manual_seed(0)
    plain = Tanh()
    rig = Rig(name)
    assert torch.equal(rig.model(rig.x), plain(rig.x))
    assert len(rig.method.adapters) == N


def test_wlora_projects_every_step_and_cuts_at_T() -> None:
    rig = Rig("wlora", select_steps=12).run(11)
    assert sum(value > 0 for value in rig.omega) <= 2 and len(rig.method.adapters) == N
    rig.run(1)
    assert len(rig.method.adapters) <= 2
    assert [event.kind for event in rig.events] == ["cut"] and rig.events[0].step == 12
    plain = [layer for layer in rig.model.layers if not isinstance(layer, AdaptedLinear)]
    assert len(plain) >= N - 2


def test_after_the_cut_omega_is_fixed_and_nothing_of_the_others_is_left() -> None:
    rig = Rig("wlora", select_steps=12).run(11)
    gone_or_kept = {name: (a.A, a.B, a.omega) for name, a in rig.method.adapters.items()}
    rig.run(1)
    fixed = rig.omega
    for name, tensors in gone_or_kept.items():
        kept = name in rig.method.adapters
        assert rig.optimizers.holds_state(tensors[0]) == kept
        assert any(p is tensors[0] for p in rig.model.parameters()) == kept
    rig.run(5)
    assert rig.omega == fixed
    assert all(not a.omega.requires_grad for a in rig.method.adapters.values() if a.omega is not None)


def test_survivors_keep_their_adam_state_through_the_cut() -> None:
    rig = Rig("wlora", select_steps=12).run(12)
    for adapter in rig.method.adapters.values():
        state = next(o.state[adapter.A] for o in rig.optimizers._rules.values() if adapter.A in o.state)
        assert int(state["step"]) == 12


def test_a_zeroed_omega_still_gets_its_gradient_and_may_return() -> None:
    rig = Rig("wlora", select_steps=30).run(3)
    names = list(rig.method.adapters)
    closed = [name for name, value in zip(names, rig.omega, strict=True) if value == 0]
    assert closed
    ((rig.model(rig.x) - rig.y) ** 2).mean().backward()
    adapter = rig.method.adapters[closed[0]]
    assert adapter.omega is not None and adapter.omega.grad is not None and adapter.omega.grad.abs() > 0
    # Let it want back strongly: the next projection takes it in, and its A and B learn again.
    for other in rig.method.adapters.values():
        assert other.omega is not None
        other.omega.grad = torch.zeros(())
    adapter.omega.grad = torch.tensor(-10.0)
    rig.optimizers.step()
    rig.method.after_step(rig.step + 1)
    assert float(adapter.omega.detach()) > 0
    rig.optimizers.zero_grad()
    ((rig.model(rig.x) - rig.y) ** 2).mean().backward()
    assert adapter.B.grad is not None and adapter.B.grad.abs().sum() > 0


def test_fewer_than_k_survive_when_fewer_are_positive() -> None:
    rig = Rig("wlora", k=3, select_steps=12).run(11)
    for index, adapter in enumerate(rig.method.adapters.values()):
        assert adapter.omega is not None
        adapter.omega.data.fill_(1.0 if index == 4 else -1.0)
    event = rig.method.cut(12, rig.method.choose(3))  # type: ignore[attr-defined]
    assert event.details["kept"] == ["layers.4"]


def test_omega_stays_out_of_clipping_and_schedule_in_paper_mode_only() -> None:
    for release in (False, True):
        rig = Rig("wlora", release=release)
        (group,) = [group for group in rig.optimizers.groups if group.rule == "sgd"]
        assert group.scheduled is release and group.clipped is release and group.lr == 0.5


def test_release_never_cuts_never_fixes_and_ignores_dropout() -> None:
    rig = Rig("wlora", release=True, select_steps=5, dropout=0.3).run(20)
    assert rig.events == [] and len(rig.method.adapters) == N
    assert all(a.dropout == 0.0 and not a.positive for a in rig.method.adapters.values())
    assert all(a.omega is not None and a.omega.requires_grad for a in rig.method.adapters.values())
    assert 1 <= len(rig.method.kept()) <= 2


def test_release_starts_A_within_one_over_root_rank() -> None:
    paper, release = Rig("wlora"), Rig("wlora", release=True)
    bound = {False: 1 / WIDTH**0.5, True: 1 / 2**0.5}
    for rig, mode in ((paper, False), (release, True)):
        largest = max(float(a.A.detach().abs().max()) for a in rig.method.adapters.values())
        assert 0.8 * bound[mode] < largest <= bound[mode]


def test_T_that_ends_before_omega_has_a_gradient_is_refused() -> None:
    # B = 0 at the first step, so no ω has moved when T = 1 ends: any choice would be one by position.
    with pytest.raises(ConfigError, match="method.select_steps=1: allowed is a longer one"):
        Rig("wlora", select_steps=1).run(1)
    assert len(Rig("wlora", select_steps=1, k=N).run(1).method.adapters) == N, "nothing to choose"
    with pytest.raises(ConfigError, match="method.select_steps=2: allowed is a longer one"):
        Rig("wlora_plus", schedule="halvings", select_steps=2).run(1)


@pytest.mark.parametrize(("scheduled", "clipped"), [(True, False), (False, True), (True, True)])
def test_schedule_and_clipping_take_omega_in_where_asked(scheduled: bool, clipped: bool) -> None:
    for name in ("wlora", "wlora_plus", "rlora"):
        rig = Rig(name, omega_scheduled=scheduled, omega_clipped=clipped)
        (group,) = [group for group in rig.optimizers.groups if group.rule == "sgd"]
        assert (group.scheduled, group.clipped) == (scheduled, clipped)


def test_neighbours_differ_on_the_same_seed() -> None:
    def trained(name: str, **changed: Any) -> torch.Tensor:
        rig = Rig(name, select_steps=12, **changed) if name in ("wlora", "wlora_plus", "rlora") else Rig(name, **changed)
        return rig.run(30).model(rig.x).detach()

    outputs = {name: trained(name) for name in ("lora", "wlora", "wlora_plus", "rlora")}
    outputs["wlora_plus halvings"] = trained("wlora_plus", schedule="halvings")
    for (first, a), (second, b) in itertools.combinations(outputs.items(), 2):
        assert not torch.allclose(a, b, atol=1e-4), (first, second)


@pytest.mark.parametrize(("total", "per_epoch", "expected"), [(1000, 50, 50), (1000, 400, 100), (350, 7, 7), (16, 4, 3)])
def test_default_T_is_a_tenth_and_at_most_an_epoch(total: int, per_epoch: int, expected: int) -> None:
    method = build_method({"name": "wlora", **SETTINGS["wlora"]})
    method.plan(Steps(total=total, per_epoch=per_epoch))
    assert method.select_steps == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["wlora", "wlora_plus", "rlora"])
def test_an_explicit_T_that_does_not_fit_is_refused_with_the_numbers(name: str) -> None:
    for longest, length in ((10, Steps(total=40, per_epoch=10)), (39, Steps(total=40, per_epoch=40))):
        method = build_method({"name": name, **SETTINGS[name], "select_steps": longest + 1})
        with pytest.raises(ConfigError, match=rf"={longest + 1}: .* 1 to {longest}, .* {length.per_epoch} of them"):
            method.plan(length)
    release = build_method({"name": name, **SETTINGS[name], "select_steps": 11}, release=True)
    release.plan(Steps(total=40, per_epoch=10))


@pytest.mark.parametrize(("changed", "least"), [({}, 4), ({"schedule": "halvings"}, 7)])
def test_a_run_too_short_to_select_is_refused(changed: dict[str, Any], least: int) -> None:
    for total in (1, least - 1):
        with pytest.raises(ConfigError, match=f"the run has {total} optimiser steps: allowed is at least {least}"):
            build_method({"name": "wlora_plus", **SETTINGS["wlora_plus"], **changed}).plan(Steps(total=total, per_epoch=8))
    build_method({"name": "wlora_plus", **SETTINGS["wlora_plus"], **changed}).plan(Steps(total=least, per_epoch=8))


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"rank=17.*{WIDTH}"):
        Rig("lora", rank=17)


def test_full_trains_the_body_and_probe_nothing_of_it() -> None:
    body = sum(p.numel() for layer in Tanh().layers for p in layer.parameters())
    assert sum(p.numel() for p in Rig("full").optimizers.parameters()) == body
    assert Rig("probe").optimizers.parameters() == []
