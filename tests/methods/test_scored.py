"""Policies that look at training rows: LoRA-drop, ALoRA, Flexora and FlexLoRA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import compose
from tests.support.toy_model import COMMON, ROWS, SETTINGS, WIDTH, N, Rig
from wlora.errors import ConfigError
from wlora.experiment.run import run
from wlora.methods.flexlora import decompose
from wlora.methods.lora_drop import _with_masks, choose
from wlora.methods.training_data import Batch, TrainingData

SETTINGS.update(
    lora_drop={**COMMON, "keep": 0.5, "threshold": None, "share": False, "sample": 0.5, "stage_steps": None},
    flexlora={**COMMON, "clients": 4, "rounds": None, "ranks": None},
    flexora={**COMMON, "stage_share": 0.25, "lr_alpha": 0.05, "held_out": 8},
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
        self.config = SimpleNamespace(is_encoder_decoder=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor, attention_mask: torch.Tensor) -> Output:
        return Output(((self.inner(x) - y) ** 2).mean())


class WholePasses(TrainingData):
    """Training data without precomputed layers: the toy model has no layers."""

    def entering(self, layer: int, batch: Batch) -> Callable[[], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext


def scored(name: str, **changed: Any) -> Rig:
    rig = Rig(name, steps=40, **changed)

    def collate(rows: Sequence[int]) -> Batch:
        index = torch.tensor(list(rows))
        return {"x": rig.x[index], "y": rig.y[index], "attention_mask": torch.ones(len(index))}

    data = WholePasses(Called(rig), lengths=[1] * ROWS, labels=[float(row % 4 == 0) for row in range(ROWS)], collate=collate)
    rig.phases = rig.method.phases(data, 40)  # type: ignore[attr-defined]
    rig.optimizers.rebuild(rig.method.groups(1e-2))
    return rig


def total(rig: Rig) -> int:
    return sum(a.rank for a in rig.method.adapters.values())


def test_sample_is_stratified_and_without_replacement() -> None:
    data = TrainingData(
        nn.Identity(), lengths=[1] * 100, labels=[float(row < 20) for row in range(100)], collate=lambda rows: {}
    )
    drawn = data.sample(25, torch.Generator().manual_seed(0))
    assert len(set(drawn)) == 25 and sum(row < 20 for row in drawn) == 5
    assert drawn == data.sample(25, torch.Generator().manual_seed(0)) != data.sample(25, torch.Generator().manual_seed(1))


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


def test_lora_drop_sees_the_outputs_of_a_decoder(tmp_path: Path) -> None:
    sizes = ["train.max_steps=8", "task.max_train_rows=32", "task.max_eval_rows=4", "task.generation.max_new_tokens=4"]
    words = ["task=story_summary", "model=tiny_bart", "method=lora_drop", "targets=all", "rank=2", "precision=fp32"]
    record = run(compose(*words, *sizes, f"results_dir={tmp_path}"))
    (cut,) = (event for event in record.events if event["kind"] == "cut")
    assert len(cut["importance"]) == 32 and all(value > 0 for value in cut["importance"].values())


def test_lora_drop_tells_source_and_target_of_equal_length_apart() -> None:
    source, labels = torch.tensor([[1, 1, 0]]), torch.tensor([[5, -100, -100]])
    batch, masks = _with_masks({"attention_mask": source, "labels": labels, "decoder_input_ids": labels}, generates=True)
    assert [mask.int().tolist() for mask in masks] == [[[1, 1, 0]], [[1, 0, 0, 0]]] and "decoder_input_ids" not in batch
    batch, masks = _with_masks({"attention_mask": source, "labels": labels}, generates=False)
    assert len(masks) == 1 and batch["labels"] is labels


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
    data, batch = method._data, method._batch
    scores = method.ablation_scores(data, batch)
    adapter = rig.method.adapters["layers.2"]
    everything = -data.loss(batch)
    B = adapter.B.data.clone()
    adapter.B.data[:, 1] = 0
    without = -data.loss(batch)
    others = {name: a.B.data.clone() for name, a in rig.method.adapters.items()}
    for a in rig.method.adapters.values():
        a.B.data.zero_()
    adapter.B.data[:, 1] = B[:, 1]
    alone = -data.loss(batch)
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


def test_alora_keeps_the_moments_of_the_components_that_stay() -> None:
    rig = scored("alora").run(9)
    before = {
        name: {key: state(rig, part)["exp_avg_sq"].clone() for key, part in (("A", a.A), ("B", a.B))}
        for name, a in rig.method.adapters.items()
    }
    event = rig.run(1).events[0]
    for name in event.details["added"]:
        old, adapter = before[name], rig.method.adapters[name]
        rank = old["A"].shape[0]
        assert adapter.rank > rank
        # The step of the round itself has moved the old moments before they were taken over.
        for moment, kept in (
            (state(rig, adapter.A)["exp_avg_sq"][:rank], old["A"]),
            (state(rig, adapter.B)["exp_avg_sq"][:, :rank], old["B"]),
        ):
            assert (moment >= 0.999 * kept * (1 - 1e-5)).all() and moment.abs().sum() > 0
        assert int(state(rig, adapter.A)["step"]) == 10


def state(rig: Rig, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """Return AdamW's state of a parameter."""
    return dict(rig.optimizers._rules["adamw"].state[parameter])


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


def test_flexora_gamma_averages_one_and_acts_once() -> None:
    rig = scored("flexora").run(6)
    method: Any = rig.method
    gamma = method.gamma().detach()
    assert float(gamma.mean()) == pytest.approx(1.0) and float(gamma.std()) > 1e-3
    torch.testing.assert_close(torch.tensor(rig.omega), gamma)


