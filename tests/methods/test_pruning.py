from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.toy_model import COMMON, SETTINGS, WIDTH, N, Rig, Tanh
from wlora.adapters.layer import LowRankAdapter
from wlora.errors import ConfigError
from wlora.methods.dynamic_lora import contributions
from wlora.methods.importance import Importance, orthogonality

ADALORA: dict[str, Any] = {
    **COMMON,
    "rank": 4,
    "initial_rank": None,
    "start_steps": None,
    "final_steps": None,
    "every": None,
    "beta1": 0.85,
    "beta2": 0.85,
    "orthogonal": 0.1,
}
DYNAMIC: dict[str, Any] = {
    **COMMON,
    "rank": 4,
    "initial_rank": None,
    "start_share": 0.15,
    "end_share": 0.5,
    "every": None,
    "regularization": 0.1,
}
SETTINGS.update(adalora=ADALORA, dynamic_lora=DYNAMIC)
BOTH = ("adalora", "dynamic_lora")


def total_rank(rig: Rig) -> int:
    return sum(a.rank for a in rig.method.adapters.values())


def open_gates(rig: Rig) -> int:
    return sum(int((a.gates != 0).sum()) for a in rig.method.adapters.values() if a.gates is not None)


@pytest.mark.parametrize("name", BOTH)
def test_starts_as_the_base_model_at_one_and_a_half_ranks(name: str) -> None:
    torch.manual_seed(0)
    plain = Tanh()
    rig = Rig(name)
    assert torch.equal(rig.model(rig.x), plain(rig.x))
    assert {a.rank for a in rig.method.adapters.values()} == {6} and total_rank(rig) == N * 6


@pytest.mark.parametrize("name", BOTH)
def test_ends_at_the_target_exactly_and_stays_there_through_momentum(name: str) -> None:
    rig = Rig(name, steps=100).run(60)
    assert total_rank(rig) == N * 4
    pruned = {key: a.rank for key, a in rig.method.adapters.items()}
    rig.run(40 + 10)
    assert {key: a.rank for key, a in rig.method.adapters.items()} == pruned and total_rank(rig) == N * 4
    assert [event.kind for event in rig.events] == ["prune"]


def test_adalora_budget_is_the_cubic_of_the_paper() -> None:
    method: Any = Rig("adalora", steps=100, start_steps=10, final_steps=30).method
    first, last = N * 6, N * 4
    assert method.budget(10) == first and method.budget(70) == last and method.budget(99) == last
    assert method.budget(40) == int(last + (first - last) * 0.5**3)  # half way between 10 and 70


def test_dynamic_lora_prunes_with_the_cube_of_the_progress() -> None:
    method: Any = Rig("dynamic_lora", steps=100).method
    first, pruned_in_the_end = N * 6, N * 2
    assert (method.start, method.end) == (15, 50)
    assert method.budget(15) == first and method.budget(50) == N * 4
    assert method.budget(15 + 21) == first - int(pruned_in_the_end * 0.6**3)


def test_the_two_schedules_bend_opposite_ways() -> None:
    """Half way through its window AdaLoRA has pruned most of what it will, Dynamic LoRA little."""
    adalora: Any = Rig("adalora", steps=100, start_steps=15, final_steps=50).method
    dynamic: Any = Rig("dynamic_lora", steps=100).method
    assert adalora.budget(32) - N * 4 <= 2 < N * 6 - 2 <= dynamic.budget(32)


@pytest.mark.parametrize("name", BOTH)
def test_masks_follow_the_budget_between_start_and_end(name: str) -> None:
    rig = Rig(name, steps=100, every=5) if name == "adalora" else Rig(name, steps=100, every=7)
    method: Any = rig.method
    steps = 30 if name == "adalora" else 15 + 3 * 7
    rig.run(steps)
    assert open_gates(rig) == method.budget(steps) < N * 6


def test_a_masked_gate_may_return_until_the_end() -> None:
    rig = Rig("adalora", steps=100, every=10).run(30)
    masked = [(name, j) for name, a in rig.method.adapters.items() for j in (a.gates == 0).nonzero().flatten().tolist()]  # type: ignore[union-attr]
    assert masked
    rig.run(1)
    assert any(rig.method.adapters[name].gates[j] != 0 for name, j in masked)  # type: ignore[index]


