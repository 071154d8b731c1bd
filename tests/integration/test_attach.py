"""`wlora.attach` and its handle in a plain loop: every method, resume, export, and mistakes in one or two lines."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import wlora
from wlora.config.schema import method_names
from wlora.errors import ConfigError, RunFault
from wlora.experiment.resolve import check_method

STEPS = 24
# Methods that look at training rows.
READERS = ("alora", "flexlora", "flexora", "lora_drop", "single")
OPTIONS: dict[str, dict[str, Any]] = {
    "wlora": {"k": 3},
    "alora": {"held_out": 8, "rounds": 2},
    "flexora": {"held_out": 8},
    "melora": {"rank": 4},
    "nora": {"outer_rank": 6},
    "single": {"index": 1},
}


def build(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, max_position_embeddings=16, **sizes))


def rows(number: int = 32) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(5, 40, (number, 8), generator=generator).tolist()
    return [{"input_ids": text, "labels": index % 3} for index, text in enumerate(texts)]


def collate(chosen: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in chosen]) for key in chosen[0]}


def train(handle: wlora.Handle, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        start = 8 * (handle.done % 4)
        loss = handle.model(**collate(rows()[start : start + 8])).loss
        loss.backward()
        handle.step()
        losses.append(float(loss.detach()))
    return losses


def begin(handle: wlora.Handle, **options: Any) -> None:
    needs = {"rows": rows(), "collate": collate} if handle.name in READERS else {}
    handle.begin(STEPS, lr=1e-2, steps_per_epoch=8, **needs, **options)


def attach(model: Any, method: str, **options: Any) -> wlora.Handle:
    length = {"steps": STEPS, "steps_per_epoch": 8} if method == "increlora" else {}
    given = {"rank": 2, "targets": "all"} | OPTIONS.get(method, {}) | options | length
    return wlora.attach(model, method, **given)


@pytest.mark.parametrize("method", [name for name in method_names() if name not in ("full", "probe")])
def test_every_adapter_method_trains_and_its_export_gives_the_logits(method: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = build()
    base = copy.deepcopy(model)
    torch.set_rng_state(before)
    handle = attach(model, method)
    assert torch.equal(torch.get_rng_state(), before)
    begin(handle)
    model.train()
    losses = train(handle, STEPS)
    assert losses[-1] < losses[0] and handle.done == STEPS
    assert handle.settled() is not False
    model.eval()
    inputs = {"input_ids": collate(rows())["input_ids"]}
    with torch.no_grad():
        expected = model(**inputs).logits
        loaded = PeftModel.from_pretrained(base, handle.export(tmp_path / "out")).eval()(**inputs).logits
        merged = handle.merge()(**inputs).logits
    assert torch.allclose(loaded, expected, atol=1e-4) and torch.allclose(merged, expected, atol=1e-4)
    assert type(model.bert.encoder.layer[0].attention.self.query) is torch.nn.Linear


def trained(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    return {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("method", "at"), [("wlora", 1), ("wlora", 12), ("wlora_plus", 12), ("adalora", 6), ("lora_drop", 12)]
)
def test_a_training_goes_on_from_its_state(method: str, at: int, tmp_path: Path) -> None:
    whole = attach(build(), method, dropout=0.1)
    begin(whole)
    train(whole, at)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    expected = train(whole, STEPS - at)
    again = attach(build(), method, dropout=0.1)
    begin(again)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.done == at
    assert train(again, STEPS - at) == expected
    assert again.summary() == whole.summary()
    with pytest.raises(ConfigError, match=f"a state of method={method}: allowed is one of method=lora"):
        other = attach(build(), "lora")
        begin(other)
        other.load_state_dict(whole.state_dict())


def test_omega_is_a_group_of_its_own() -> None:
    handle = attach(build(), "wlora", lr_omega=0.5)
    with pytest.raises(ConfigError, match="has not begun"):
        handle.groups()
    begin(handle)
    (omega,) = (group for group in handle.groups() if group.rule == "sgd")
    assert (len(omega.parameters), omega.lr, omega.scheduled, omega.clipped) == (18, 0.5, False, False)
    assert set(handle.parameters()) == trained(handle.model)
    train(handle, 3)
    assert len(handle.summary()["adapters"]) == 3
    assert not any(group.rule == "sgd" and [p for p in group.parameters if p.requires_grad] for group in handle.groups())


def test_a_training_that_ends_before_the_cut_is_neither_exported_nor_merged(tmp_path: Path) -> None:
    handle = attach(build(), "wlora", select_steps=8)
    begin(handle)
    train(handle, 7)
    for act in (lambda: handle.export(tmp_path / "out"), handle.merge, handle.check_settled):
        with pytest.raises(RunFault, match="the cut was never made: 7 optimiser steps of 24 are done, and T=8"):
            act()
    assert not (tmp_path / "out").exists()
    train(handle, 1)
    assert handle.export(tmp_path / "out").is_dir() and handle.events[0].kind == "cut"


def test_a_language_model_with_fused_projections_works_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    base = copy.deepcopy(model)
    handle = wlora.attach(model, targets=["c_attn", "mlp.c_fc"], rank=2, k=1)
    handle.begin(6, lr=1e-2)
    inputs = collate(rows(8))["input_ids"]
    for _ in range(6):
        model(input_ids=inputs, labels=inputs).loss.backward()
        handle.step()
    (kept,) = handle.summary()["adapters"]
    assert kept.endswith((".c_attn", ".mlp.c_fc"))
    model.eval()
    loaded = PeftModel.from_pretrained(base, handle.export(tmp_path / "out")).eval()
    assert torch.allclose(loaded(inputs).logits, model(inputs).logits, atol=1e-5)


def test_the_head_of_a_model_in_low_precision_trains_in_float32() -> None:
    model = build().to(torch.bfloat16)
    handle = wlora.attach(model, k=3, rank=2, select_steps=4)
    handle.begin(8, lr=1e-3)
    train(handle, 8)
    heads = {name: p.dtype for name, p in model.named_parameters() if "classifier" in name or "pooler" in name}
    assert heads and set(heads.values()) == {torch.float32}
    assert model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16


def message(act: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        act()
    assert str(caught.value).count("\n") < 2
    return str(caught.value)


def test_mistakes_are_told_in_a_line_or_two() -> None:
    model = build()
    assert "method=wlra is unknown; did you mean wlora?" in message(lambda: wlora.attach(model, "wlra"))
    assert "method.lr_omga is unknown to method=wlora" in message(lambda: wlora.attach(model, lr_omga=1.0))
    assert "method.lr is unknown to method=lora" in message(lambda: check_method({"name": "lora", "lr": 1.0}))
    assert "allowed is handle.begin(..., head_lr=...)" in message(lambda: wlora.attach(model, head_lr=1.0))
    assert "model=BertModel: allowed is a model with a head" in message(lambda: wlora.attach(model.base_model))
    assert "method.rank=0: allowed is int >= 1" in message(lambda: wlora.attach(model, rank=0))
    assert "rank=99: allowed is 1 to 16" in message(lambda: wlora.attach(build(), rank=99))
    assert "k=99: allowed is int >= 1, <= 9" in message(lambda: wlora.attach(model, k=99))
    found = message(lambda: wlora.attach(model, targets="q_proj"))
    assert "targets=q_proj: allowed is qkv | attention | all" in found and "attention.self.query" in found
    assert "allowed is a layer from 0 to 2" in message(lambda: wlora.attach(model, targets="qkv@3"))
    assert "model=Linear: allowed is a model of transformers" in message(lambda: wlora.attach(torch.nn.Linear(1, 1)))  # type: ignore[arg-type]
    assert "method=increlora: steps is missing" in message(lambda: wlora.attach(model, "increlora"))
    handle = attach(model, "lora_drop")
    assert "has adapters already" in message(lambda: wlora.attach(model))
    assert "the training has not begun" in message(handle.step)
    assert "looks at training rows" in message(lambda: handle.begin(STEPS, lr=1e-2))
    planned = wlora.attach(build(), steps=10)
    assert "begin: steps=20, steps_per_epoch=20: allowed is steps=10" in message(lambda: planned.begin(20, lr=1e-3))
    begun = attach(build(), "lora")
    begin(begun)
    assert "has begun already" in message(lambda: begin(begun))
    assert "at least 4, as a selection takes 3" in message(lambda: wlora.attach(build()).begin(2, lr=1e-3))
    full = wlora.attach(build(), "full")
    begin(full)
    assert "method=full has no adapters" in message(lambda: full.export("nowhere"))


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, wlora; assert 'attach' in dir(wlora); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="has no attribute 'atach'"):
        wlora.atach  # noqa: B018