def test_flexora_raises_alpha_where_it_lowers_the_held_out_loss() -> None:
    rig = scored("flexora").run(4)
    method: Any = rig.method
    omegas = [a.omega for a in rig.method.adapters.values()]
    gradient = torch.stack(method._data.gradients(method._batch, omegas))
    before = method._alpha.detach().clone()
    method._adam = torch.optim.SGD([method._alpha], lr=0.1)
    method._step_alpha()
    moved = method._alpha.detach() - before
    centred = gradient - (gradient * torch.softmax(before, 0)).sum()  # the softmax's Jacobian, up to a positive factor
    assert torch.equal(moved > 0, centred < 0)
    assert all(omega is not None and not omega.requires_grad and omega.grad is None for omega in omegas)


def test_flexora_keeps_positive_alphas_and_starts_them_afresh() -> None:
    rig = scored("flexora").run(9)
    alpha = dict(zip(rig.method.adapters, rig.method._alpha.tolist(), strict=True))  # type: ignore[attr-defined]
    rig.run(1)
    assert rig.events[0].kind == "cut" and rig.events[0].step == 10
    assert set(rig.method.adapters) == {n for n, value in rig.events[0].details["alpha"].items() if value > 0}
    assert 0 < len(rig.method.adapters) < N and len(alpha) == N
    assert all(a.omega is None and a.B.abs().sum() == 0 for a in rig.method.adapters.values())
    rig.run(2)
    assert all(a.B.abs().sum() > 0 for a in rig.method.adapters.values())


def test_flexlora_server_svd_is_the_weighted_mean_update() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [(torch.randn(9, r, generator=generator), torch.randn(r, 7, generator=generator)) for r in (1, 2, 3)]
    weights = [0.5, 0.2, 0.3]
    left, right = decompose(updates, weights)
    mean = sum(w * L @ R for w, (L, R) in zip(weights, updates, strict=True))
    torch.testing.assert_close(left @ right, mean)
    torch.testing.assert_close(right @ right.T, torch.eye(len(right)), atol=1e-5, rtol=0)
    U, S, Vh = torch.linalg.svd(mean)  # type: ignore[arg-type]
    torch.testing.assert_close(left[:, :2] @ right[:2], U[:, :2] * S[:2] @ Vh[:2], atol=1e-5, rtol=0)


def test_flexlora_clients_take_turns_on_shards_that_cover_the_rows_once() -> None:
    rig = scored("flexlora")
    turns = rig.phases  # type: ignore[attr-defined]
    assert len(turns) == 8 * 4 and sum(turn.steps for turn in turns) == 40 and min(turn.steps for turn in turns) == 1
    assert sorted(row for turn in turns[:4] for row in turn.rows) == list(range(ROWS))
    assert [list(turn.rows) for turn in turns[4:8]] == [list(turn.rows) for turn in turns[:4]]


def test_flexlora_round_gives_every_client_the_mean_of_updates_and_heads() -> None:
    rig = scored("flexlora", rounds=1)
    rig.model.classifier.requires_grad_(True)
    seen, heads, method = [], [], rig.method
    for turn in range(4):
        for _ in range(10):
            ((rig.model(rig.x) - rig.y - turn) ** 2).mean().backward()
            rig.optimizers.step()
            with torch.no_grad():
                rig.model.classifier.weight -= 0.01 * rig.model.classifier.weight.grad
            rig.model.zero_grad()
        seen.append(method.adapters["layers.1"].delta_weight())
        heads.append(rig.model.classifier.weight.detach().clone())
        (event,) = method.after_step(10 * (turn + 1))
        assert event.reset
        rig.optimizers.forget()
        rig.optimizers.rebuild(method.groups(1e-2))
        if turn < 3:
            assert method.adapters["layers.1"].delta_weight().abs().sum() == 0, (
                "the next client starts from the global state"
            )
    mean = torch.stack(seen).mean(0)
    U, S, Vh = torch.linalg.svd(mean)
    expected = U[:, :2] * S[:2] @ Vh[:2]
    torch.testing.assert_close(method.adapters["layers.1"].delta_weight(), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(rig.model.classifier.weight.detach(), torch.stack(heads).mean(0))


def test_flexlora_gives_each_client_its_rank_and_ends_at_the_common_one() -> None:
    rig = scored("flexlora", ranks=[1, 2, 3, 4], rounds=2)
    ranks = [rig.method.adapters["layers.0"].rank]
    for step in (5, 10, 15, 20, 25, 30, 35, 40):
        rig.method.after_step(step)
        ranks.append(rig.method.adapters["layers.0"].rank)
    assert ranks == [1, 2, 3, 4, 1, 2, 3, 4, 2]
    assert rig.method.adapters.count() == N * 2 * 2 * WIDTH


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
        ("flexora", {"held_out": ROWS}),
        ("flexlora", {"clients": ROWS + 1}),
        ("flexlora", {"rounds": 11}),
        ("flexlora", {"ranks": [2, 3]}),
        ("alora", {"rounds": 9}),
        ("alora", {"first_share": 0.9}),
    ],
)
def test_impossible_settings_are_refused_with_the_numbers(name: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\d"):
        scored(name, **changed)


def test_neighbours_differ() -> None:
    outputs = [
        scored(name).run(30).model(torch.ones(2, WIDTH)).detach() for name in ("lora_drop", "alora", "flexora", "flexlora")
    ]
    outputs.append(Rig("lora").run(30).model(torch.ones(2, WIDTH)).detach())
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(outputs) for b in outputs[:i])
