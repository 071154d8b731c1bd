"""DeBERTa's attention: transformers' own logits and gradients, with the occurring positions alone, once for all rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from wlora.adapters.adapter_set import AdapterSet
from wlora.adapters.layer import LowRankAdapter
from wlora.models.deberta_attention import (
    OccurringPositionsAttention,
    occurring_positions,
    replace_attention,
    restore_attention,
)
from wlora.models.first_token import first_token_alone
from wlora.models.loading import checkpoint_activations
from wlora.models.targets import list_targets
from wlora.training.precision import Precision, lower_base

BUCKETS = {"position_buckets": 256, "max_relative_positions": -1}
DEBERTA_V3 = {"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm", **BUCKETS}


def build(dtype: torch.dtype = torch.float32, **settings: Any) -> DebertaV2ForSequenceClassification:
    """Build a small frozen model with adapters on query, key and value; attention is transformers' own."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 40}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_hidden_size": 32}
    config = DebertaV2Config(
        **{**size, **quiet, "type_vocab_size": 0, "position_biased_input": False, "relative_attention": True}
        | DEBERTA_V3
        | settings,
        problem_type="single_label_classification",  # as in runs
    )
    torch.manual_seed(0)
    model = DebertaV2ForSequenceClassification(config)
    for parameter in model.parameters():
        # Large enough for the positions to decide where a token looks.
        nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
        parameter.requires_grad_(False)
    adapters = AdapterSet(model)
    for target in list_targets(config.to_dict(), "qkv"):
        adapters.attach(target, lambda d_in, d_out, device: LowRankAdapter(d_in, d_out, rank=4, scale=2.0))
    for adapter in adapters.values():
        nn.init.normal_(adapter.B, std=0.3)
    return model.to(dtype).train()


