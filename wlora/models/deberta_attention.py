"""Faster DeBERTa attention: it projects and multiplies only the relative positions that occur in the batch.

transformers' `DisentangledSelfAttention` projects the whole table of relative positions (512 rows for DeBERTaV3),
repeats the result for every row of the batch, multiplies all of it, and then gathers the entries that it needs. A text
of n tokens has only 2n − 1 relative positions. Here only these are projected, once for all rows of the batch, and each
head multiplies them with the tokens of all rows in one product. Up to 129 tokens (with 256 buckets) every distance has
its own bucket. Then the scores are a strided view of the products, shifted by one from row to row, and no gather is
needed.

Logits and gradients equal those of transformers up to rounding. With dropout the random numbers have the same
distribution but other values: unused table rows draw none, and attention weights are drawn in another order (by head).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DebertaV2Encoder,
    DisentangledSelfAttention,
    make_log_bucket_position,
    scaled_size_sqrt,
)

from wlora.models.keyed_dropout import starting_at

# Maximum number of cached indices, one per text length; 2 MiB for 512 tokens.
_INDICES = 16


@dataclass(frozen=True)
class Positions:
    """The rows of the table of relative positions that a text of n tokens needs.

    Attributes:
        rows: slice of the table that covers the relative positions (query − key) from 1 − n to n − 1.
        places: index within `rows` for each of these distances; None if each distance has its own row.
    """

    rows: slice
    places: tuple[int, ...] | None


@functools.cache
def occurring_positions(length: int, *, span: int, buckets: int, furthest: int) -> Positions:
    """Return the part of a table of 2·span rows that a text of `length` tokens needs.

    Computed on the CPU, so that no GPU has to synchronise. Memory estimates run with tensors without values; here real
    values are computed there, too.

    Args:
        length: number of tokens.
        span: half the number of rows of the table.
        buckets: number of buckets of relative positions; 0 or less for one row per position.
        furthest: the distance at which the last bucket ends.
    """
    with unset_fake_temporarily():
        distances = torch.arange(1 - length, length, device="cpu")
        if buckets > 0 and furthest > 0:
            distances = make_log_bucket_position(distances, buckets, furthest).long()
        places = (distances + span).clamp(0, 2 * span - 1).tolist()
    rows = slice(places[0], places[-1] + 1)
    own = places == list(range(rows.start, rows.stop))
    return Positions(rows, None if own else tuple(place - rows.start for place in places))


@torch.inference_mode(False)  # cached tensors may later be saved for a backward pass
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the table index of position i − j for query i and key j, int64 [n, n]."""
    falling = torch.tensor(places[::-1]).to(device, non_blocking=True)
    return falling.unfold(0, (len(places) + 1) // 2, 1).flip(0)


_kept_index = functools.lru_cache(maxsize=_INDICES)(_index)


class OccurringPositionsAttention(DisentangledSelfAttention):  # type: ignore[misc]
    """`DisentangledSelfAttention` with the same parameters; relative positions are computed once per batch."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the context [rows, tokens, width], and on request the attention weights.

        The attention weights have shape [rows, heads, tokens, tokens].

        Args:
            hidden_states: shape [rows, tokens, width].
            attention_mask: 0 where a token (third dimension) must not attend to another (fourth), shape [rows, 1,
                tokens, tokens].
            output_attentions: whether to return the attention weights.
            query_states: separate states for the queries. If given, transformers' own implementation runs.
            relative_pos: relative positions. If given, transformers' own implementation runs.
            rel_embeddings: the table of relative positions, shape [2·span, width].
        """
        if query_states is not None or relative_pos is not None or rel_embeddings is None:
            whole: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
            return whole
        rows, length, _ = hidden_states.shape
        heads = self.num_attention_heads
        projections = (self.query_proj, self.key_proj, self.value_proj)
        query, key, value = (self._by_head(project(hidden_states), length) for project in projections)
        divisor = _divisor(self.attention_head_size, self._terms, query.dtype)
        scores = torch.baddbmm(
            self._position_scores(query, key, rel_embeddings, divisor), query, key.transpose(-1, -2), alpha=1 / divisor
        ).view(heads, rows, length, length)
        seen = attention_mask.bool().transpose(0, 1)
        weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(dim=-1)
        weights = self.dropout(weights.transpose(0, 1)).transpose(0, 1)
        context = torch.bmm(weights.reshape(-1, length, length), value).view(heads, rows, length, -1)
        joined = context.permute(1, 2, 0, 3).reshape(rows, length, -1)
        return joined, weights.transpose(0, 1) if output_attentions else None

    @property
    def _terms(self) -> int:
        """Number of products that are summed to a score."""
        return 1 + sum(kind in self.pos_att_type for kind in ("c2p", "p2c"))

    def _by_head(self, projected: Tensor, length: int) -> Tensor:
        """Reshape [rows, tokens, heads·size] to [heads·rows, tokens, size]; the rows of one head are contiguous."""
        split = projected.view(-1, length, self.num_attention_heads, self.attention_head_size)
        return split.permute(2, 0, 1, 3).reshape(-1, length, self.attention_head_size)

    def _position_scores(self, query: Tensor, key: Tensor, table: Tensor, divisor: float) -> Tensor:
        """Return the contribution of the relative positions to the scores, [heads·rows, tokens, tokens].

        Args:
            query: shape [heads·rows, tokens, size].
            key: shape [heads·rows, tokens, size].
            table: the table of relative positions, shape [2·span, width].
            divisor: the divisor of all scores.
        """
        positions = occurring_positions(
            query.shape[1],
            span=self.pos_ebd_size,
            buckets=self.position_buckets,
            furthest=self.max_relative_positions,
        )
        with starting_at(positions.rows.start):
            table = self.pos_dropout(table[positions.rows].unsqueeze(0))
        index, parts = None, []
        if positions.places is not None:
            # Tensors of a memory estimate have no values and must not be cached.
            index = (_kept_index if type(query) is Tensor else _index)(positions.places, query.device)
        if "c2p" in self.pos_att_type:
            project = self.key_proj if self.share_att_key else self.pos_key_proj
            known = project(table) / divisor
            # The position i − j decreases with j, but strides of a view must be positive: therefore the table is
            # flipped.
            products = self._multiply(query, known.flip(1) if index is None else known)
            parts.append(_shift(products) if index is None else _gather(products, index))
        if "p2c" in self.pos_att_type:
            project = self.query_proj if self.share_att_key else self.pos_query_proj
            products = self._multiply(key, project(table) / divisor)
            parts.append((_shift(products) if index is None else _gather(products, index.T)).transpose(-1, -2))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _multiply(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Return the products of tokens [heads·rows, tokens, size] with a table [members, positions, heads·size].

        The rows of each head are those of the members one after another; outside of a pack there is one member.
        """
        heads, size = self.num_attention_heads, self.attention_head_size
        members, positions, _ = table.shape
        by_head = table.view(members, positions, heads, size).permute(2, 0, 3, 1).reshape(-1, size, positions)
        return torch.bmm(tokens.view(heads * members, -1, size), by_head).view(*tokens.shape[:2], -1)


class PositionFreeEncoder(DebertaV2Encoder):  # type: ignore[misc]
    """`DebertaV2Encoder` that does not compute relative positions, because `OccurringPositionsAttention` does."""

    def get_rel_pos(
        self, hidden_states: Tensor, query_states: Tensor | None = None, relative_pos: Tensor | None = None
    ) -> Tensor | None:
        """Return the given relative positions, or None."""
        return relative_pos


_REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    DisentangledSelfAttention: OccurringPositionsAttention,
    DebertaV2Encoder: PositionFreeEncoder,
}


def replace_attention(model: nn.Module) -> None:
    """Replace the attention of a DeBERTa-v2 or -v3 model by the one of this module, in place. Other models do not change."""
    for module in model.modules():
        kind = type(module)
        if kind in _REPLACED and _depends_on_positions(model.config):
            module.__class__ = _REPLACED[kind]


def restore_attention(model: nn.Module) -> None:
    """Undo `replace_attention`, to compare with transformers' own attention."""
    original = {ours: theirs for theirs, ours in _REPLACED.items()}
    for module in model.modules():
        module.__class__ = original.get(type(module), type(module))


def _depends_on_positions(config: object) -> bool:
    kinds = getattr(config, "pos_att_type", None) or ()
    return bool(getattr(config, "relative_attention", False)) and ("c2p" in kinds or "p2c" in kinds)


@functools.cache
def _divisor(size: int, terms: int, dtype: torch.dtype) -> float:
    """Return √(size·terms), rounded as in transformers: to float32, then to the dtype of the scores."""
    return float(scaled_size_sqrt(torch.empty(0, size), terms).to(dtype))


def _shift(products: Tensor) -> Tensor:
    """Return a view [m, n, n] of contiguous products [m, n, 2n − 1]; its entry (i, j) is their entry (i, n − 1 − i + j)."""
    count, length, width = products.shape
    strides = (length * width, width - 1, 1)
    return products.as_strided((count, length, length), strides, products.storage_offset() + length - 1)


def _gather(products: Tensor, index: Tensor) -> Tensor:
    """Return the entries of products [m, n, positions] at an index [n, n], shape [m, n, n]."""
    return products.gather(-1, index.expand(len(products), *index.shape))
