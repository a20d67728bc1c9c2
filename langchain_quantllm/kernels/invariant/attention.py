"""Attention of one sequence in tiles of queries, on a CPU.

The tile of a query, its place there and the number of keys follow from its position alone. So it is the same
computation, whether the query comes with the rest of a prompt, with a part of it, or by itself; queries of other
positions that are not asked for are zeros. Keys after a query have weight 0, whatever they are.
"""

from __future__ import annotations

import torch

QUERIES = 8
"""Queries of a tile: in a decode step, all but one are zeros."""

KEYS = 64
"""The keys of a tile are padded to a multiple of this."""


def attend_in_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    position: int,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attend with consecutive queries of one sequence.

    Args:
        query: Of shape `(heads, tokens, key_dim)`, float32.
        key: All keys up to the last query, padded with finite numbers to a multiple of `KEYS`, of shape
            `(kv_heads, keys, key_dim)`, float32.
        value: Likewise, of shape `(kv_heads, keys, value_dim)`.
        position: Position of the first query.
        scale: Factor of the scores.
        window: Most keys that a query sees; 0 for all.
        softcap: The cap of the scores; 0 for none.

    Returns:
        Of shape `(heads, tokens, value_dim)`, float32.
    """
    heads, tokens, _ = query.shape
    kv_heads = key.shape[0]
    first, last = position // QUERIES, (position + tokens - 1) // QUERIES
    asked = query.new_zeros(heads, (last + 1 - first) * QUERIES, query.shape[2])
    skipped = position - first * QUERIES
    asked[:, skipped : skipped + tokens] = query
    out = query.new_empty(heads, asked.shape[1], value.shape[2])
    for tile in range(first, last + 1):
        place = (tile - first) * QUERIES
        begin = tile * QUERIES
        start = max(0, begin - window + 1) // KEYS * KEYS if window else 0
        end = -(-(begin + QUERIES) // KEYS) * KEYS
        grouped = asked[:, place : place + QUERIES].reshape(kv_heads, -1, query.shape[2])
        scores = torch.bmm(grouped, key[:, start:end].transpose(1, 2)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.view(kv_heads, -1, QUERIES, end - start)
        shares = scores.masked_fill(_hidden(begin, start, end, window), -torch.inf).softmax(-1)
        attended = torch.bmm(shares.view(kv_heads, -1, end - start), value[:, start:end])
        out[:, place : place + QUERIES] = attended.view(heads, QUERIES, -1)
    return out[:, skipped : skipped + tokens]


def _hidden(begin: int, start: int, end: int, window: int) -> torch.Tensor:
    """Mask the keys from `start` to `end` that the queries of a tile do not see: `(QUERIES, end - start)`, bool."""
    ages = torch.arange(begin, begin + QUERIES)[:, None] - torch.arange(start, end)
    return (ages < 0) | (ages >= window) if window else ages < 0