def batch(length: int, rows: int = 3) -> dict[str, Tensor]:
    """Return rows of random tokens, of which all but the first are padded."""
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(1, rows):
        mask[row, length - row * (length // 4) :] = 0
    ids = torch.randint(1, 40, (rows, length), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}


def outcome(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return logits and the gradients of all that trains."""
    outputs = model(**inputs)
    outputs.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": outputs.logits.detach(), **found}  # type: ignore[dict-item]


def agree(model: nn.Module, inputs: dict[str, Tensor], tolerance: float) -> None:
    """Assert that a model with transformers' attention gives the same with the replaced one."""
    expected = outcome(model, inputs)
    ours = copy.deepcopy(model)
    replace_attention(ours)
    assert any(isinstance(module, OccurringPositionsAttention) for module in ours.modules())
    found = outcome(ours, inputs)
    assert found.keys() == expected.keys() and len(found) > 12
    for name, value in expected.items():
        assert value.abs().max() > 0 or inputs["input_ids"].shape[1] == 1  # a lone token looks at itself, whatever it asks
        # Relative to the largest element: gradients differ in size by orders of magnitude.
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * max(1.0, float(value.abs().max())), msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("buckets", [256, -1])
@pytest.mark.parametrize("length", [5, 64, 127, 128, 129, 200, 513])
def test_logits_and_gradients_are_those_of_transformers(
    length: int, buckets: int, dtype: torch.dtype, tolerance: float
) -> None:
    agree(build(dtype, position_buckets=buckets), batch(length), tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {"share_att_key": False},
        {"pos_att_type": ["c2p"]},
        {"pos_att_type": ["p2c"], "share_att_key": False},
        {"position_buckets": 8},
        {"position_buckets": 4, "max_relative_positions": 16, "norm_rel_ebd": "none"},
        {"conv_kernel_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 30])
def test_other_forms_of_the_architecture_agree(settings: dict[str, Any], length: int) -> None:
    model = build(torch.float64, **settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pos_" in name or "rel_embeddings" in name or parameter.requires_grad)
    agree(model, batch(length, rows=4 if length > 4 else 1), 1e-10)


def test_models_without_relative_positions_keep_their_attention() -> None:
    for settings in ({"relative_attention": False}, {"pos_att_type": []}):
        model = build(**settings)
        kinds = [type(module) for module in model.modules()]
        replace_attention(model)
        assert [type(module) for module in model.modules()] == kinds


def test_it_is_undone_and_copied() -> None:
    model = build()
    kinds = [type(module) for module in model.modules()]
    replace_attention(model)
    assert [type(m) for m in copy.deepcopy(model).modules()] == [type(m) for m in model.modules()] != kinds
    restore_attention(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_and_the_first_token_agree(dtype: torch.dtype) -> None:
    plain = build(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    replace_attention(plain)
    if dtype is torch.bfloat16:
        lower_base(plain, Precision("bf16", ""))
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed)
    found = []
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        with first_token_alone(model):
            found.append(outcome(model, batch(20)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_bfloat16_is_as_near_to_float32_as_that_of_transformers() -> None:
    inputs = batch(150, rows=8)
    mask = inputs["attention_mask"].bool()

    @torch.no_grad()
    def states(model: DebertaV2ForSequenceClassification) -> Tensor:
        return model.deberta(inputs["input_ids"], mask.long()).last_hidden_state[mask].float()

    rounded, theirs, ours = build(), build(), build()
    replace_attention(ours)
    for model in (rounded, theirs, ours):
        lower_base(model, Precision("bf16", ""))
    exact = states(rounded.float())  # of the same weights
    errors = [float((states(model) - exact).square().mean()) for model in (ours, theirs)]
    assert 0 < errors[0] <= 1.2 * errors[1]


def test_dropout_has_the_same_statistics() -> None:
    """The mean over many draws of each logit is that of transformers, to five standard errors."""
    model = build(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    for module in model.modules():
        if isinstance(module, LowRankAdapter):
            module.dropout = 0.3
    inputs = {key: value[:1].repeat(64, 1) if key != "labels" else value[:1].repeat(64) for key, value in batch(6).items()}

    @torch.no_grad()
    def draw() -> Tensor:
        torch.manual_seed(5)
        return torch.stack([model(**inputs).logits.mean(0) for _ in range(60)])

    theirs = draw()
    replace_attention(model)
    ours = draw()
    for statistic in (lambda x: x, lambda x: (x - x.mean(0)).square()):
        a, b = statistic(theirs), statistic(ours)
        error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()


class Operations(TorchDispatchMode):
    """Counts calls of operations, and the elements that the largest result of each had."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_what_occurs_is_multiplied_and_nothing_is_repeated_or_gathered(precision: str) -> None:
    length, rows, width, heads, layers = 64, 8, 32, 4, 2
    model = build(hidden_dropout_prob=0.1)
    lower_base(model, Precision(precision, ""))
    replace_attention(model)
    with Operations() as seen, FlopCounterMode(display=False) as flops:
        model(**batch(length, rows)).loss.backward()
    assert not {"repeat", "gather", "scatter_add", "index_select"} & seen.calls.keys()
    products = flops.get_flop_counts()["Global"]
    by_kind = {str(kind): count for kind, count in products.items()}
    occurring, size = 2 * length - 1, width // heads
    # Forward: the positions of query and key; backward: the same for the gradients of tokens and of positions.
    positions = 3 * 2 * (2 * rows * heads * length * size * occurring)
    # Scores and context: the context's product and its two gradients are `bmm`, and so are the scores' two gradients.
    attention = (3 + 2) * (2 * rows * heads * length * length * size)
    assert by_kind["aten.bmm"] == layers * (positions + attention)
    assert by_kind["aten.baddbmm"] == layers * 2 * rows * heads * length * length * size


@pytest.mark.parametrize(("length", "occurring", "gathered"), [(64, 127, False), (129, 257, False), (200, 339, True)])
def test_positions_that_occur(length: int, occurring: int, gathered: bool) -> None:
    found = occurring_positions(length, span=256, buckets=256, furthest=512)
    assert found.rows.stop - found.rows.start == occurring and (found.places is not None) == gathered
    if found.places is not None:
        assert len(found.places) == 2 * length - 1 and set(found.places) == set(range(occurring))


def test_a_memory_estimate_leaves_nothing_behind() -> None:
    """The shapes alone are computed, on no device that is there; then the model runs as before."""
    model, inputs = build(position_buckets=8), batch(30)
    replace_attention(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {key: mode.from_tensor(value) for key, value in inputs.items()}
        assert isinstance(model(**fake).logits, FakeTensor)
    assert type(model(**inputs).logits) is Tensor


def test_an_index_made_in_inference_serves_training() -> None:
    model, inputs = build(position_buckets=8), batch(31)
    replace_attention(model)
    with torch.inference_mode():
        model(**inputs)
    assert len(outcome(model, inputs)) > 12
