"""Attention for CPUs whose weights are written out: shorter than torch's where weights are dropped, and for short texts.

With dropout, torch's `scaled_dot_product_attention` has no fused kernel for CPUs: it multiplies in float32, whatever the
dtype, and takes several passes over the weights. Its fused kernel, without dropout, is built for long texts. Here the
products are taken in the dtype of the model, and the softmax in float32.

Outputs and gradients equal torch's up to rounding; dropout draws the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "wlora"
# Texts of more tokens take torch's fused kernel where there is no dropout: it saves the memory of the weights.
SHORT = 128


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return the context [rows, tokens, heads, size], and no attention weights: an attention function of transformers.

    Args:
        module: the attention module. Its own dropout module is applied, if it has one.
        query: shape [rows, heads, tokens, size].
        key: as `query`, or with fewer heads.
        value: as `key`.
        attention_mask: true where a token may attend to another, or numbers to be added to the scores; shape [rows, 1 or
            heads, tokens, tokens].
        dropout: dropout probability of the weights.
        scaling: factor of the scores; None for 1/√size.
        others: what else transformers passes. What this function does not know is left to torch's.
    """
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    unknown = others.get("position_bias") is not None or others.get("cache") is not None or others.get("softcap") is not None
    fused = dropout == 0.0 and max(query.shape[2], key.shape[2]) > SHORT
    hidden = attention_mask is None and causal and query.shape[2] > 1
    if query.device.type != "cpu" or fused or hidden or unknown or key.shape[1] != query.shape[1]:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return found
    rows, heads, length, size = query.shape
    query, key, value = (part.reshape(rows * heads, -1, part.shape[-1]) for part in (query, key, value))
    factor = 1 / math.sqrt(size) if scaling is None else scaling
    scores = torch.bmm(query * factor, key.transpose(1, 2)).view(rows, heads, length, -1)
    if attention_mask is not None:
        scores = scores + _additive(attention_mask, scores.dtype)
    at_least_float32 = torch.promote_types(scores.dtype, torch.float32)
    weights = _drop(module, scores.softmax(-1, dtype=at_least_float32), dropout).to(value.dtype)
    context = torch.bmm(weights.view(rows * heads, length, -1), value).view(rows, heads, length, -1)
    return context.transpose(1, 2).contiguous(), None


def write_out_attention(model: PreTrainedModel) -> None:
    """Let a model that would use torch's attention use this one."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def restore_attention(model: PreTrainedModel) -> None:
    """Undo `write_out_attention`."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scores. A row of which everything is hidden stays finite, as the smallest number does."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _drop(module: nn.Module, weights: Tensor, p: float) -> Tensor:
    own = getattr(module, "dropout", None)
    if isinstance(own, nn.Dropout) and own.p == p:
        dropped: Tensor = own(weights)
        return dropped
    return F.dropout(weights, p, training=p > 0)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
