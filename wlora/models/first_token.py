"""Skip computation in an encoder's last layer for tokens that the head ignores: the head reads only the first token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import BertForSequenceClassification, DebertaV2ForSequenceClassification, PreTrainedModel

from wlora.models.discovery import layout_of


@contextmanager
def first_token_alone(model: PreTrainedModel) -> Iterator[None]:
    """Within this block, run the part of the last layer after attention only for the first token.

    This part is the output projection and the feed-forward network: 9 of 12 parts of a layer's matrix products, and
    their saved activations. The classification head of BERT and DeBERTa reads no other token, so logits and gradients
    are equal up to rounding; dropout draws fewer random numbers. Other heads and families do not change.
    """
    part = _behind_attention(model)
    if part is None:
        yield
        return
    whole = part.forward

    def first(hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        # Contiguous: of a strided input, torch multiplies each row with a copy of the weights of its own.
        return whole(hidden_states[:, :1].contiguous(), input_tensor[:, :1].contiguous())  # type: ignore[no-any-return]

    part.forward = first
    try:
        yield
    finally:
        del part.forward


@contextmanager
def every_token(model: PreTrainedModel) -> Iterator[None]:
    """Within this block, run the last layer for all tokens, even inside a block of `first_token_alone`."""
    part = _behind_attention(model)
    first = part.__dict__.pop("forward", None) if part is not None else None
    try:
        yield
    finally:
        if part is not None and first is not None:
            part.forward = first


def _behind_attention(model: PreTrainedModel) -> nn.Module | None:
    """Return the module that maps (attention output, layer input); None if the head reads other tokens."""
    if not isinstance(model, BertForSequenceClassification | DebertaV2ForSequenceClassification):
        return None
    config, layers = model.config, model.get_submodule(layout_of(model).stacks[0].prefix)
    # Both need the whole sequence after attention: feed-forward in chunks, and a convolution after the first layer.
    chunked = getattr(config, "chunk_size_feed_forward", 0) > 0
    convolved = getattr(config, "conv_kernel_size", 0) > 0 and config.num_hidden_layers == 1
    return None if chunked or convolved else layers.get_submodule(f"{config.num_hidden_layers - 1}.attention.output")
