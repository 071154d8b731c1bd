from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.toy_model import COMMON, SETTINGS, WIDTH, N, Rig, Tanh
from wlora.errors import ConfigError
from wlora.methods.peft_backed import PeftMethod

SETTINGS.update(
    dora=COMMON,
    vera={"rank": 32, "dropout": 0.0, "lr_vectors": None},
    vb_lora={
        "rank": 2,
        "dropout": 0.0,
        "num_vectors": 10,
        "vector_length": None,
        "top_k": 2,
        "lr_bank": 1e-2,
        "lr_logits": 1e-1,
    },
)
NAMES = ("dora", "vera", "vb_lora")


def policy(rig: Rig) -> PeftMethod:
    assert isinstance(rig.method, PeftMethod)
    return rig.method


def layer(rig: Rig, index: int = 0) -> Any:
    return rig.model.layers[index]


@pytest.mark.parametrize(("name", "tolerance"), [("dora", 1e-5), ("vera", 0.0)])
def test_starts_as_the_base_model(name: str, tolerance: float) -> None:
    torch.manual_seed(0)
    plain = Tanh()
    rig = Rig(name)
    torch.testing.assert_close(rig.model(rig.x), plain(rig.x), atol=tolerance, rtol=0)


def test_vb_lora_starts_near_the_base_model_but_not_at_it() -> None:
    torch.manual_seed(0)
    plain = Tanh()
    rig = Rig("vb_lora")
    gap = float((rig.model(rig.x) - plain(rig.x)).detach().abs().max())
    assert 0 < gap < 1e-2


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("dora", N * (2 * 2 * WIDTH + WIDTH)),  # A, B and a magnitude per output row
        ("vera", N * (32 + WIDTH)),
        ("vb_lora", 10 * WIDTH + N * 2 * 2 * 10),  # the bank once; one sub-vector per row of A and column of B
    ],
)
def test_counts_what_trains_once_and_nothing_of_the_base(name: str, count: int) -> None:
    method = policy(Rig(name))
    assert len(method.attached()) == len(method.kept()) == N
    assert sum(p.numel() for p in {p for a in method.attached().values() for p in a.counted()}) == count
    assert sum(p.numel() for group in method.groups(1.0) for p in group.parameters) == count
    assert {a.rank for a in method.attached().values()} == {32 if name == "vera" else 2}


@pytest.mark.parametrize("name", NAMES)
def test_trains_and_leaves_the_base_alone(name: str) -> None:
    rig = Rig(name)
    base = layer(rig).base_layer.weight.detach().clone()
    first = float(((rig.model(rig.x) - rig.y) ** 2).mean())
    rig.run(30)
    assert float(((rig.model(rig.x) - rig.y) ** 2).mean()) < first
    assert torch.equal(layer(rig).base_layer.weight, base)


def test_dora_is_a_rescaled_direction() -> None:
    """Output rows of W′ have the norms m, whatever A and B are."""
    rig = Rig("dora").run(10)
    found = layer(rig)
    m = found.lora_magnitude_vector["default"].weight.detach()
    bias = found(torch.zeros(1, WIDTH))
    effective = (found(torch.eye(WIDTH)) - bias).T.detach()
    torch.testing.assert_close(effective.norm(dim=1), m, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(m, found.base_layer.weight.norm(dim=1), atol=1e-4)


def test_vera_shares_its_matrices_and_draws_them_from_the_run() -> None:
    rig, other = Rig("vera"), Rig("vera", seed=1)
    assert layer(rig, 0).vera_A["default"] is layer(rig, 1).vera_A["default"]
    assert not torch.equal(layer(rig).vera_A["default"], layer(other).vera_A["default"])
    assert not any(p.shape == (32, WIDTH) for group in rig.method.groups(1.0) for p in group.parameters)


def test_vb_lora_trains_bank_and_logits_at_their_own_rates() -> None:
    bank, logits = Rig("vb_lora").method.groups(5.0)
    assert (bank.lr, logits.lr) == (1e-2, 1e-1)
    assert [tuple(p.shape) for p in bank.parameters] == [(10, WIDTH)] and len(logits.parameters) == 2 * N


def test_neighbours_differ_on_the_same_seed() -> None:
    outputs = [Rig(name).run(20).model(torch.ones(2, WIDTH)).detach() for name in ("lora", *NAMES)]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(outputs) for b in outputs[:i])


@pytest.mark.parametrize(("name", "changed"), [("vb_lora", {"vector_length": 5}), ("vb_lora", {"top_k": 11})])
def test_what_does_not_fit_is_refused_with_the_numbers(name: str, changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\d"):
        Rig(name, **changed)


def test_what_peft_refuses_is_one_line() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 4

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Odd()
            self.bias = nn.Parameter(torch.zeros(1))

    from wlora.methods.base import Setting
    from wlora.methods.dora import DoRA
    from wlora.models.targets import Target

    target = [Target("odd", 0, "odd")]
    with pytest.raises(ConfigError, match="PEFT says"):
        DoRA(rank=2, alpha=4, dropout=0.0).attach(Model(), Setting(target, target))
