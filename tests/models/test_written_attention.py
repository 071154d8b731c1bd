"""Attention that writes its weights out: the outputs and gradients of torch, and its kernel where that is the better one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BartConfig, BertConfig, LlamaConfig, PreTrainedModel

from wlora.models import written_attention
from wlora.models.written_attention import NAME, attend, restore_attention, write_out_attention

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 40}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 40, "eos_token_id": 2, "pad_token_id": 0}
BART |= {f"{part}_{key}": 4 for part in ("encoder", "decoder") for key in ("attention_heads", "ffn_dim")}


def build(family: str, dropout: float, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Build a small model with torch's attention."""
    configs: dict[str, Any] = {
        "bert": lambda: BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=dropout),
        "bart": lambda: BartConfig(**BART, dropout=0.0, attention_dropout=dropout, activation_dropout=0.0),
        "llama": lambda: LlamaConfig(**SMALL, num_key_value_heads=2, attention_dropout=dropout, pad_token_id=0),
    }
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(configs[family](), attn_implementation="sdpa")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    return model.to(dtype).train()


def outcome(model: PreTrainedModel, length: int) -> dict[str, Tensor]:
    """Return logits and gradients for rows of which all but the first are padded."""
    ids = torch.randint(3, 40, (3, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    for row in (1, 2):
        mask[row, length - 2 * row :] = 0
    ids = ids * mask
    ids[torch.arange(3), mask.sum(1) - 1] = 2  # the end, where BART's head reads
    torch.manual_seed(1)
    outputs = model(input_ids=ids, attention_mask=mask, labels=torch.arange(3) % 2)
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": outputs.logits.detach(), **gradients}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("length", [7, 130])
@pytest.mark.parametrize("family", ["bert", "bart", "llama"])
def test_logits_and_gradients_are_torchs_and_so_are_the_masks(family: str, length: int, dropout: float) -> None:
    model = build(family, dropout)
    ours = copy.deepcopy(model)
    write_out_attention(ours)
    assert ours.config._attn_implementation == NAME
    expected, found = outcome(model, length), outcome(ours, length)
    assert found.keys() == expected.keys() and len(found) > 12
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_in_bfloat16_the_logits_are_as_near_as_torchs() -> None:
    exact = outcome(build("bert", 0.0, torch.float32), 25)["logits"]
    model = build("bert", 0.0, torch.bfloat16)
    theirs = (outcome(model, 25)["logits"].float() - exact).abs().max()
    write_out_attention(model)
    ours = (outcome(model, 25)["logits"].float() - exact).abs().max()
    assert 0 < ours < 2 * theirs


def test_weights_are_written_out_where_that_is_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda query, *a, **k: asked.append(query.shape[2]) or fused(query, *a, **k)
    )
    module = nn.Module()
    module.is_causal = False
    for length in (8, written_attention.SHORT + 1):
        query, key, value = torch.randn(3, 2, 4, length, 8).unbind()
        for dropout in (0.0, 0.1):
            attend(module, query, key, value, None, dropout)
    assert asked == [written_attention.SHORT + 1]


def test_a_saved_model_does_not_ask_for_it(tmp_path: Path) -> None:
    model = build("bert", 0.0)
    write_out_attention(model)
    model.save_pretrained(tmp_path)
    assert NAME not in json.loads((tmp_path / "config.json").read_text()).values()
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    restore_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_models_with_an_attention_of_their_own_keep_it() -> None:
    model = build("bert", 0.0)
    model.set_attn_implementation("eager")
    write_out_attention(model)
    assert model.config._attn_implementation == "eager"
