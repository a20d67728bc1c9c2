"""Attention by PyTorch's own, over copies of a sequence's blocks: for every device and dtype.

Owns how sequences of different lengths are gathered together, and the bounds of the memory that this takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from langchain_quantllm.engine.attention import Batch, LayerPool, Span
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.dense_attention import (
    Scoring,
    by_distance,
    dense_attention,
    dense_attention_around_nan,
)
from langchain_quantllm.kernels import kv_quantization

_GATHERED_BYTES = 64 * 2**20
"""Most bytes that sequences are gathered to at once, unless one alone takes more."""

_SCORES = 2**22
"""Most scores, or places of a mask, at once, unless `_LEAST_QUERIES` take more."""

_LEAST_QUERIES = 16
_PADDING_BLOCKS = 8  # padding that costs about as much as one more group


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Sequences of one new token each, gathered together: padded to the same number of blocks.

    Args:
        rows: Number of sequences.
        tokens: Index of each one's token in the pack, of shape `(rows,)`, int64; None if they are the pack.
        blocks: Their blocks, of shape `(rows * width,)`, int64; a sequence's last block again as padding.
        seen: The gathered tokens of a row that any of the new ones sees.
        mask: Those that each new one sees, of shape `(rows, 1, 1, seen)`, bool; None for all.
        positions: Positions of these tokens, of shape `(rows, seen)`, int64; padding has one of the sequence's.
        own: Positions of the new tokens, of shape `(rows, 1)`, int64.
        hidden: Indices of the gathered tokens of all rows that the new ones do not see, int64.
    """

    rows: int
    tokens: torch.Tensor | None
    blocks: torch.Tensor
    seen: slice
    mask: torch.Tensor | None
    positions: torch.Tensor
    own: torch.Tensor
    hidden: torch.Tensor


