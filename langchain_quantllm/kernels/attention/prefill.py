"""Attention of a prefill step over the blocks of the KV cache, in Triton: tiles and the kernel."""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object, and its compiler
# resolves every annotation of a kernel's arguments, and refuses others than its own.

from functools import cache

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.attention.blocks import key_indices, load_blocks, scale_indices
from langchain_quantllm.kernels.attention.eight_bits import converts_fp8, decoded, load_scales, normalized, pointers
from langchain_quantllm.kernels.attention.softmax import (
    biased,
    fold,
    keys_within,
    latent_scores_of,
    load_latent_query,
    scores_of,
    with_sink,
)
from langchain_quantllm.kernels.kv_quantization import KVScales
from langchain_quantllm.kernels.launch import COMPILER_OPTIONS, dense_vectors, power_of_2
from langchain_quantllm.kernels.reference import PREFILL_TILE


def prefill_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    tiles: torch.Tensor,
    *,
    value_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    chunk: int = 0,
    sinks: torch.Tensor | None = None,
    biases: torch.Tensor | None = None,
    scales: KVScales | None = None,
    masks_all: bool = False,
) -> torch.Tensor:
    """Attend with packed chunks of several prompts; see `reference.prefill_attention`.

    `window`, `softcap`, `chunk` and `masks_all` are compiled in, and whether there are `sinks` and `biases`. With
    `masks_all`, all tiles of keys are masked, also where every query sees them, so that a query's result does not
    depend on its tile, bit for bit.

    Source:
        The softmax over tiles: FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithm 1.
    """
    query = dense_vectors(query)
    _, heads, tokens, query_dim = query.shape
    _, block_tokens, kv_heads, row = kv.shape
    key_dim, is_latent = row - value_dim, query_dim == row
    element_bytes = max(2, kv.element_size())  # 8 bits are decoded to 16
    queries, keys, warps, stages = _prefill_tiles(key_dim, value_dim, element_bytes, kv.device, is_latent)
    out = query.new_empty((1, tokens, heads, value_dim))
    _prefill_kernel[(heads, tiles.shape[0], PREFILL_TILE // queries)](
        query,
        kv,
        table,
        tiles,
        out,
        sinks,
        biases,
        *pointers(scales),
        scale,
        query.stride(1),
        query.stride(2),
        table.stride(0),
        0 if biases is None else biases.stride(0),
        block_tokens=block_tokens,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        window=window,
        softcap=softcap,
        chunk=chunk,
        is_latent=is_latent,
        converts_fp8=converts_fp8(kv.device),
        key_tile=power_of_2(key_dim, 16),
        value_tile=power_of_2(value_dim, 16),
        queries=queries,
        keys=keys,
        masks_all=masks_all,
        num_warps=warps,
        num_stages=stages,
        **COMPILER_OPTIONS,
    )
    return out


@cache
def _prefill_tiles(
    key_dim: int, value_dim: int, element_bytes: int, device: torch.device, is_latent: bool
) -> tuple[int, int, int, int]:
    """Choose queries and keys per tile, warps and stages, for 99 KB of shared memory or Hopper's 227."""
    token_bytes = (power_of_2(key_dim, 16) + power_of_2(value_dim, 16)) * element_bytes
    if is_latent:  # as in `decode`
        return (PREFILL_TILE // 2, 32, 8, 2) if element_bytes < 4 else (PREFILL_TILE // 4, 16, 8, 1)
    if element_bytes == 4:
        return PREFILL_TILE // 2, 16, 8, 2
    if token_bytes <= 512:
        return PREFILL_TILE, keys_within(32768, token_bytes, 128), 4, 2
    # On Hopper one warpgroup multiplies and holds 64 rows; elsewhere these are too many for the registers of 4 warps.
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        return PREFILL_TILE, keys_within(65536, token_bytes, 64), 4, 2
    return PREFILL_TILE, keys_within(32768, token_bytes, 64), 8, 2


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _prefill_kernel(
    query: tl.tensor,
    kv: tl.tensor,
    table: tl.tensor,
    tiles: tl.tensor,
    out: tl.tensor,
    sinks: tl.tensor,
    biases: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    scale: tl.tensor,
    query_head_stride: tl.tensor,
    query_token_stride: tl.tensor,
    table_stride: tl.tensor,
    biases_stride: tl.tensor,
    block_tokens: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    window: tl.constexpr,
    softcap: tl.constexpr,
    chunk: tl.constexpr,
    is_latent: tl.constexpr,
    converts_fp8: tl.constexpr,
    key_tile: tl.constexpr,
    value_tile: tl.constexpr,
    queries: tl.constexpr,
    keys: tl.constexpr,
    masks_all: tl.constexpr,
) -> None:
    """Attend with one head of one part of a tile; grid `(heads, tiles, parts of a tile)`.

    Heads are the first axis, so that the heads of one key head run together and find its keys in the cache.
    """
    head = tl.program_id(0)
    # The last tiles of a chunk see the most keys: they start first, so that none of them runs alone at the end.
    run = tiles + 4 * (tl.num_programs(1) - 1 - tl.program_id(1))
    skipped = tl.program_id(2) * queries
    count = tl.load(run + 3) - skipped
    if count <= 0:
        return
    blocks = table + tl.load(run).to(tl.int64) * table_stride
    first = tl.load(run + 1).to(tl.int64) + skipped
    position = tl.load(run + 2) + skipped
    end = position + tl.minimum(count, queries)
    members = tl.arange(0, queries)
    key_columns = tl.arange(0, key_tile)
    value_columns = tl.arange(0, value_tile)
    asked = tl.load(
        query
        + tl.cast(head, tl.int64) * query_head_stride
        + (first + members)[:, None] * query_token_stride
        + key_columns[None, :],
        mask=(members[:, None] < count) & (key_columns[None, :] < key_dim),
        other=0.0,
    )
    if scales is not None:
        factor = tl.load(factors + head // group * key_dim + key_columns, mask=key_columns < key_dim, other=1.0)
        asked, sizes = normalized(asked.to(tl.float32) * factor[None, :])
        scale = (sizes * scale)[:, None]
    else:
        asked = asked.to(kv.dtype.element_ty)
    asked_latent = asked
    if is_latent:
        asked_latent = load_latent_query(
            query + tl.cast(head, tl.int64) * query_head_stride + (first + members)[:, None] * query_token_stride,
            members[:, None] < count,
            key_dim,
            value_dim,
            value_tile,
        ).to(kv.dtype.element_ty)
    key_base = kv + key_columns[None, :]
    value_base = kv + key_dim + value_columns[None, :]
    highest = tl.full([queries], float("-inf"), tl.float32)
    weight = tl.zeros([queries], tl.float32)
    total = tl.zeros([queries, value_tile], tl.float32)

    if biases is not None:
        added = biases + tl.cast(head, tl.int64) * biases_stride
        own = tl.load(added + position + members, mask=members < count, other=0.0)
    start = 0
    begin = 0
    if window > 0 or chunk > 0:
        if window > 0:
            begin = tl.maximum(position - window + 1, 0)
        if chunk > 0:
            begin = tl.maximum(begin, position // chunk * chunk)
        start = begin // keys * keys
    elif not masks_all:
        # Whole tiles of keys that every query sees need no mask.
        start = (position + 1) // keys * keys
        for tile in range(0, start, keys):
            seen = tile + tl.arange(0, keys)
            block = load_blocks(blocks, seen, None, block_tokens)
            indices = key_indices(block, seen, block_tokens, kv_heads, head // group) * (key_dim + value_dim)
            key = tl.load(key_base + indices[:, None], mask=key_columns[None, :] < key_dim, other=0.0)
            value = tl.load(value_base + indices[:, None], mask=value_columns[None, :] < value_dim, other=0.0)
            pairs = scale_indices(block, seen, block_tokens, kv_heads, head // group)
            key, value = decoded(key, converts_fp8), decoded(value, converts_fp8)
            if is_latent:
                scores = latent_scores_of(asked, key, asked_latent, value, scale, softcap)
            elif scales is None:
                scores = scores_of(asked, key, None, scale, softcap)
            else:
                key_scales, value_scales = load_scales(scales, pairs, None)
                scores = scores_of(asked, key, key_scales, scale, softcap)
            if biases is not None:
                scores = biased(scores, tl.load(added + seen)[None, :], own)
            if scales is None:
                total, highest, weight = fold(total, highest, weight, scores, value, None)
            else:
                total, highest, weight = fold(total, highest, weight, scores, value, value_scales)
    for tile in range(start, end, keys):
        seen = tile + tl.arange(0, keys)
        written = (seen >= begin) & (seen < end)
        block = load_blocks(blocks, seen, written, block_tokens)
        indices = key_indices(block, seen, block_tokens, kv_heads, head // group) * (key_dim + value_dim)
        key = tl.load(key_base + indices[:, None], mask=written[:, None] & (key_columns[None, :] < key_dim), other=0.0)
        value = tl.load(
            value_base + indices[:, None], mask=written[:, None] & (value_columns[None, :] < value_dim), other=0.0
        )
        pairs = scale_indices(block, seen, block_tokens, kv_heads, head // group)
        key, value = decoded(key, converts_fp8), decoded(value, converts_fp8)
        ages = (position + members)[:, None] - seen[None, :]
        visible = ages >= 0
        if window > 0:
            visible = visible & (ages < window)
        if chunk > 0:
            visible = visible & (seen[None, :] >= ((position + members) // chunk * chunk)[:, None])
        if is_latent:
            scores = latent_scores_of(asked, key, asked_latent, value, scale, softcap)
        elif scales is None:
            scores = scores_of(asked, key, None, scale, softcap)
        else:
            key_scales, value_scales = load_scales(scales, pairs, written)
            scores = scores_of(asked, key, key_scales, scale, softcap)
        if biases is not None:
            scores = biased(scores, tl.load(added + seen, mask=written, other=0.0)[None, :], own)
        scores = tl.where(visible, scores, float("-inf"))
        if scales is None:
            total, highest, weight = fold(total, highest, weight, scores, value, None)
        else:
            total, highest, weight = fold(total, highest, weight, scores, value, value_scales)

    # Only rows after the last token can have seen no key; they are not stored.
    if sinks is not None:
        weight = with_sink(weight, highest, tl.load(sinks + head))
    found = total / tl.where(weight > 0, weight, 1.0)[:, None]
    heads = tl.num_programs(0)
    tl.store(
        out + ((first + members) * heads + head)[:, None] * value_dim + value_columns[None, :],
        found.to(out.dtype.element_ty),
        mask=(members[:, None] < count) & (value_columns[None, :] < value_dim),
    )
