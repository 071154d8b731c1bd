"""The last layer of an encoder whose head reads the first token: what only the others would need is not computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import BertForSequenceClassification, DebertaV2ForSequenceClassification, PreTrainedModel

from wlora.models.architectures import FAMILIES


@contextmanager
def first_token_alone(model: PreTrainedModel) -> Iterator[None]:
    """Let all of the last layer behind its attention run for the first token alone in this block.

    That is its output projection and feed-forward part, 9 of 12 parts of a layer's products, and what they keep for the
    backward pass. The head of a BERT or DeBERTa classifier reads no other token, so logits and gradients are the same to
    rounding; dropout draws fewer numbers. Nothing changes for other heads and families.
    """
    part = _behind_attention(model)
    if part is None:
        yield
        return
    whole = part.forward

    def first(hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return whole(hidden_states[:, :1], input_tensor[:, :1])  # type: ignore[no-any-return]

    part.forward = first
    try:
        yield
    finally:
        del part.forward


@contextmanager
def every_token(model: PreTrainedModel) -> Iterator[None]:
    """Let the last layer run for all tokens in this block, inside one of `first_token_alone`, too."""
    part = _behind_attention(model)
    first = part.__dict__.pop("forward", None) if part is not None else None
    try:
        yield
    finally:
        if part is not None and first is not None:
            part.forward = first


def _behind_attention(model: PreTrainedModel) -> nn.Module | None:
    """Return the module that takes (attention's output, the layer's input); None where the head reads other tokens."""
    if not isinstance(model, BertForSequenceClassification | DebertaV2ForSequenceClassification):
        return None
    config, layers = model.config, model.get_submodule(FAMILIES[model.config.model_type][0].prefix)
    # Both need the whole sequence behind attention: chunks of tokens, and a convolution over the first layer's output.
    chunked = getattr(config, "chunk_size_feed_forward", 0) > 0
    convolved = getattr(config, "conv_kernel_size", 0) > 0 and config.num_hidden_layers == 1
    return None if chunked or convolved else layers.get_submodule(f"{config.num_hidden_layers - 1}.attention.output")
