from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.models.test_architectures import SQUARE, attach_on_meta
from tests.support.toy_model import COMMON, SETTINGS, WIDTH, N, Rig, Tanh
from wlora.adapters.variants import GrowingAdapter
from wlora.errors import ConfigError
from wlora.methods.increlora import IncreLoRA

SETTINGS["increlora"] = {
    **COMMON,
    "rank": 4,
    "start_steps": None,
    "every": None,
    "top_h": None,
    "add_rank": None,
    "beta1": 0.85,
    "beta2": 0.85,
    "orthogonal": 0.1,
}


def policy(rig: Rig) -> IncreLoRA:
    assert isinstance(rig.method, IncreLoRA)
    return rig.method


def ranks(rig: Rig) -> list[int]:
    return [adapter.rank for adapter in rig.method.adapters.values()]


def test_starts_as_the_base_model_at_rank_one_with_reserves() -> None:
    torch.manual_seed(0)
    plain = Tanh()
    rig = Rig("increlora")
    torch.testing.assert_close(rig.model(rig.x), plain(rig.x), atol=1e-6, rtol=0)
    assert ranks(rig) == [1] * N
    assert [a.reserve.rank for a in policy(rig).components.values() if a.reserve] == [2] * N  # half of the rank 4


@pytest.mark.parametrize(("add_rank", "top_h"), [(1, None), (2, None), (3, 4), (2, 5)])
def test_the_total_ends_at_the_target_exactly_and_stays(add_rank: int, top_h: int | None) -> None:
    """18 components are missing; 3·4 and 2·5 per growth do not divide them, so the last adapter takes what is left."""
    rig = Rig("increlora", steps=100, add_rank=add_rank, top_h=top_h).run(66)
    assert sum(ranks(rig)) == N * 4
    rig.run(34)
    assert sum(ranks(rig)) == N * 4
    assert all(not a.watching and a.reserve is None for a in policy(rig).components.values())
    totals = [sum(event.details["ranks"].values()) for event in rig.events]
    assert totals == sorted(set(totals)) and totals[-1] == N * 4
    assert all(p.requires_grad for a in rig.method.adapters.values() for p in a.parameters())


def test_the_score_is_the_mean_product_of_update_and_gradient() -> None:
    """Σ|M ∘ ∂L/∂M| / √numel, with ∂L/∂M from autograd on a dense M; two backward passes add up."""
    rig = Rig("increlora")
    method = policy(rig)
    for adapter in method.components.values():
        adapter.gates.data.fill_(0.7)  # type: ignore[union-attr]
    expected = {}
    dense = {name: nn.Parameter(adapter.delta_weight().clone()) for name, adapter in method.components.items()}
    x = rig.x
    for layer, delta in zip(rig.model.layers, dense.values(), strict=True):
        x = torch.tanh(layer.base(x) + x @ delta.T)  # type: ignore[operator, union-attr]
    (2 * ((rig.model.classifier(x).squeeze(-1) - rig.y) ** 2).mean()).backward()
    for name, delta in dense.items():
        assert delta.grad is not None
        expected[name] = float((delta.detach() * delta.grad).abs().sum()) / WIDTH
    for _ in range(2):
        ((rig.model(rig.x) - rig.y) ** 2).mean().backward()
    method.update_scores()
    for name, value in expected.items():
        # After one step the sensitivity is (1 − β₁)·S and the uncertainty (1 − β₂)·|S − (1 − β₁)·S|.
        assert float(method.importance.sensitivity[name]) == pytest.approx(0.15 * value, rel=1e-4)
        assert float(method.importance.score(name)) == pytest.approx(0.15 * value * 0.15 * 0.85 * value, rel=1e-4)


def test_the_highest_scores_grow_and_the_function_changes_by_the_scale_alone() -> None:
    rig = Rig("increlora", steps=100, top_h=2, add_rank=1).run(2)
    method = policy(rig)
    for rank, name in enumerate(method.components):
        method.importance.sensitivity[name], method.importance.uncertainty[name] = (
            torch.tensor(1.0 + rank),
            torch.tensor(1.0),
        )
    before = rig.model(rig.x)
    grown = list(method.components)[-2:]
    method.grow(3)
    assert [name for name, adapter in method.components.items() if adapter.rank == 2] == grown
    for name in grown:
        assert method.components[name].scale == pytest.approx(4 / 2, rel=1e-4)
        method.components[name].scale = 4 / (1 + 1e-5)
    # New reserves act through gates of 1e-5.
    torch.testing.assert_close(rig.model(rig.x), before, atol=1e-5, rtol=0)


