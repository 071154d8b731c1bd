from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wlora.adapters.adapter_set import AdapterSet
from wlora.adapters.layer import AdaptedLinear, LowRankAdapter
from wlora.models.targets import Target


def filled(d_in: int = 12, d_out: int = 10, rank: int = 3, **settings: object) -> LowRankAdapter:
    """Return an adapter whose B is not zero."""
    torch.manual_seed(0)
    adapter = LowRankAdapter(d_in, d_out, rank=rank, scale=2.0, dtype=torch.float64, **settings)  # type: ignore[arg-type]
    nn.init.normal_(adapter.B)
    return adapter


class Stack(nn.Module):
    def __init__(self, depth: int = 3, width: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, dtype=torch.float64) for _ in range(depth))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def attach_all(model: Stack, **settings: object) -> AdapterSet:
    adapters = AdapterSet(model)
    for index in range(len(model.layers)):
        target = Target(f"layers.{index}", index, "linear")
        adapters.attach(target, lambda d_in, d_out, device: filled(d_in, d_out, **settings))
    return adapters


def test_delta_is_scale_times_omega_times_gated_components() -> None:
    adapter = filled(omega=0.5)
    adapter.gates = nn.Parameter(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    x = torch.randn(4, 12, dtype=torch.float64)
    expected = sum(2.0 * 0.5 * g * adapter.B[:, j : j + 1] @ adapter.A[j : j + 1] for j, g in enumerate((1.0, 0.0, 2.0)))
    torch.testing.assert_close(adapter(x), x @ expected.T)
    torch.testing.assert_close(adapter.delta_weight(), expected)


def test_a_new_adapter_leaves_the_function_unchanged() -> None:
    base = nn.Linear(12, 10)
    adapted = AdaptedLinear(base, LowRankAdapter(12, 10, rank=4, scale=8.0, omega=1.0))
    x = torch.randn(5, 12)
    assert torch.equal(adapted(x), base(x))


def test_initial_bound_of_A_is_one_over_the_square_root_of_the_input_width() -> None:
    adapter = LowRankAdapter(400, 10, rank=8, scale=1.0)
    assert 0.045 < adapter.A.abs().max() <= 0.05


@pytest.mark.parametrize("value", [-0.7, 0.0, 0.3])
def test_omega_gradient_is_the_inner_product_even_where_the_gate_is_closed(value: float) -> None:
    adapter = filled(omega=value)
    x, upstream = torch.randn(4, 12, dtype=torch.float64), torch.randn(4, 10, dtype=torch.float64)
    out = adapter(x)
    out.backward(upstream)
    assert adapter.omega is not None and adapter.omega.grad is not None
    expected = (upstream * (2.0 * x @ adapter.A.T @ adapter.B.T)).sum()
    torch.testing.assert_close(adapter.omega.grad, expected.detach())
    assert torch.equal(out, torch.zeros_like(out)) == (value <= 0)


def test_signed_omega_acts_when_the_gate_is_not_clamped() -> None:
    closed, signed = filled(omega=-0.5), filled(omega=-0.5, positive=False)
    x = torch.randn(4, 12, dtype=torch.float64)
    assert closed(x).abs().max() == 0
    assert signed(x).abs().max() > 0


@pytest.mark.parametrize("how", ["qr", "gaussian", "uniform"])
def test_extension_keeps_the_function_and_lets_the_new_components_learn(how: str) -> None:
    adapter = filled(omega=0.8)
    x = torch.randn(6, 12, dtype=torch.float64)
    before = adapter(x).detach()
    adapter.extend(7, how=how, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    assert adapter.rank == 7 and adapter.B.shape == (10, 7)
    torch.testing.assert_close(adapter(x), before, atol=1e-10, rtol=0)
    adapter(x).square().sum().backward()
    assert adapter.B.grad is not None and (adapter.B.grad[:, 3:].abs().sum(0) > 0).all()


def test_qr_extension_makes_new_rows_orthogonal_to_the_old_and_gaussian_does_not() -> None:
    orthogonal, plain = filled(), filled()
    for adapter, how in ((orthogonal, "qr"), (plain, "gaussian")):
        adapter.extend(6, how=how, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    torch.testing.assert_close(orthogonal.A[:3] @ orthogonal.A[:3].T, torch.eye(3, dtype=torch.float64))
    assert (orthogonal.A[:3] @ orthogonal.A[3:].T).abs().max() < 1e-12
    assert (plain.A[:3] @ plain.A[3:].T).abs().max() > 1e-3


@pytest.mark.parametrize("rank", [2, 13])
def test_extension_refuses_to_shrink_or_to_exceed_the_width(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank}"):
        filled().extend(rank, how="qr", generator=torch.Generator())


def test_prune_keeps_the_named_components() -> None:
    adapter = filled()
    expected = 2.0 * adapter.B[:, [0, 2]] @ adapter.A[[0, 2]]
    adapter.prune(torch.tensor([True, False, True]))
    assert adapter.rank == 2
    torch.testing.assert_close(adapter.delta_weight(), expected.detach())


def test_disconnect_restores_the_very_base_module_and_frees_the_adapter() -> None:
    model = Stack()
    base = model.layers[1]
    adapters = attach_all(model)
    assert isinstance(model.layers[1], AdaptedLinear)
    adapters.disconnect("layers.1")
    assert model.layers[1] is base
    assert list(adapters) == ["layers.0", "layers.2"]
    assert not any("layers.1." in name and "adapter" in name for name, _ in model.named_parameters())
    with pytest.raises(KeyError):
        adapters["layers.1"]


def test_backward_stops_at_the_lowest_kept_layer() -> None:
    model = Stack(depth=4)
    adapters = attach_all(model)
    visited: list[int] = []
    for index, layer in enumerate(model.layers):
        layer.register_full_backward_hook(lambda *_, index=index: visited.append(index))
    model(torch.randn(2, 12, dtype=torch.float64)).sum().backward()
    assert sorted(visited) == [0, 1, 2, 3]
    for name in ("layers.0", "layers.1"):
        adapters.disconnect(name)
    visited.clear()
    for index, layer in enumerate(model.layers[:2]):
        layer.register_forward_hook(lambda _, __, out, index=index: visited.append(index) if out.requires_grad else None)
    out = model(torch.randn(2, 12, dtype=torch.float64))
    assert adapters.lowest_layer == 2 and visited == []
    assert out.requires_grad


def test_fold_gives_the_same_function_without_the_adapter() -> None:
    model = Stack()
    adapters = attach_all(model, omega=0.6)
    x = torch.randn(3, 12, dtype=torch.float64)
    before = model(x).detach()
    for name in list(adapters):
        adapters.fold(name)
    assert len(adapters) == 0
    torch.testing.assert_close(model(x), before)


def test_low_precision_base_keeps_its_dtype_and_the_adapter_stays_float32() -> None:
    base = nn.Linear(12, 10).to(torch.bfloat16).requires_grad_(False)
    adapted = AdaptedLinear(base, LowRankAdapter(12, 10, rank=2, scale=1.0))
    out = adapted(torch.randn(3, 12, dtype=torch.bfloat16))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert adapted.adapter.B.grad is not None and adapted.adapter.B.grad.dtype == torch.float32


def test_attach_takes_any_linear_like_module() -> None:
    class Packed(nn.Module):
        """Stands for a quantised linear: no `weight` of the usual shape."""

        in_features, out_features = 12, 10

        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.ones(60), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.pad(x, (0, -2)) * self.packed[0]

    model = nn.Sequential(Packed())
    adapters = AdapterSet(model)
    adapters.attach(Target("0", 0, "packed"), lambda i, o, device: LowRankAdapter(i, o, rank=2, scale=1.0))
    assert model(torch.randn(3, 12)).shape == (3, 10)
    assert adapters.count() == 2 * 12 + 10 * 2


def test_dropout_acts_in_training_only() -> None:
    adapter = filled(dropout=0.5)
    x = torch.randn(64, 12, dtype=torch.float64)
    exact = x @ adapter.delta_weight().T
    assert not torch.allclose(adapter(x), exact)
    adapter.eval()
    torch.testing.assert_close(adapter(x), exact)


def test_agrees_with_peft_lora_in_outputs_and_gradients() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    theirs = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    theirs.load_state_dict(ours.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=32, lora_dropout=0.0, target_modules=["0"], init_lora_weights=False)
    wrapped = peft.get_peft_model(theirs, config)
    ours.requires_grad_(False)
    adapters = AdapterSet(ours)
    adapter = adapters.attach(Target("0", 0, "0"), lambda i, o, device: LowRankAdapter(i, o, rank=4, scale=32 / 4))
    lora = wrapped.base_model.model[0]
    adapter.A.data.copy_(lora.lora_A["default"].weight)
    adapter.B.data.copy_(lora.lora_B["default"].weight)
    x = torch.randn(8, 16)
    out, expected = ours(x), wrapped(x)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    out.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(adapter.A.grad, lora.lora_A["default"].weight.grad, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(adapter.B.grad, lora.lora_B["default"].weight.grad, atol=1e-6, rtol=1e-6)
