"""One adapter alone, and its product with the full gradient."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.support.toy_model import COMMON, SETTINGS, WIDTH, Rig
from wlora.errors import ConfigError
from wlora.methods.single import Single
from wlora.methods.training_data import TrainingData

SETTINGS["single"] = {**COMMON, "index": 2, "gradient_rows": None}


def with_bench(rig: Rig) -> Single:
    """Give the method batches of the rig's rows, and a model that returns their mean loss."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = rig.model

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=((self.body(x) - y) ** 2).mean())

    assert isinstance(rig.method, Single)
    data = TrainingData(
        WithLoss(),
        lengths=[1] * len(rig.x),
        labels=None,
        collate=lambda part: {"x": rig.x[list(part)], "y": rig.y[list(part)]},
    )
    rig.method.phases(data, 5)
    return rig.method


def test_only_the_adapter_of_the_index_is_attached() -> None:
    assert list(Rig("single").method.adapters) == ["layers.2"]
    with pytest.raises(ConfigError, match="method.index=6: allowed is 0 to 5"):
        Rig("single", index=6)


def test_the_product_is_that_with_the_dense_gradient_at_the_pretrained_weight() -> None:
    rig = Rig("single", steps=5)
    method = with_bench(rig)
    events = rig.run(5).events
    (event,) = events
    assert (event.step, event.kind, event.details["adapter"]) == (5, "dot_product", "layers.2")
    (adapter,) = method.adapters.values()
    update = (adapter.B @ adapter.A).detach()
    assert update.abs().sum() > 0
    method.adapters.disconnect("layers.2")
    weight = rig.model.layers[2].weight.requires_grad_(True)  # type: ignore[union-attr, operator]
    (gradient,) = torch.autograd.grad(((rig.model(rig.x) - rig.y) ** 2).mean(), [weight])
    assert update.shape == (WIDTH, WIDTH)
    assert event.details["value"] == pytest.approx(float((gradient * update).sum()), rel=1e-4)


def test_the_adapter_is_as_before_after_the_product() -> None:
    rig = Rig("single", steps=5).run(3)
    method = with_bench(rig)
    (adapter,) = method.adapters.values()
    before, output = list(adapter.parameters()), rig.model(rig.x)
    assert method.product() == method.product()
    assert adapter.omega is None and all(a is b for a, b in zip(adapter.parameters(), before, strict=True))
    torch.testing.assert_close(rig.model(rig.x), output)


def test_the_gradient_can_be_that_of_a_sample() -> None:
    rig = Rig("single", steps=5, gradient_rows=8).run(3)
    method = with_bench(rig)
    method.gradient_rows = None
    whole = method.product()
    method.gradient_rows = 8
    assert method.product() != whole