def test_reserves_train_ahead_behind_constant_gates() -> None:
    rig = Rig("increlora", steps=100)
    (adapter, *_) = policy(rig).components.values()
    reserve = adapter.reserve
    assert reserve is not None and reserve.gates is not None
    before = reserve.A.detach().clone()
    rig.run(2)
    assert adapter.reserve is reserve and not torch.equal(reserve.A, before)
    assert torch.equal(reserve.gates.detach(), torch.full((2,), 1e-5))


def test_what_grows_later_has_state_and_schedule_of_its_own() -> None:
    rig = Rig("increlora", steps=100, every=5, top_h=6, add_rank=1).run(9)
    (adapter, *_) = policy(rig).components.values()
    first, reserve = adapter.A, adapter.reserve
    assert reserve is not None
    rig.run(1)  # the growth
    assert reserve is not adapter.reserve and adapter.rank == 2
    states = {p: s for rule in rig.optimizers._rules.values() for p, s in rule.state.items()}
    assert int(states[first]["step"]) == int(states[reserve.A]["step"]) == 10
    assert reserve.gates not in states and adapter.reserve is not None and adapter.reserve.A not in states
    starts = {p: group.start for group in rig.optimizers.groups for p in group.parameters}
    assert reserve.gates is not None
    assert [starts[p] for p in (first, reserve.A, reserve.gates, adapter.reserve.A)] == [0, 0, 9, 9]


def test_scores_do_not_depend_on_the_factor_of_a_scaled_loss() -> None:
    found = []
    for scale in (1.0, 2.0**10):
        rig = Rig("increlora", steps=100)
        method = policy(rig)
        (scale * ((rig.model(rig.x) - rig.y) ** 2).mean()).backward()
        method.unscale_backward(scale)
        method.update_scores()
        found.append([float(method.importance.score(name)) for name in method.components])
    assert found[0] == found[1] and any(found[0])


def test_a_step_with_infinite_gradients_leaves_no_trace() -> None:
    rig = Rig("increlora", steps=100).run(2)
    method = policy(rig)
    for adapter in method.components.values():
        adapter.weight_gradient = torch.full((WIDTH, WIDTH), math.inf)
    method.update_scores()
    assert all(math.isfinite(float(method.importance.score(name))) for name in method.components)


def test_growth_on_deberta_ends_at_loras_count() -> None:
    """36 adapters from rank 1 to a mean of 8: 288·1536 = 442,368.

    Table 1 prints 589K, which is neither that nor rank 12 (663,552) nor this with reserves of 4 per adapter (663,552
    again); 384 components (589,824) or 383 with gates (588,671) would give it, and no schedule of the authors does.
    """
    _, method, counts, _ = attach_on_meta("method=increlora")
    assert isinstance(method, IncreLoRA)
    assert counts["adapter_initial"] == 276_480
    for rank, name in enumerate(method.components):
        method.importance.update(name, torch.tensor(float(rank)))
    while method.total_rank() < 288:
        method.grow(1)
    assert method.adapters.count() == 288 * SQUARE == 442_368


@pytest.mark.parametrize(
    "changed",
    [
        {"top_h": 1, "add_rank": 1, "every": 3},
        {"every": 30},
        {"start_steps": 39},
        {"rank": WIDTH + 1},
    ],
)
def test_impossible_growth_is_refused_with_the_numbers(changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\d"):
        Rig("increlora", steps=40, **changed)


def test_differs_from_lora_and_from_adalora() -> None:
    from tests.methods import test_pruning  # noqa: F401  # its settings

    outputs = [Rig(name, steps=60, rank=4).run(60).model(torch.ones(2, WIDTH)).detach() for name in ("lora", "adalora")]
    own = Rig("increlora", steps=60).run(60)
    assert all(not torch.allclose(own.model(torch.ones(2, WIDTH)), other, atol=1e-4) for other in outputs)
    assert len(set(ranks(own))) > 1  # growth is uneven


def test_watching_costs_nothing_in_evaluation() -> None:
    adapter = GrowingAdapter(4, 4, rank=1, std=0.02, scale=1.0)
    adapter.watching = True
    with torch.no_grad():
        adapter(torch.ones(2, 4))
    assert adapter.weight_gradient is None