class GatherAttention:
    """Copies the blocks that a token sees behind each other, and calls PyTorch's attention.

    Sequences of one new token are gathered in groups of similar lengths, so that a step copies at most twice the blocks
    that they see, and `_PADDING_BLOCKS` for each group. Temporary memory is bounded by `_GATHERED_BYTES`, or by the
    keys and values of the longest sequence in one layer if these are more, and some copies of `_SCORES` numbers.
    """

    prefills_on_device = False

    def write(self, pool: LayerPool, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
        """Store keys and values; see `Attention.write`."""
        self._write(pool, key[0].transpose(0, 1), value[0].transpose(0, 1), batch)

    @staticmethod
    def _write(pool: LayerPool, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
        """Store keys and values of shape `(tokens, kv_heads, dim)`."""
        indices = batch.cached((key.device, "indices"), lambda: _pool_indices(batch, key.device))
        if pool.scales is not None:
            at = (indices // BLOCK_TOKENS, indices % BLOCK_TOKENS)
            kv_quantization.write(key, value, pool.kv, pool.scales, *at)
            return
        pool.kv.flatten(0, 1).index_copy_(0, indices, torch.cat([key, value], -1))

    def decode(
        self,
        pool: LayerPool,
        states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        batch: Batch,
        *,
        scale: float,
        window: int,
        chunk: int,
    ) -> torch.Tensor:
        """Write and attend as `write` and `attend` do, in fewer operations, in a batch that decodes.

        Args:
            pool: The layer's keys and values.
            states: Queries, keys and values of shape `(tokens, heads of its own, dim)`.
            batch: The tokens.
            scale: See `attend`.
            window: See `attend`.
            chunk: See `attend`.

        Returns:
            Attended values of shape `(1, tokens, heads * value_dim)`.
        """
        query, key, value = states
        self._write(pool, key, value, batch)
        groups = _cached_groups(batch, pool, Scoring(scale=scale, window=window, softcap=0.0, chunk=chunk))
        if len(groups) > 1 or groups[0].tokens is not None or pool.is_latent:
            options = {"scale": scale, "window": window, "softcap": 0.0, "chunk": chunk}
            return self.attend(pool, query.transpose(0, 1)[None], batch, **options).flatten(2)
        [group] = groups
        keys, values = _gathered(pool, group)
        asked = query.view(len(query), keys.shape[1], -1, query.shape[-1])
        attended = scaled_dot_product_attention(asked, keys, values, attn_mask=group.mask, scale=scale)
        return attended.reshape(1, len(query), -1)

    def attend(self, pool: LayerPool, query: torch.Tensor, batch: Batch, **options: Any) -> torch.Tensor:
        """Attend; see `Attention.attend`."""
        scoring = Scoring(**options)
        groups = _cached_groups(batch, pool, scoring)
        if len(groups) == 1 and groups[0].tokens is None:
            return _decode(pool, query, groups[0], scoring)[None]
        out = query.new_empty(1, query.shape[2], query.shape[1], pool.value_dim)
        for group in groups:
            out[0].index_copy_(0, group.tokens, _decode(pool, query, group, scoring.of_tokens(group.tokens)))
        for span in batch.spans:
            if span.count > 1:
                tokens = slice(span.first, span.first + span.count)
                table = batch.table[span.slot]
                runs = span.groups_in(scoring.window)
                own = scoring.of_tokens(tokens)
                _prefill(pool, query[0, :, tokens], out[0, tokens], table, span.position, own, runs)
        return out


# Sequences of one new token.


def _decode(pool: LayerPool, query: torch.Tensor, group: _Group, scoring: Scoring) -> torch.Tensor:
    """Attend with one token of each sequence of a group; returns values of shape `(rows, heads, value_dim)`."""
    key, value = _gathered(pool, group)
    # The queries of a group of heads see the same keys: they are passed as several positions of one head.
    asked = query[0] if group.tokens is None else query[0].index_select(1, group.tokens)
    asked = asked.transpose(0, 1).unflatten(1, (key.shape[1], -1))
    if scoring.sinks is not None:
        sinks = scoring.sinks.transpose(0, 1) if scoring.sinks.dim() > 1 else scoring.sinks[None]
        scoring = replace(scoring, sinks=sinks.reshape(-1, *asked.shape[1:3], 1))
    if scoring.biases is not None:
        biases = scoring.biases[:, group.positions] - scoring.biases[:, group.own]
        scoring = replace(scoring, biases=biases.transpose(0, 1).unflatten(1, asked.shape[1:3]))
    if scoring.relative is not None:
        biases = by_distance(scoring.relative, group.own - group.positions)
        scoring = replace(scoring, biases=biases.transpose(0, 1).unflatten(1, asked.shape[1:3]))
    return dense_attention(asked, key, value, group.mask, scoring).flatten(1, 2)


def _gathered(pool: LayerPool, group: _Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the keys and values that a group sees, of shape `(rows, kv_heads, seen, dim)`."""
    gathered = pool.read(group.blocks).flatten(0, 1)
    if group.mask is not None:
        # PyTorch adds a mask to the scores and multiplies the values with 0, and NaN would stay NaN.
        gathered.index_fill_(0, group.hidden, 0)
    return _split(pool, gathered.unflatten(0, (group.rows, -1))[:, group.seen])


def _cached_groups(batch: Batch, pool: LayerPool, scoring: Scoring) -> list[_Group]:
    """Return the groups of a batch; layers with such a pool and window share them."""
    key = ("groups", pool.kv.device, scoring.window, scoring.chunk, pool.kv.stride(0), pool.dtype)
    return batch.cached(key, lambda: _groups(batch, pool, scoring))


def _groups(batch: Batch, pool: LayerPool, scoring: Scoring) -> list[_Group]:
    """Divide the sequences of one new token into groups, for all layers with such a pool and window."""
    # In a batch that decodes, the order alone tells which token is a span's.
    rows = [(i if batch.decodes else span.first, span) for i, span in enumerate(batch.spans) if span.count == 1]
    by_width = sorted(rows, key=lambda row: _width(row[1], scoring), reverse=True)
    widths = [_width(span, scoring) for _, span in by_width]
    device, block_bytes = pool.kv.device, pool.kv.stride(0) * pool.dtype.itemsize
    cuts = list(cut_widths(widths, max(1, _GATHERED_BYTES // block_bytes)))
    if batch.decodes and len(cuts) == 1:
        return [replace(_group(batch, rows, widths[0], scoring, device), tokens=None)]
    return [_group(batch, by_width[start:stop], widths[start], scoring, device) for start, stop in cuts]


def _width(span: Span, scoring: Scoring) -> int:
    """Count the blocks that a span of one token sees."""
    return span.position // BLOCK_TOKENS - scoring.first_seen(span.position) // BLOCK_TOKENS + 1


def cut_widths(widths: Sequence[int], most_blocks: int) -> Iterator[tuple[int, int]]:
    """Cut widths in falling order into groups, each padded to its first one; yields the bounds of each.

    A cut is made where padding would begin to be more than half, and costs more than another group, and where a group
    would hold more than `most_blocks`.
    """
    start = 0
    for i, width in enumerate(widths):
        widest = widths[start]
        wastes = 2 * width < widest and (widest - width) * (len(widths) - i) > _PADDING_BLOCKS
        if i > start and (wastes or (i + 1 - start) * widest > most_blocks):
            yield start, i
            start = i
    if widths:
        yield start, len(widths)


def _group(
    batch: Batch, rows: Sequence[tuple[int, Span]], width: int, scoring: Scoring, device: torch.device
) -> _Group:
    """Compute the tensors of a group, on the host as far as possible: its sequences are known there."""
    spans = [span for _, span in rows]
    slots, last, seen = torch.tensor([(s.slot, s.position, scoring.first_seen(s.position)) for s in spans]).T[..., None]
    first_block = seen // BLOCK_TOKENS
    columns = torch.minimum(first_block + torch.arange(width), last // BLOCK_TOKENS)
    at = first_block * BLOCK_TOKENS + torch.arange(width * BLOCK_TOKENS)
    visible = (at >= seen) & (at <= last)
    some = visible.any(0).nonzero()[:, 0].tolist()
    mask = visible[:, some[0] : some[-1] + 1]
    blocks = batch.table[slots.to(batch.table.device), columns.to(batch.table.device)]
    return _Group(
        rows=len(rows),
        tokens=torch.tensor([token for token, _ in rows]).to(device),
        blocks=blocks.flatten().to(device).long(),
        seen=slice(some[0], some[-1] + 1),
        mask=None if bool(mask.all()) else mask[:, None, None].to(device),
        positions=torch.minimum(at, last)[:, some[0] : some[-1] + 1].to(device),
        own=last.to(device),
        hidden=(~visible).flatten().nonzero()[:, 0].to(device),
    )


# Chunks of prompts.


def _prefill(
    pool: LayerPool,
    query: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor,
    position: int,
    scoring: Scoring,
    groups: tuple[tuple[int, int], ...] = (),
) -> None:
    """Attend with consecutive tokens of one sequence.

    Args:
        pool: The layer's keys and values.
        query: Queries of shape `(heads, count, query_dim)`.
        out: The result, of shape `(count, heads, value_dim)`. Written to.
        table: The sequence's blocks.
        position: Position of the first token.
        scoring: How keys are scored.
        groups: Bounds of runs of positions whose tokens all see each other, within the window.
    """
    count = query.shape[1]
    begin, length = scoring.first_seen(position), position + count
    first_block = begin // BLOCK_TOKENS
    blocks = table[first_block : -(-length // BLOCK_TOKENS)].to(pool.kv.device).long()
    gathered = pool.read(blocks).flatten(0, 1)
    gathered = gathered[begin - first_block * BLOCK_TOKENS : length - first_block * BLOCK_TOKENS]
    key, value = (part[0, :, None] for part in _split(pool, gathered[None]))
    asked = query.unflatten(0, (len(key), -1))
    # Some heads share their keys, without copies of them.
    key, value = (part.expand(-1, asked.shape[1], -1, -1) for part in (key, value))
    # A token that is no number must not reach those before it: other prompts begin with them, too.
    is_sound = bool(gathered.sum(dtype=torch.float32).isfinite())
    # Otherwise the scores are in memory; PyTorch has no fused attention for values of another size, either.
    is_fused = is_sound and not groups and scoring.is_plain and pool.query_dim == pool.value_dim
    if is_fused and not position and length <= min(scoring.window or length, scoring.chunk or length):
        attended = scaled_dot_product_attention(asked, key, value, is_causal=True, scale=scoring.scale)
        out.copy_(attended.flatten(0, 1).transpose(0, 1))
        return
    at_once = max(_LEAST_QUERIES, _SCORES // (len(gathered) * (1 if is_fused else len(query))))
    for at in range(0, count, at_once):
        stop = min(at + at_once, count)
        last = max([position + stop, *(end for start, end in groups if start < position + stop)])
        seen = slice(scoring.first_seen(position + at) - begin, last - begin)
        bounds = (begin + seen.start, begin + seen.stop)
        mask = _visible(position + at, stop - at, *bounds, scoring, query.device, groups)
        attend = dense_attention if is_sound else dense_attention_around_nan
        queries = slice(position + at, position + stop)
        own = _of_tile(scoring.of_tokens(slice(at, stop)), asked.shape[:2], queries, slice(*bounds))
        attended = attend(asked[:, :, at:stop], key[:, :, seen], value[:, :, seen], mask, own)
        out[at:stop] = attended.flatten(0, 1).transpose(0, 1)


def _of_tile(scoring: Scoring, heads: tuple[int, int], queries: slice, seen: slice) -> Scoring:
    """Shape sinks and biases for scores of shape `(kv_heads, group, queries, keys)`, by the positions of both."""
    sinks, biases = scoring.sinks, scoring.biases
    if sinks is not None:
        sinks = sinks.reshape(*heads, -1, 1)
    if scoring.relative is not None:
        device = scoring.relative.device
        places = (torch.arange(part.start, part.stop, device=device) for part in (queries, seen))
        distances = torch.sub(*torch.meshgrid(*places, indexing="ij"))
        biases = by_distance(scoring.relative, distances).unflatten(0, heads)
    elif biases is not None:
        biases = (biases[:, None, seen] - biases[:, queries, None]).unflatten(0, heads)
    return replace(scoring, sinks=sinks, biases=biases)


def _visible(
    position: int,
    count: int,
    first: int,
    stop: int,
    scoring: Scoring,
    device: torch.device,
    groups: tuple[tuple[int, int], ...] = (),
) -> torch.Tensor:
    """Mask the keys from `first` to `stop` that each of `count` tokens sees: `(count, stop - first)`, bool."""
    at = torch.arange(position, position + count, device=device)[:, None]
    seen = torch.arange(first, stop, device=device)
    visible = at >= seen
    for start, end in groups:
        visible[max(0, start - position) : max(0, end - position), max(0, start - first) : max(0, end - first)] = True
    if scoring.window:
        visible = visible & (at - seen < scoring.window)
    return visible & (seen >= at // scoring.chunk * scoring.chunk) if scoring.chunk else visible


# All tokens.


def _pool_indices(batch: Batch, device: torch.device) -> torch.Tensor:
    """Compute the index of each token's keys and values in the flattened pool, of shape `(tokens,)`."""
    positions = batch.positions.long()
    blocks = batch.table[batch.slots.long(), positions // BLOCK_TOKENS].long()
    return (blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS).to(device)


def _split(pool: LayerPool, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split `(sequences, tokens, kv_heads, dims)` into keys and values of `(sequences, kv_heads, tokens, dim)`."""
    kv = kv.transpose(1, 2)
    return kv[..., : pool.query_dim], kv[..., pool.key_dim :]