def test_importance_against_hand_computed_figures() -> None:
    importance = Importance(0.5, 0.25)
    importance.update("p", torch.tensor([4.0]))
    assert importance.score("p").item() == pytest.approx(2.0 * (0.75 * 2.0))
    importance.update("p", torch.tensor([1.0]))
    sensitivity = 0.5 * 2.0 + 0.5 * 1.0
    uncertainty = 0.25 * 1.5 + 0.75 * abs(1.0 - sensitivity)
    assert importance.score("p").item() == pytest.approx(sensitivity * uncertainty)


def test_orthogonality_is_the_mean_unsquared_norm() -> None:
    assert orthogonality([torch.eye(3)[:2], 2 * torch.eye(2)]).item() == pytest.approx((0 + (9 + 9) ** 0.5) / 2)


def test_contribution_is_the_share_of_the_frobenius_norm() -> None:
    torch.manual_seed(0)
    adapter = LowRankAdapter(7, 5, rank=3, scale=1.0)
    nn.init.normal_(adapter.B)
    adapter.gates = nn.Parameter(torch.tensor([0.5, -2.0, 0.0]))
    full = (adapter.B * adapter.gates) @ adapter.A
    parts = [(adapter.gates[j] * torch.outer(adapter.B[:, j], adapter.A[j])).norm() / full.norm() for j in range(3)]
    torch.testing.assert_close(contributions(adapter), torch.stack(parts).detach())


def test_dynamic_lora_regularises_until_pruning_has_ended() -> None:
    rig = Rig("dynamic_lora", steps=40)
    expected = (
        sum((a.A.var(dim=1).sum() + a.B.var(dim=0).sum()).item() for a in rig.method.adapters.values()) * 0.1 / (2 * N * 6)
    )
    extra = rig.method.extra_loss()
    assert extra is not None and extra.item() == pytest.approx(expected, rel=1e-5)
    assert rig.run(20).method.extra_loss() is None


def test_adalora_agrees_with_peft_over_fifty_steps() -> None:
    """Same weights and gradients: the same λ after every `update_and_allocate` of PEFT's allocator."""
    peft = pytest.importorskip("peft")
    steps, window = 60, {"start_steps": 5, "final_steps": 10, "every": 2}
    rig = Rig("adalora", steps=steps, **window)
    method: Any = rig.method
    config = peft.AdaLoraConfig(
        init_r=6,
        target_r=4,
        tinit=5,
        tfinal=10,
        deltaT=2,
        total_step=steps,
        target_modules=[f"layers.{i}" for i in range(N)],
    )
    theirs = peft.get_peft_model(Tanh(), config)
    layers = [theirs.base_model.model.layers[i] for i in range(N)]
    generator = torch.Generator().manual_seed(3)
    seen = set()
    for step in range(1, 50):
        for layer, adapter in zip(layers, rig.method.adapters.values(), strict=True):
            assert adapter.gates is not None
            for mine, other in (
                (adapter.A, layer.lora_A["default"]),
                (adapter.B, layer.lora_B["default"]),
                (adapter.gates, layer.lora_E["default"]),
            ):
                value, grad = (torch.randn(mine.shape, generator=generator) for _ in range(2))
                mine.data, mine.grad = value.clone(), grad.clone()
                other.data, other.grad = value.reshape(other.shape).clone(), grad.reshape(other.shape).clone()
        for name, p in theirs.named_parameters():
            if "lora_" in name and p.grad is None:
                p.grad = torch.zeros_like(p)
        method.after_step(step)
        theirs.base_model.update_and_allocate(step)
        ours = torch.stack([a.gates.detach() for a in rig.method.adapters.values()])  # type: ignore[union-attr]
        expected = torch.stack([layer.lora_E["default"].detach().flatten() for layer in layers])
        torch.testing.assert_close(ours, expected)
        seen.add(int((ours == 0).sum()))
    assert min(seen) == 0 and max(seen) > N  # the budget really fell


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("adalora", {"initial_rank": 3}),
        ("dynamic_lora", {"initial_rank": 3}),
        ("adalora", {"start_steps": 30, "final_steps": 10}),
        ("dynamic_lora", {"start_share": 0.5}),
        ("dynamic_lora", {"every": 15}),
        ("adalora", {"rank": WIDTH}),
    ],
)
def test_impossible_budgets_are_refused_with_the_numbers(name: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\d"):
        Rig(name, steps=40, **changed)


def test_neighbours_differ() -> None:
    outputs = [Rig(name, steps=60, rank=4).run(60).model(torch.ones(2, WIDTH)).detach() for name in ("lora", *BOTH)]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(outputs) for b in outputs[:i])
