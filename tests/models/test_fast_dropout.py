"""Dropout from 16 random bits: the distribution of torch's, its generator, and one mask for those that read one input."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from wlora.models.fast_dropout import FastDropout, SharedInput, drop, quicken_dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.97])
def test_a_share_p_is_dropped_at_every_place_of_a_random_number(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    count = 400_000
    dropped = drop(torch.ones(count, dtype=dtype), p)
    kept = torch.tensor(1 / (1 - p), dtype=dtype)
    assert torch.equal(dropped.unique(), torch.stack([kept.new_zeros(()), kept]))
    shares = (dropped == 0).view(-1, 4).double().mean(0)  # four elements take their bits from one number
    assert (shares - p).abs().max() < 5 * (p * (1 - p) / (count / 4)) ** 0.5
    together = (dropped == 0).view(-1, 4).all(1).double().mean()
    assert abs(together - p**4) < 5 * (p**4 / (count / 4)) ** 0.5 + 1e-6


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 0)])
def test_masks_follow_torchs_seed_and_are_those_of_the_gradient(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    torch.manual_seed(3)
    first, second = drop(x, 0.5), drop(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(drop(x, 0.5), first) and (x.numel() < 9 or not torch.equal(first, second))
    first.sum().backward()
    assert x.grad is not None and torch.equal(x.grad * x, first)


@pytest.mark.parametrize(("p", "share"), [(0.0, 1.0), (1.0, 0.0)])
def test_all_and_nothing_are_torchs(p: float, share: float) -> None:
    assert torch.equal(drop(torch.ones(9), p), torch.full((9,), share))


def test_those_that_read_one_tensor_share_a_mask() -> None:
    shared, x, other = SharedInput(), torch.ones(64), torch.ones(64)
    first = shared.drop(x, 0.5)
    assert shared.drop(x, 0.5) is first and shared.drop(x, 0.1) is not first
    assert not torch.equal(shared.drop(other, 0.5), first) and not torch.equal(shared.drop(x, 0.5), first)


def test_nothing_is_kept_for_longer_than_its_input() -> None:
    shared, x = SharedInput(), torch.ones(64)
    shared.drop(x, 0.5)
    assert shared._last is not None
    del x
    gc.collect()
    assert shared._last is None


def test_modules_are_replaced_and_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.1)))
    quicken_dropout(model)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Dropout)] == [FastDropout, FastDropout]
    assert torch.equal(model.eval()(torch.ones(4)), model[0](torch.ones(4)))
    quicken_dropout(model, fast=False)
    assert [type(m) for m in model.modules() if isinstance(m, nn.Dropout)] == [nn.Dropout, nn.Dropout]
