"""`train.fast_step`: the numbers of a plain run but for masks and rounding, alone, in packs, resumed, for every method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import TINY, compose
from tests.support.outputs import losses
from wlora.adapters.layer import AdaptedLinear, LowRankAdapter, quicken_adapters
from wlora.config.schema import method_names
from wlora.experiment.packed import Entry, group, run_pack
from wlora.storage.records import Record

FAST = "train.fast_step=true"
STILL = ["dropout=0", "+model.architecture.hidden_dropout_prob=0", "+model.architecture.attention_probs_dropout_prob=0"]
SHORT = ["task.max_train_rows=64", "task.epochs=1", "train.save_adapter=false"]


def test_in_bfloat16_a_fast_adapter_and_its_gradients_equal_the_plain_ones_up_to_rounding() -> None:
    torch.manual_seed(0)
    adapters = [LowRankAdapter(64, 48, rank=8, scale=4.0, omega=0.7) for _ in range(2)]
    nn.init.normal_(adapters[0].B, std=0.1)
    adapters[1].load_state_dict(adapters[0].state_dict())
    base = nn.Linear(64, 48).requires_grad_(False).bfloat16()
    plain, fast = (AdaptedLinear(base, adapter) for adapter in adapters)
    quicken_adapters(fast)
    x, weight = torch.randn(4, 16, 64).bfloat16(), torch.randn(4, 16, 48)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for adapted, own in zip((plain, fast), inputs, strict=True):
        out = adapted(own)
        assert out.dtype == torch.bfloat16
        (out.float() * weight).sum().backward()
    pairs = [(inputs[0].grad, inputs[1].grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(adapters[0].parameters(), adapters[1].parameters(), strict=True)]
    for expected, found in pairs:
        assert expected is not None and found is not None and found.dtype == expected.dtype
        assert (found.float() - expected.float()).norm() < 0.02 * expected.float().norm()
    assert len(pairs) == 4 and adapters[1](x).dtype == torch.bfloat16 and adapters[0](x).dtype == torch.float32


def test_query_key_and_value_drop_the_same_inputs_and_other_modules_do_not() -> None:
    adapters = [LowRankAdapter(64, 64, rank=64, scale=1.0, dropout=0.5) for _ in range(2)]
    for adapter in adapters:
        adapter.A.data = adapter.B.data = torch.eye(64)
    quicken_adapters(nn.ModuleList(adapters))
    x = torch.ones(8, 64)
    assert torch.equal(adapters[0](x), adapters[1](x)) and not torch.equal(adapters[0](x), adapters[1](x.clone()))
    assert torch.equal(adapters[0].eval()(x), x)


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_deberta"])
def test_without_dropout_in_float32_a_fast_run_has_the_numbers_of_a_plain_one(
    model: str, run_tiny: Callable[..., Record], tmp_path: Path
) -> None:
    words = [f"model={model}", *STILL, *SHORT, "method=wlora", "k=3", "precision=fp32"]
    plain, fast = run_tiny(*words), run_tiny(*words, FAST)
    assert plain.run_id != fast.run_id and plain.metrics == fast.metrics
    assert losses(tmp_path, fast.run_id) == pytest.approx(losses(tmp_path, plain.run_id), rel=1e-6)


@pytest.mark.parametrize("targets", ["qkv", "value"])
def test_recomputed_activations_have_the_masks_of_the_forward_pass(
    targets: str, run_tiny: Callable[..., Record], tmp_path: Path
) -> None:
    words = [*SHORT, "method=lora", "dropout=0.3", f"targets={targets}", "precision=fp32", FAST]
    plain = run_tiny(*words)
    again = run_tiny(*words, "train.gradient_checkpointing=true", results=tmp_path / "again")
    assert again.run_id == plain.run_id
    assert losses(tmp_path / "again", again.run_id) == pytest.approx(losses(tmp_path, plain.run_id), rel=1e-5)


def test_a_stopped_run_goes_on_as_if_it_had_not(run_tiny: Callable[..., Record], tmp_path: Path) -> None:
    words = [*SHORT, "method=wlora", "k=3", "precision=bf16", FAST]
    whole = run_tiny(*words, results=tmp_path / "whole")
    assert run_tiny(*words, "train.until=0.5").status == "stopped"
    resumed = run_tiny(*words)
    assert resumed.run_id == whole.run_id and resumed.metrics == whole.metrics
    assert losses(tmp_path, resumed.run_id) == losses(tmp_path / "whole", whole.run_id)


def test_fast_runs_share_a_pack_with_their_like_and_have_its_numbers(tmp_path: Path) -> None:
    words = [*TINY, *SHORT, *STILL, "precision=fp32", "k=3", "method=wlora"]
    mixed = [Entry(compose(*words, f"results_dir={tmp_path}", *extra), ()) for extra in ([], [FAST], ["seed=1", FAST])]
    packs = group(mixed)
    assert packs == [[0], [1, 2]]
    found = {index: record for chosen in packs for index, record in run_pack(mixed, chosen, None)}
    records = [found[index] for index in range(3)]
    assert all(isinstance(record, Record) and record.status == "success" for record in records)
    plain, fast, _ = (losses(tmp_path, record.run_id) for record in records if isinstance(record, Record))
    assert fast == pytest.approx(plain, rel=1e-5)


# Sizes that fit so small a model and so few rows.
SIZES = {"nora": ["method.outer_rank=16"], "flexora": ["method.held_out=8"]}


@pytest.mark.slow
@pytest.mark.parametrize("method", method_names())
def test_every_method_trains_with_it(method: str, run_tiny: Callable[..., Record]) -> None:
    record = run_tiny(*SHORT, f"method={method}", *SIZES.get(method, []), "precision=bf16", FAST)
    assert record.status == "success"
