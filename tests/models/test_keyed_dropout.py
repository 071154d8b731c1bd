"""Keyed dropout: a mask depends on key, place, row and position alone; its statistics are those of dropout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wlora.models.keyed_dropout import KeyedDropout, make_key, starting_at

CPU = torch.device("cpu")
KEYS = [make_key(seed, 3) for seed in range(3)]


def masks(keys: list[int], rows: int, *shape: int, p: float = 0.25, calls: int = 1) -> Tensor:
    """Return which elements the last of several dropouts keeps, [members · rows, *shape]."""
    with KeyedDropout(keys, rows, CPU):
        for _ in range(calls):
            found = F.dropout(torch.ones(len(keys) * rows, *shape), p)
    return found != 0


def test_a_mask_is_the_same_beside_others_with_more_rows_and_longer_texts() -> None:
    alone = masks([KEYS[1]], 4, 6, 8)
    beside = masks(KEYS, 5, 9, 8)[5:9, :6]
    assert torch.equal(alone, beside) and not alone.all()
    assert torch.equal(masks([KEYS[1]], 4, 2, 6, 6), masks(KEYS, 4, 2, 7, 7)[4:8, :, :6, :6])


def test_runs_with_one_key_have_one_mask() -> None:
    found = masks([KEYS[0]] * 3, 4, 6, 8).view(3, 4, 6, 8)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_the_statistics_are_those_of_independent_draws(p: float) -> None:
    dropped = (~masks(KEYS, 16, 40, 96, p=p)).double()
    error = math.sqrt(p * (1 - p) / dropped.numel())
    assert abs(dropped.mean() - p) < 4 * error
    centred = dropped - p
    correlations = [(centred[:, :, k:] * centred[:, :, :-k]).mean() for k in (1, 2, 32)]
    correlations += [(centred[:, k:] * centred[:, :-k]).mean() for k in (1, 2, 8)]
    correlations += [(centred[k:] * centred[:-k]).mean() for k in (1, 16)]
    second = (~masks(KEYS, 16, 40, 96, p=p, calls=2)).double() - p
    other = (~masks([make_key(seed, 4) for seed in range(3)], 16, 40, 96, p=p)).double() - p
    correlations += [(centred * second).mean(), (centred * other).mean()]
    assert max(abs(float(c)) for c in correlations) < 6 * p * (1 - p) / math.sqrt(dropped.numel())


def test_what_is_kept_is_scaled_and_gradients_pass_through_it() -> None:
    x = torch.randn(6, 5, requires_grad=True)
    with KeyedDropout(KEYS, 2, CPU):
        y = nn.Dropout(0.25)(x)
    y.sum().backward()
    kept = y != 0
    assert torch.allclose(y[kept], x[kept] / 0.75) and x.grad is not None
    assert torch.allclose(x.grad, kept / 0.75)


def test_evaluation_and_other_functions_are_left_alone() -> None:
    x = torch.randn(4, 4)
    with KeyedDropout(KEYS[:1], 4, CPU):
        assert torch.equal(nn.Dropout(0.5).eval()(x), x) and torch.equal(F.dropout(x, 0.0), x)
        assert torch.equal(F.relu(x), x.clamp(min=0))


def test_a_tensor_that_all_share_stays_shared_under_one_key_only() -> None:
    shared = torch.ones(1, 7, 8)
    with KeyedDropout([KEYS[0]] * 2, 3, CPU):
        assert F.dropout(shared, 0.5).shape == (1, 7, 8)
    with KeyedDropout(KEYS, 3, CPU) as dropout:
        each = dropout.drop(shared, 0.5, "table")
        with starting_at(2):
            part = dropout.drop(shared[:, 2:], 0.5, "table")
    assert each.shape == (3, 7, 8) and not torch.equal(each[0], each[1])
    assert torch.equal(each[:, 2:], part)


def test_a_choice_of_members_has_their_masks() -> None:
    x = torch.ones(6, 5)
    with KeyedDropout(KEYS, 2, CPU) as dropout:
        whole = dropout.drop(x, 0.5, "place")
        some = dropout.drop(x[:4], 0.5, "place", torch.tensor([0, 2]))
    assert torch.equal(some, torch.cat([whole[:2], whole[4:]]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", ["none", "bool", "float"])
def test_attention_is_that_of_torch_and_drops_its_weights(masked: str, causal: bool) -> None:
    if causal and masked != "none":
        pytest.skip("torch takes one of them")
    torch.manual_seed(0)
    query, value = torch.randn(6, 4, 5, 8), torch.randn(6, 2, 5, 8)
    seen = torch.ones(6, 1, 5, 5, dtype=torch.bool).tril() if masked != "none" else None
    bias = torch.zeros(6, 1, 5, 5).masked_fill(~seen, -1e9) if masked == "float" and seen is not None else seen
    options = {"attn_mask": bias, "is_causal": causal, "enable_gqa": True}
    expected = F.scaled_dot_product_attention(query, value, value, **options)  # type: ignore[arg-type]
    with KeyedDropout(KEYS, 2, CPU):
        none = F.scaled_dot_product_attention(query, value, value, dropout_p=1e-9, **options)  # type: ignore[arg-type]
        some = F.scaled_dot_product_attention(query, value, value, dropout_p=0.5, **options)  # type: ignore[arg-type]
    assert torch.allclose(none, expected, atol=1e-6)
    assert not torch.allclose(some, expected, atol=1e-2)
