"""Attention of a decode step over the blocks of the KV cache, in Triton: tiles, sharing of long sequences, kernels."""
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
from langchain_quantllm.kernels.attention.words import attend_to_words
from langchain_quantllm.kernels.kv_quantization import KVScales
from langchain_quantllm.kernels.launch import dense_vectors, launch_options, power_of_2, wait_for_inputs

_MOST_GROUP_ROWS = 64
"""Query heads of one program; more query heads of one key head are divided between programs."""
_MOST_LATENT_BYTES = 64
"""The same for latents, times the bytes of a number: a program holds a query and a sum of that length for each."""
_LEAST_ROWS = 16
_ALONE_TILES = 2
"""Most tiles of keys of a sequence that is not shared: sharing costs more time to start and to combine."""
_COMBINED_AT_ONCE = tl.constexpr(8192)
"""Numbers that a program holds when it combines shares."""


def decode_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    value_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    chunk: int = 0,
    sinks: torch.Tensor | None = None,
    biases: torch.Tensor | None = None,
    scales: KVScales | None = None,
    splits: int = 1,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with one new token of each sequence; see `reference.decode_attention`.

    Up to `splits` programs share the keys of one sequence, and the last of them combines their results; a sequence with
    few keys is not shared, and none is without `arrivals`. The counts in `arrivals` are zeros before and after a call,
    and belong to one call at a time. `window`, `softcap` and `chunk` are compiled in, and whether there are `sinks` and
    `biases`.

    Source:
        Sharing a sequence: Flash-Decoding, https://pytorch.org/blog/flash-decoding/.
    """
    query = dense_vectors(query)
    _, heads, tokens, query_dim = query.shape
    _, block_tokens, kv_heads, row = kv.shape
    key_dim, is_latent = row - value_dim, query_dim == row
    group = heads // kv_heads
    most_rows = _MOST_LATENT_BYTES // kv.element_size() if is_latent else _MOST_GROUP_ROWS
    group_rows = min(power_of_2(group, _LEAST_ROWS), most_rows)
    if arrivals is None:
        arrivals, splits = positions, 1
    keys, warps, stages = _decode_tiles(key_dim, value_dim, kv.element_size(), is_latent)
    out = query.new_empty((1, tokens, heads, value_dim))
    # If no sequence is shared, the kernel accesses neither of these, nor the arrivals.
    parts = out if splits == 1 else kv.new_empty((tokens, heads, splits, value_dim), dtype=torch.float32)
    levels = out if splits == 1 else kv.new_empty((tokens, heads, splits), dtype=torch.float32)
    # A product has at least 16 inputs and 8 outputs.
    in_words = scales is not None and key_dim > 32 and value_dim > 16 and key_dim % 4 == value_dim % 4 == 0
    _decode_kernel[(tokens, kv_heads * -(-group // group_rows), splits)](
        query,
        kv.view(torch.int32) if in_words else kv,
        table,
        slots,
        positions,
        out,
        parts,
        levels,
        arrivals,
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
        group=group,
        key_dim=key_dim,
        value_dim=value_dim,
        window=window,
        softcap=softcap,
        chunk=chunk,
        splits=splits,
        is_latent=is_latent,
        in_words=in_words,
        is_int8=kv.dtype == torch.int8,
        converts_fp8=converts_fp8(kv.device),
        key_tile=power_of_2(key_dim, 16),
        value_tile=power_of_2(value_dim, 16),
        group_rows=group_rows,
        heads_tile=power_of_2(min(group, group_rows)),
        keys=keys,
        least=_ALONE_TILES,
        num_warps=warps,
        num_stages=stages,
        **launch_options(kv.device),
    )
    return out


def arrivals(multiprocessors: int, device: torch.device) -> torch.Tensor:
    """Allocate the counts of finished programs for `decode_attention`.

    Args:
        multiprocessors: Multiprocessors of the device, as for `default_splits`.
        device: Device of the pools.

    Returns:
        Zeros, int32, enough for the groups of heads that `default_splits` shares in a step, with up to 1,024 heads in a
        group.
    """
    most_groups = 8 * multiprocessors // 3
    return torch.zeros(most_groups * (1024 // _LEAST_ROWS), dtype=torch.int32, device=device)


def default_splits(tokens: int, kv_heads: int, multiprocessors: int) -> int:
    """Choose how many programs of `decode_attention` share a sequence.

    Args:
        tokens: Sequences of the step.
        kv_heads: Key heads of the layer.
        multiprocessors: Multiprocessors of the device.

    Returns:
        The power of two from 1 to 64 that gives about four programs for each multiprocessor: between 8/3 and 16/3, if
        the limits allow. On an H200, fewer programs take up to twice the time for long sequences; more programs are
        slower for short ones.
    """
    programs, splits = tokens * kv_heads, 1
    while splits < 64 and 3 * programs * splits <= 8 * multiprocessors:
        splits *= 2
    return splits


@cache
def _decode_tiles(key_dim: int, value_dim: int, element_bytes: int, is_latent: bool) -> tuple[int, int, int]:
    """Choose keys per tile, warps and stages, for the 99 KB of shared memory of consumer cards."""
    if is_latent:  # queries of that length take a third of it
        return (32, 8, 2) if element_bytes < 4 else (16, 8, 1)
    token_bytes = (power_of_2(key_dim, 16) + power_of_2(value_dim, 16)) * element_bytes
    if element_bytes == 4:
        # Without tensor cores the operands of a product are in registers: small tiles, many warps.
        return keys_within(32768, token_bytes, 32), 8, 2
    return keys_within(32768, token_bytes, 64), 4, 2


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _decode_kernel(
    query: tl.tensor,
    kv: tl.tensor,
    table: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    levels: tl.tensor,
    arrivals: tl.tensor,
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
    splits: tl.constexpr,
    is_latent: tl.constexpr,
    in_words: tl.constexpr,
    is_int8: tl.constexpr,
    converts_fp8: tl.constexpr,
    key_tile: tl.constexpr,
    value_tile: tl.constexpr,
    group_rows: tl.constexpr,
    heads_tile: tl.constexpr,
    keys: tl.constexpr,
    least: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Attend with the query heads of one key head to one share of a sequence; the last program combines the shares.

    Grid `(tokens, kv_heads * programs of a group, splits)`. If a sequence has several shares, each program writes its
    values to `parts` and the binary logarithm of the sum of its exponentials to `levels`, and counts in `arrivals`.
    """
    wait_for_inputs(early)
    token = tl.program_id(0).to(tl.int64)
    programs: tl.constexpr = (group + group_rows - 1) // group_rows
    head = tl.program_id(1) // programs
    split = tl.program_id(2)
    members = tl.program_id(1) % programs * group_rows + tl.arange(0, group_rows)
    heads = head * group + members
    value_columns = tl.arange(0, value_tile)
    blocks = table + tl.load(slots + token).to(tl.int64) * table_stride
    end = tl.load(positions + token) + 1
    begin = 0
    if window > 0:
        begin = tl.maximum(end - window, 0)
    if chunk > 0:
        begin = tl.maximum(begin, (end - 1) // chunk * chunk)
    first_tile = begin // keys
    tiles = tl.cdiv(end, keys) - first_tile
    share = tl.cdiv(tiles, splits)
    if splits > 1:
        share = tl.where(tiles <= least, tiles, share)
        if split * share >= tiles:
            return
    start = (first_tile + split * share) * keys
    stop = tl.minimum(start + share * keys, end)
    if in_words:
        of_heads = None
        own = None
        if biases is not None:
            of_heads = biases + heads[:, None] * biases_stride
            own = tl.load(biases + heads * biases_stride + end - 1, mask=members < group, other=0.0)
        total, highest, weight = attend_to_words(
            query + token * query_token_stride + heads[:, None] * query_head_stride,
            kv, blocks, scales, factors, of_heads, own, members[:, None] < group,
            scale, head, start, stop, begin, end,
            block_tokens, kv_heads, key_dim, value_dim, key_tile, value_tile, group_rows, keys, softcap,
            is_int8, converts_fp8,
        )  # fmt: skip
    else:
        total, highest, weight = _attend(
            query + token * query_token_stride + heads[:, None] * query_head_stride,
            kv, blocks, scales, factors, biases, biases_stride, members, group, heads,
            scale, head, start, stop, begin, end,
            block_tokens, kv_heads, key_dim, value_dim, key_tile, value_tile, group_rows, keys, softcap,
            is_latent, converts_fp8,
        )  # fmt: skip

    found = total / tl.where(weight > 0, weight, 1.0)[:, None]
    row = token * (kv_heads * group) + heads
    held = (members[:, None] < group) & (value_columns[None, :] < value_dim)
    shares = tl.cdiv(tiles, share)
    if splits == 1 or shares == 1:
        if sinks is not None:
            sink = tl.load(sinks + heads, mask=members < group, other=0.0)
            found = found * (weight / with_sink(weight, highest, sink))[:, None]
        tl.store(out + row[:, None] * value_dim + value_columns[None, :], found.to(out.dtype.element_ty), mask=held)
    else:
        at = row * splits + split
        tl.store(parts + at[:, None] * value_dim + value_columns[None, :], found, mask=held)
        tl.store(levels + at, highest + tl.log2(weight), mask=members < group)
        tl.debug_barrier()  # all threads have written before one of them counts the program
        arrived = arrivals + token * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(arrived, 1, sem="acq_rel") == shares - 1:
            tl.store(arrived, 0)
            skipped = tl.program_id(1) % programs * group_rows
            first = (token * kv_heads + head) * group + skipped
            count = tl.minimum(group - skipped, group_rows)
            first_head = head * group + skipped
            _combine(
                out, parts, levels, sinks, first_head, first, count, shares, value_dim, splits, value_tile, heads_tile
            )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _attend(
    rows: tl.tensor,
    kv: tl.tensor,
    blocks: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    biases: tl.tensor,
    biases_stride: tl.tensor,
    members: tl.tensor,
    group: tl.constexpr,
    heads: tl.tensor,
    scale: tl.tensor,
    head: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    block_tokens: tl.constexpr,
    kv_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_tile: tl.constexpr,
    value_tile: tl.constexpr,
    group_rows: tl.constexpr,
    keys: tl.constexpr,
    softcap: tl.constexpr,
    is_latent: tl.constexpr,
    converts_fp8: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attend with the queries of a key head to some keys of a sequence; see `words.attend_to_words`."""
    key_columns = tl.arange(0, key_tile)
    value_columns = tl.arange(0, value_tile)
    asked = tl.load(
        rows + key_columns[None, :],
        mask=(members[:, None] < group) & (key_columns[None, :] < key_dim),
        other=0.0,
    )
    if scales is not None:
        factor = tl.load(factors + head * key_dim + key_columns, mask=key_columns < key_dim, other=1.0)
        asked, sizes = normalized(asked.to(tl.float32) * factor[None, :])
        scale = (sizes * scale)[:, None]
    else:
        asked = asked.to(kv.dtype.element_ty)
    asked_latent = asked
    if is_latent:
        asked_latent = load_latent_query(
            rows,
            members[:, None] < group,
            key_dim,
            value_dim,
            value_tile,
        ).to(kv.dtype.element_ty)

    highest = tl.full([group_rows], float("-inf"), tl.float32)
    weight = tl.zeros([group_rows], tl.float32)
    total = tl.zeros([group_rows, value_tile], tl.float32)
    if biases is not None:
        own = tl.load(biases + heads * biases_stride + end - 1, mask=members < group, other=0.0)
    for tile in range(start, stop, keys):
        seen = tile + tl.arange(0, keys)
        visible = (seen >= begin) & (seen < end)
        block = load_blocks(blocks, seen, visible, block_tokens)
        sources = kv + key_indices(block, seen, block_tokens, kv_heads, head) * (key_dim + value_dim)
        key = tl.load(
            sources[:, None] + key_columns[None, :],
            mask=visible[:, None] & (key_columns[None, :] < key_dim),
            other=0.0,
        )
        value = tl.load(
            sources[:, None] + key_dim + value_columns[None, :],
            mask=visible[:, None] & (value_columns[None, :] < value_dim),
            other=0.0,
        )
        pairs = scale_indices(block, seen, block_tokens, kv_heads, head)
        key, value = decoded(key, converts_fp8), decoded(value, converts_fp8)
        shown = visible[None, :]
        if is_latent:
            scores = latent_scores_of(asked, key, asked_latent, value, scale, softcap)
        elif scales is None:
            scores = scores_of(asked, key, None, scale, softcap)
        else:
            key_scales, value_scales = load_scales(scales, pairs, visible)
            scores = scores_of(asked, key, key_scales, scale, softcap)
        if biases is not None:
            added = tl.load(
                biases + heads[:, None] * biases_stride + seen[None, :],
                mask=(members[:, None] < group) & shown,
                other=0.0,
            )
            scores = biased(scores, added, own)
        scores = tl.where(shown, scores, float("-inf"))
        if scales is None:
            total, highest, weight = fold(total, highest, weight, scores, value, None)
        else:
            total, highest, weight = fold(total, highest, weight, scores, value, value_scales)
    return total, highest, weight


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _combine(
    out: tl.tensor,
    parts: tl.tensor,
    levels: tl.tensor,
    sinks: tl.tensor,
    first_head: tl.tensor,
    first: tl.tensor,
    heads: tl.tensor,
    shares: tl.tensor,
    value_dim: tl.constexpr,
    splits: tl.constexpr,
    value_tile: tl.constexpr,
    heads_tile: tl.constexpr,
) -> None:
    """Combine the shares of some heads of one token, weighted by their levels.

    Args:
        out: Results of shape `(tokens * heads, value_dim)`.
        parts: Values of the shares, of shape `(tokens * heads, splits, value_dim)`, float32.
        levels: Their binary logarithms, of shape `(tokens * heads, splits)`, float32; finite.
        sinks: Sinks of all heads, of shape `(heads of a token,)`; None for none.
        first_head: The first head.
        first: Its index, of `tokens * heads`.
        heads: Number of heads, at least 1.
        shares: How many of the `splits` are written.
        value_dim: Size of a value.
        splits: Allocated shares; a power of two.
        value_tile: `value_dim`, rounded up to a power of two.
        heads_tile: A power of two, at least `heads`.
    """
    members = tl.arange(0, heads_tile)
    held = members < heads
    columns = tl.arange(0, value_tile)
    rows = first + members
    every = tl.arange(0, splits)
    found = tl.load(levels + rows[:, None] * splits + every, mask=held[:, None] & (every < shares), other=float("-inf"))
    highest = tl.where(held, tl.max(found, 1), 0.0)
    weight = tl.where(held, tl.sum(tl.exp2(found - highest[:, None]), 1), 1.0)
    if sinks is not None:
        weight = with_sink(weight, highest, tl.load(sinks + first_head + members, mask=held, other=0.0))
    total = tl.zeros([heads_tile, value_tile], tl.float32)
    room: tl.constexpr = _COMBINED_AT_ONCE // (heads_tile * value_tile)
    at_once: tl.constexpr = (splits if splits < room else room) if room > 1 else 1
    for begin in range(0, shares, at_once):
        numbers = begin + tl.arange(0, at_once)
        indices = rows[:, None] * splits + numbers
        wanted = held[:, None] & (numbers < shares)
        level = tl.load(levels + indices, mask=wanted, other=float("-inf"))
        part = tl.load(
            parts + indices[:, :, None] * value_dim + columns,
            mask=wanted[:, :, None] & (columns < value_dim),
            other=0.0,
        )
        total += tl.sum(part * tl.exp2(level - highest[:, None])[:, :, None], 1)
    combined = (total / weight[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * value_dim + columns, combined, mask=held[:, None] & (columns < value_dim))
