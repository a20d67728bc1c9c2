"""Attention to chosen tokens only, by PyTorch: for each token, the chosen keys and values are gathered from blocks.

Which ones are chosen is computed by `indexed_attention`.
"""

from __future__ import annotations

import torch

from langchain_quantllm.engine.attention import LayerPool, PagedForward
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.errors import UnsupportedError

_GATHERED_BYTES = 64 * 2**20
"""Most bytes of keys and values that are gathered at once, unless those of one token take more."""


def attend_to_chosen(
    forward: PagedForward,
    chosen: torch.Tensor,
    query: torch.Tensor,
    scale: float | None,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend in the layer that was written last.

    Args:
        forward: The forward.
        chosen: Positions that each token sees, of shape `(1, tokens, chosen)`, padded with -1. A token that has no more
            positions than that before it, and itself, sees all of them.
        query: See `PagedForward.attend`, as for the others.
        scale: The factor of the scores.
        window: No window is known here.
        softcap: The cap of the scores.
        chunk: No chunks are known here.
        sinks: The sinks.

    Returns:
        Attended values of shape `(1, tokens, heads, value_dim)`.

    Raises:
        UnsupportedError: If the layer has a window or chunks as well.
    """
    if window or chunk:
        msg = "its attention sees chosen tokens of a window"
        raise UnsupportedError(msg)
    forward.choosing.add(forward.layer)
    if all(span.position + span.count <= chosen.shape[-1] for span in forward.batch.spans):
        return forward.attend(query, scale, window, softcap, chunk, sinks)
    forward.windows[forward.layer] = 0
    pool, (_, heads, tokens, dim) = forward.pool(forward.layer), query.shape
    table, slots = _on_device(forward, pool.kv.device)
    out = query.new_empty(1, tokens, heads, pool.value_dim)
    at_once = max(1, _GATHERED_BYTES // (chosen.shape[-1] * pool.kv[0, 0].nbytes))
    for at in range(0, tokens, at_once):
        tile = slice(at, at + at_once)
        gathered, is_seen = _gather(pool, table, slots[tile], chosen[0, tile])
        key, value = gathered[..., : pool.query_dim], gathered[..., pool.key_dim :]
        asked = query[0, :, tile].transpose(0, 1).unflatten(1, (key.shape[1], -1))
        out[0, tile] = _attend(
            asked, key, value, is_seen, scale=dim**-0.5 if scale is None else scale, softcap=softcap or 0.0, sinks=sinks
        ).flatten(1, 2)
    return out


def _on_device(forward: PagedForward, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the block table, and the row of each token in it, on a layer's device."""
    batch = forward.batch
    return batch.cached((device, "rows of the table"), lambda: (batch.table.to(device), batch.slots.to(device).long()))


def _gather(
    pool: LayerPool, table: torch.Tensor, slots: torch.Tensor, chosen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the chosen keys and values of tokens.

    Returns:
        Keys and values of shape `(tokens, kv_heads, chosen, dims)`, zero where there are none, and where there are
        some, of shape `(tokens, chosen)`.
    """
    is_seen = chosen >= 0
    positions = chosen.clamp(min=0).long()
    blocks = table[slots[:, None], positions // BLOCK_TOKENS].long()
    places = blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS
    gathered = pool.kv.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape)
    # Where there is no token, there may be NaN, and 0 times NaN is NaN.
    return gathered.masked_fill(~is_seen[..., None, None], 0).transpose(1, 2), is_seen


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_seen: torch.Tensor,
    *,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend with queries of shape `(tokens, kv_heads, group, query_dim)`; the softmax is computed in float32."""
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~is_seen[:, None, None], -torch.inf)
    if sinks is not None:
        beside = sinks.to(scores.device).float().view(*scores.shape[1:3], 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, beside], -1)
    return scores.softmax(-1)[..., : key.shape[-2]].to(value.dtype) @ value
