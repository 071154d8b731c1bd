"""Policies that look at training rows: LoRA-drop and ALoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from wlora.errors import ConfigError
from wlora.methods.lora_drop import choose
from wlora.training.bench import Batch, Bench

from .test_methods import COMMON, ROWS, SETTINGS, WIDTH, N, Rig

SETTINGS.update(
    lora_drop={**COMMON, "keep": 0.5, "threshold": None, "share": False, "sample": 0.5, "stage_steps": None},
    alora={**COMMON, "rank": 3, "rounds": 3, "first_share": 0.25, "between_share": 0.125, "held_out": 8},
)


class Output:
    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


class Called(nn.Module):
    """The toy model with the call of a Hugging Face model."""

    def __init__(self, rig: Rig) -> None:
        super().__init__()
        self.inner = rig.model

    def forward(self, x: torch.Tensor, y: torch.Tensor, attention_mask: torch.Tensor) -> Output:
        return Output(((self.inner(x) - y) ** 2).mean())


def scored(name: str, **changed: Any) -> Rig:
    rig = Rig(name, steps=40, **changed)

    def collate(rows: Sequence[int]) -> Batch:
        index = torch.tensor(list(rows))
        return {"x": rig.x[index], "y": rig.y[index], "attention_mask": torch.ones(len(index))}

    bench = Bench(Called(rig), rows=ROWS, labels=[float(row % 4 == 0) for row in range(ROWS)], collate=collate)
    rig.phases = rig.method.phases(bench, 40)  # type: ignore[attr-defined]
    return rig


def total(rig: Rig) -> int:
    return sum(a.rank for a in rig.method.adapters.values())


def test_sample_is_stratified_and_without_replacement() -> None:
    bench = Bench(nn.Identity(), rows=100, labels=[float(row < 20) for row in range(100)], collate=lambda rows: {})
    drawn = bench.sample(25, torch.Generator().manual_seed(0))
    assert len(set(drawn)) == 25 and sum(row < 20 for row in drawn) == 5
    assert drawn == bench.sample(25, torch.Generator().manual_seed(0)) != bench.sample(25, torch.Generator().manual_seed(1))


def test_lora_drop_keeps_the_set_of_known_norms() -> None:
    importance = {"a": 0.1, "b": 0.5, "c": 0.05, "d": 0.35}
    assert choose(importance, keep=0.5, threshold=None) == ["b", "d"]
    assert choose(importance, keep=0.5, threshold=0.9) == ["b", "d", "a"]
    assert choose(importance, keep=0.5, threshold=0.5) == ["b"]
    assert choose(importance, keep=1.0, threshold=None) == ["b", "d", "a", "c"]


def test_lora_drop_importance_is_the_squared_output_over_the_sample() -> None:
    rig = scored("lora_drop").run(5)
    method: Any = rig.method
    hidden, expected = rig.x[torch.tensor(method._sample)], {}
    for index, layer in enumerate(rig.model.layers):
        expected[f"layers.{index}"] = float(
            (hidden @ rig.method.adapters[f"layers.{index}"].delta_weight().T).square().sum()
        )
        hidden = torch.tanh(layer(hidden)).detach()
    found = method.importance()
    assert sum(found.values()) == pytest.approx(1.0)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value / sum(expected.values()), rel=1e-4)


def test_lora_drop_trains_on_the_sample_first_and_then_drops_half() -> None:
    rig = scored("lora_drop")
    first, second = rig.phases  # type: ignore[attr-defined]
    assert (len(first.rows), first.steps) == (ROWS // 2, 10) and (len(second.rows), second.steps) == (ROWS, 30)
    rig.run(9)
    own = {name: a.A for name, a in rig.method.adapters.items()}
    rig.run(1)
    assert len(rig.method.adapters) == N // 2
    assert all(a.A is own[name] for name, a in rig.method.adapters.items())


def test_lora_drop_shares_one_fresh_set_among_the_others() -> None:
    rig = scored("lora_drop", share=True).run(10)
    assert len(rig.method.adapters) == N
    shared = {id(a) for name, a in rig.method.adapters.items() if name not in rig.events[0].details["kept"]}
    assert len(shared) == 1
    assert rig.method.adapters.count() == (N // 2 + 1) * 2 * 2 * WIDTH  # own ones and one shared, each of rank 2
    before = rig.model(rig.x).detach()
    rig.run(5)
    assert not torch.allclose(rig.model(rig.x), before)


def test_alora_score_has_three_terms() -> None:
    rig = scored("alora").run(6)
    method: Any = rig.method
    bench, batch = method._bench, method._batch
    scores = method.ablation_scores(bench, batch)
    adapter = rig.method.adapters["layers.2"]
    everything = -bench.loss(batch)
    B = adapter.B.data.clone()
    adapter.B.data[:, 1] = 0
    without = -bench.loss(batch)
    others = {name: a.B.data.clone() for name, a in rig.method.adapters.items()}
    for a in rig.method.adapters.values():
        a.B.data.zero_()
    adapter.B.data[:, 1] = B[:, 1]
    alone = -bench.loss(batch)
    for name, a in rig.method.adapters.items():
        a.B.data.copy_(others[name])
    assert scores["layers.2"][1] == pytest.approx(everything - without + alone, abs=1e-6)
    assert all(a.gates is None for a in rig.method.adapters.values())


def test_alora_moves_components_and_keeps_budget_and_function_of_the_growth() -> None:
    rig = scored("alora").run(10)
    assert total(rig) == N * 3 and rig.events[0].kind == "allocate"
    scores = {f"layers.{i}": [float(10 * i + j) for j in range(rig.method.adapters[f"layers.{i}"].rank)] for i in range(N)}
    ranks = {name: a.rank for name, a in rig.method.adapters.items()}
    event = rig.method.allocate(99, scores)  # type: ignore[attr-defined]
    gone = event.details["pruned"]
    assert sum(gone.values()) == N == sum(event.details["added"].values())
    assert not set(gone) & set(event.details["added"])
    assert total(rig) == N * 3
    assert ranks["layers.0"] - gone["layers.0"] == (
        rig.method.adapters["layers.0"].rank if "layers.0" in rig.method.adapters else 0
    )


def test_alora_adds_nothing_when_every_adapter_lost_one() -> None:
    rig = scored("alora").run(5)
    event = rig.method.allocate(6, {f"layers.{i}": [0.0, 5.0, 6.0] for i in range(N)})  # type: ignore[attr-defined]
    assert event.details["added"] == {} and total(rig) == N * 2


def test_alora_scores_on_rows_it_never_trains_on() -> None:
    rig = scored("alora")
    (phase,) = rig.phases  # type: ignore[attr-defined]
    batch = rig.method._batch  # type: ignore[attr-defined]
    trained = {tuple(rig.x[row].tolist()) for row in phase.rows}
    assert len(phase.rows) == ROWS - 8 and not trained & {tuple(row.tolist()) for row in batch["x"]}


def test_what_is_left_of_a_pruned_adapter_keeps_its_moments() -> None:
    rig = Rig("lora", rank=3).run(4)
    adapter = rig.method.adapters["layers.0"]
    before = next(o.state[adapter.A] for o in rig.optimizers._rules.values() if adapter.A in o.state)["exp_avg"].clone()
    adapter.prune(torch.tensor([0, 2]))
    rig.optimizers.rebuild(rig.method.groups(1e-2))
    state = next(o.state[adapter.A] for o in rig.optimizers._rules.values() if adapter.A in o.state)
    assert int(state["step"]) == 4 and torch.equal(state["exp_avg"], before[[0, 2]])


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("lora_drop", {"stage_steps": 40}),
        ("alora", {"held_out": ROWS}),
        ("alora", {"rounds": 9}),
        ("alora", {"first_share": 0.9}),
    ],
)
def test_impossible_settings_are_refused_with_the_numbers(name: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\d"):
        scored(name, **changed)


def test_neighbours_differ() -> None:
    outputs = [scored(name).run(30).model(torch.ones(2, WIDTH)).detach() for name in ("lora_drop", "alora")]
    outputs.append(Rig("lora").run(30).model(torch.ones(2, WIDTH)).detach())
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(outputs) for b in outputs[:i])
