"""Attention of one sequence in tiles of queries, on a CPU.

The tile of a query, its place there and the number of keys follow from its position alone. So it is the same
computation, whether the query comes with the rest of a prompt, with a part of it, or by itself; queries of other
positions that are not asked for are zeros. Keys after a query have weight 0, whatever they are: one that is not finite
spoils the queries that see it, and no other.
"""

from __future__ import annotations

import functools

import torch

QUERIES = 8
"""Queries of a tile: in a decode step, all but one are zeros."""

KEYS = 64
"""The keys of a tile are padded to a multiple of this."""

_KEPT_KEYS = 2048
"""Keys up to which masks are kept for the next layer and the next step."""


def attend_in_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position: int,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    chunk: int = 0,
    sinks: torch.Tensor | None = None,
    biases: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with consecutive queries of one sequence.

    Args:
        query: Of shape `(heads, tokens, key_dim)`, float32.
        key: All keys up to the last query, padded to a multiple of `KEYS`, of shape `(kv_heads, keys, key_dim)`,
            float32.
        value: Likewise, of shape `(kv_heads, keys, value_dim)`.
        position: Position of the first query.
        scale: Factor of the scores.
        window: Most keys that a query sees; 0 for all.
        softcap: The cap of the scores; 0 for none.
        chunk: Size of the chunks, each of which sees only itself; 0 for no chunks.
        sinks: See `kernels.reference.decode_attention`.
        biases: See `kernels.reference.decode_attention`.

    Returns:
        Of shape `(heads, tokens, value_dim)`, float32.
    """
    heads, tokens, dim = query.shape
    kv_heads = key.shape[0]
    first, last = position // QUERIES, (position + tokens - 1) // QUERIES
    skipped = position - first * QUERIES
    asked = query.new_zeros(kv_heads, heads // kv_heads, last + 1 - first, QUERIES, dim)
    asked.view(kv_heads, heads // kv_heads, -1, dim)[:, :, skipped : skipped + tokens] = (query * scale).view(
        kv_heads, -1, tokens, dim
    )
    is_sound = bool((key.sum() + value.sum()).isfinite())
    if not is_sound:
        spoils = ~(key.isfinite().all(-1) & value.isfinite().all(-1))[..., None]
        key, value = key.masked_fill(spoils, torch.nan), value.masked_fill(spoils, 0)
    found = []
    for tile in range(first, last + 1):
        begin = tile * QUERIES
        start = max(0, begin - window + 1) if window else 0
        start = max(start, begin // chunk * chunk if chunk else 0) // KEYS * KEYS
        end = -(-(begin + QUERIES) // KEYS) * KEYS
        grouped = asked[:, :, tile - first].reshape(kv_heads, -1, dim)
        keys = key[:, start:end].transpose(1, 2)
        before = start % chunk if chunk else 0
        mask = hidden = _mask(begin - start, end - start, window, chunk, before, grouped.shape[1])
        if biases is not None:
            mask = mask + _biases(biases, begin, start, end).view(kv_heads, -1, end - start)
        if softcap:
            scores = softcap * torch.tanh(torch.bmm(grouped, keys) / softcap) + mask
        else:
            scores = torch.baddbmm(mask, grouped, keys)
        if not is_sound:  # NaN stays NaN with minus infinity added
            scores = scores.masked_fill(hidden == -torch.inf, -torch.inf)
        found.append(torch.bmm(_shares(scores, sinks), value[:, start:end]).view(heads, QUERIES, -1))
    return (found[0] if len(found) == 1 else torch.cat(found, 1))[:, skipped : skipped + tokens]


def _shares(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Compute the softmax of scores of shape `(kv_heads, rows, keys)`, with the sinks of the heads."""
    if sinks is None:
        return scores.softmax(-1)
    of_rows = sinks.float().view(len(scores), -1, 1).expand(-1, -1, QUERIES).reshape(*scores.shape[:2], 1)
    return torch.cat([scores, of_rows], -1).softmax(-1)[..., :-1]


def _biases(biases: torch.Tensor, begin: int, start: int, end: int) -> torch.Tensor:
    """Take the biases of keys from `start` to `end`, relative to those of a tile's queries from `begin`.

    Returns:
        Of shape `(heads, QUERIES, keys)`, float32; the last one again beyond the end of `biases`, where no key is seen.
    """
    last = biases.shape[1] - 1
    own, seen = (torch.arange(*ends).clamp(max=last) for ends in ((begin, begin + QUERIES), (start, end)))
    return biases[:, None, seen] - biases[:, own, None]


def _mask(begin: int, keys: int, window: int, chunk: int, before: int, rows: int) -> torch.Tensor:
    """Make the mask of a tile whose queries begin `begin` keys after the first one it reads.

    Its chunk has `before` keys before that one; 0 without chunks.

    Returns:
        Of shape `(rows, keys)`, float32: 0 for keys that a query sees, and minus infinity. Rows repeat the queries.
    """
    return (_kept_mask if keys <= _KEPT_KEYS else _make_mask)(begin, keys, window, chunk, before, rows)


def _make_mask(begin: int, keys: int, window: int, chunk: int, before: int, rows: int) -> torch.Tensor:
    at, seen = torch.arange(begin, begin + QUERIES)[:, None], torch.arange(keys)
    hidden = (at < seen) | (at - seen >= window) if window else at < seen
    if chunk:
        hidden = hidden | (seen < (at + before) // chunk * chunk - before)
    mask = torch.zeros(QUERIES, keys, dtype=torch.float32).masked_fill(hidden, -torch.inf)
    return mask.repeat(rows // QUERIES, 1)


_kept_mask = functools.lru_cache(maxsize=32)(_make_mask)
