from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import TINY, compose
from wlora.adapters.layer import AdaptedLinear
from wlora.errors import ConfigError
from wlora.methods.base import Event, Method, Setting, Steps
from wlora.methods.parameter_groups import ParameterGroup
from wlora.methods.registry import build_method
from wlora.methods.selection import project, top_k, top_k_above
from wlora.methods.wlora import WLoRA
from wlora.models.architectures import read_architecture
from wlora.models.targets import Target, list_targets
from wlora.training.optimizers import Optimizers

N, WIDTH, ROWS = 6, 16, 32
COMMON: dict[str, Any] = {"rank": 2, "alpha": 4, "dropout": 0.0}
SELECTION = {"k": 2, "lr_omega": 0.5, "select_steps": None, "project_every": 1}
PLUS = {**SELECTION, "schedule": "single", "extension": "qr", "rescale": False, "keep_moments": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "probe": {},
    "lora": COMMON,
    "wlora": {**COMMON, **SELECTION},
    "wlora_plus": {**COMMON, **PLUS},
    "rlora": {**COMMON, **SELECTION, "draw": "at_projection"},
}


_randperm = torch.randperm


class Tanh(nn.Module):
    """A toy body of N equal layers with a head, as the policies see a model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(N))
        self.classifier = nn.Linear(WIDTH, 1)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        out: torch.Tensor = self.classifier(x)
        return out.squeeze(-1)


class Rig:
    """A method on the toy model with the loop's order of calls."""

    def __init__(self, name: str, *, release: bool = False, seed: int = 0, steps: int = 40, **changed: Any) -> None:
        torch.manual_seed(0)
        self.model = Tanh()
        self.x, self.y = torch.randn(ROWS, WIDTH), torch.randn(ROWS)
        self.method: Method = build_method({"name": name, **SETTINGS[name], **changed}, release=release)
        self.method.plan(Steps(total=steps, per_epoch=steps))
        targets = [Target(f"layers.{index}", index, "linear") for index in range(N)]
        self.method.attach(self.model, Setting(targets, targets, torch.Generator().manual_seed(seed)))
        self.optimizers = Optimizers(self.method.groups(1e-2), weight_decay=0.01, release=release)
        self.events: list[Event] = []
        self.step = 0

    def run(self, steps: int) -> Rig:
        for _ in range(steps):
            self.step += 1
            ((self.model(self.x) - self.y) ** 2).mean().backward()
            for event in self.method.before_step(self.step):
                self._take(event)
            self.optimizers.step()
            for event in self.method.after_step(self.step):
                self._take(event)
            self.optimizers.zero_grad()
        return self

    def _take(self, event: Event) -> None:
        self.events.append(event)
        self.optimizers.rebuild(self.method.groups(1e-2))

    @property
    def omega(self) -> list[float]:
        return [float(a.omega.detach()) for a in self.method.adapters.values() if a.omega is not None]


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
