"""Methods that differ from LoRA by their layer or their start, not by a schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.toy_model import COMMON, SETTINGS, WIDTH, N, Rig, Tanh
from wlora.adapters.variants import BlockDiagonalAdapter, FramedAdapter
from wlora.errors import ConfigError

SETTINGS.update(
    melora={**COMMON, "rank": 8, "minis": 4},
    milora={**COMMON, "alpha": 2.0},
    nora={**COMMON, "outer_rank": 8},
    tied_lora=COMMON,
)


def test_melora_update_is_block_diagonal_and_is_what_the_forward_adds() -> None:
    torch.manual_seed(0)
    adapter = BlockDiagonalAdapter(12, 8, blocks=4, rank=2, scale=1.5)
    nn.init.normal_(adapter.B)
    delta = adapter.delta_weight()
    assert delta.shape == (8, 12)
    blocks = delta.reshape(4, 2, 4, 3)
    for i in range(4):
        for j in range(4):
            assert (blocks[i, :, j].abs().sum() > 0) == (i == j)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(adapter(x), x @ delta.T)


def test_melora_counts_as_rank_over_minis_for_any_number_of_minis() -> None:
    """2·r·d per matrix with r the mini rank: 36·2·1536 = 110,592 on DeBERTaV3-base for four minis of rank 2."""
    for minis in (1, 2, 4):
        assert Rig("melora", rank=2 * minis, minis=minis).method.adapters.count() == N * 2 * 2 * WIDTH
    assert BlockDiagonalAdapter(768, 768, blocks=4, rank=2, scale=1.0).count() * 36 == 110_592


def test_melora_with_one_mini_is_lora() -> None:
    lora, melora = (
        Rig(name, steps=20, **changed).run(15) for name, changed in (("lora", {}), ("melora", {"rank": 2, "minis": 1}))
    )
    torch.testing.assert_close(lora.model(lora.x), melora.model(melora.x))


@pytest.mark.parametrize("changed", [{"rank": 6, "minis": 4}, {"rank": 6, "minis": 3}, {"rank": 32, "minis": 4}])
def test_melora_refuses_what_does_not_divide(changed: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"minis=\d|rank=32"):
        Rig("melora", **changed)


def test_milora_starts_as_the_base_model_from_its_smallest_triplets() -> None:
    torch.manual_seed(0)
    plain = Tanh()
    rig = Rig("milora")
    torch.testing.assert_close(rig.model(rig.x), plain(rig.x), atol=1e-5, rtol=0)
    for layer, adapted in zip(plain.layers, rig.model.layers, strict=True):
        adapter, base = adapted.get_submodule("adapter"), adapted.get_submodule("base")
        smallest = torch.linalg.svdvals(layer.weight)[-2:]
        torch.testing.assert_close(torch.linalg.svdvals(adapter.delta_weight())[:2], smallest, atol=1e-5, rtol=0)  # type: ignore[operator]
        assert torch.linalg.matrix_rank(base.weight, atol=1e-4) == WIDTH - 2  # type: ignore[arg-type]
        assert not base.weight.requires_grad  # type: ignore[union-attr]


def test_milora_differs_from_lora_by_its_start() -> None:
    rigs = [Rig(name, steps=30, alpha=2.0).run(20) for name in ("lora", "milora")]
    assert not torch.allclose(rigs[0].model(rigs[0].x), rigs[1].model(rigs[1].x), atol=1e-4)
    assert all(a.B.abs().sum() > 0 for a in Rig("milora").method.adapters.values())


def test_milora_refuses_a_base_without_a_plain_weight() -> None:
    from wlora.methods.base import Setting
    from wlora.models.targets import Target

    method = Rig("milora").method

    class Packed(nn.Linear):
        """Stands for a quantised linear: whole numbers in place of a weight matrix."""

    model = nn.Sequential(Packed(WIDTH, WIDTH))
    model.requires_grad_(False)
    model[0].weight = nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="not quantised"):
        method.attach(model, Setting([Target("0", 0, "packed")]))


def test_nora_trains_inside_a_frozen_frame_of_the_largest_triplets() -> None:
    rig = Rig("nora").run(10)
    base = rig.model.layers[0].get_submodule("base").weight  # type: ignore[union-attr]
    U, S, Vh = torch.linalg.svd(base)  # type: ignore[arg-type]
    adapter = rig.method.adapters["layers.0"]
    assert isinstance(adapter, FramedAdapter)
    torch.testing.assert_close((adapter.outer_B @ adapter.outer_A), U[:, :8] * S[:8] @ Vh[:8], atol=1e-5, rtol=0)
    delta = adapter.delta_weight()
    assert torch.linalg.matrix_rank(delta) <= 2 < 8 and delta.abs().sum() > 0
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(adapter(x), x @ delta.T)
    assert rig.method.adapters.count() == N * 2 * 8 * 2  # 2·R·r per matrix; R=64, r=8: 1,024


def test_tied_lora_shares_matrices_and_scales_per_module() -> None:
    rig = Rig("tied_lora")
    adapters = list(rig.method.adapters.values())
    assert len({a.A for a in adapters}) == 1 and len({a.B for a in adapters}) == 1  # one kind of module in the toy
    assert len({a.gates for a in adapters}) == N
    assert rig.method.adapters.count() == 2 * 2 * WIDTH + N * (2 + WIDTH)
    rig.run(10)
    deltas = [a.delta_weight() for a in adapters]
    assert not torch.allclose(deltas[0], deltas[1], atol=1e-4)
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(adapters[0](x), x @ deltas[0].T)


@pytest.mark.parametrize("name", ["nora", "tied_lora"])
def test_starts_as_the_base_model_and_differs_from_lora(name: str) -> None:
    torch.manual_seed(0)
    plain = Tanh()
    rig = Rig(name)
    assert torch.equal(rig.model(rig.x), plain(rig.x))
    assert not torch.allclose(rig.run(20).model(rig.x), Rig("lora").run(20).model(rig.x), atol=1e-4)


@pytest.mark.parametrize("outer_rank", [1, WIDTH + 1])
def test_nora_refuses_a_frame_that_does_not_fit(outer_rank: int) -> None:
    with pytest.raises(ConfigError, match=f"outer_rank={outer_rank}"):
        Rig("nora", outer_rank=outer_rank)
