"""Attention that reads keys and values where they lie, in pages, and the writing of them, in Triton.

Owns the kernels and how they are launched: tile sizes, grids, the sharing of long rows. What the functions mean
is `reference`'s to say, which has them in plain torch. Knows tensors, pages and rows; no model and no engine.

The launchers are lean, as a small model's layer takes no longer than a launch: they check nothing, and the device of
the tensors must be the current one. Grids depend on shapes alone, and lengths are read on the device, so that a
CUDA graph of a call is good for other lengths too.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object. And its compiler
# looks every annotation of a kernel's arguments up, and refuses what is not its own.

from functools import cache

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import launch_options, wait_for_inputs
from langchain_quantllm.kernels.reference import PREFILL_TILE

__all__ = ["PREFILL_TILE", "arrivals", "decode_attention", "default_splits", "prefill_attention", "write_kv"]

_LOG2_E = tl.constexpr(1.4426950408889634)
_MOST_GROUP_ROWS = 64
"""Query heads of one program of decode; more than that of one key head are shared between programs."""
_ALONE_TILES = 2
"""Most tiles of keys of a row that no programs share: another would take longer to begin and to combine."""
_COMBINED_AT_ONCE = tl.constexpr(8192)
"""Numbers of the shares of a row that a program holds when it combines them."""


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Write the keys and values of new tokens into their pages: `reference.write_kv`.

    Args:
        key: Keys of shape `(1, kv_heads, tokens, key_dim)`, floating, with any strides.
        value: Values of shape `(1, kv_heads, tokens, value_dim)`, floating, with any strides.
        kv: The pool of one layer of shape `(pages, page_tokens, kv_heads, key_dim + value_dim)`, contiguous, in
            float16, bfloat16 or float32. Written to. `page_tokens` is a power of two.
        table: The pages of each row of shape `(slots, max_pages)`, int32, contiguous.
        rows: The row of `table` of each token, of shape `(tokens,)`, int32, contiguous.
        positions: The place of each token in its row, of shape `(tokens,)`, int32, contiguous.
    """
    key, value = _dense(key), _dense(value)
    _, kv_heads, tokens, key_dim = key.shape
    value_dim = value.shape[3]
    key_block, value_block = _padded(key_dim), _padded(value_dim)
    _write_kernel[(tokens, kv_heads)](
        key,
        value,
        kv,
        table,
        rows,
        positions,
        key.stride(1),
        key.stride(2),
        value.stride(1),
        value.stride(2),
        table.stride(0),
        page_tokens=kv.shape[1],
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        key_block=key_block,
        value_block=value_block,
        num_warps=1,
    )


def decode_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    value_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    splits: int = 1,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with one new token of each row to the row's pages: `reference.decode_attention`.

    Args:
        query: Queries of shape `(1, heads, tokens, key_dim)`, floating, with any strides.
        kv: The pool of one layer, as in `write_kv`.
        table: The pages of each row of shape `(slots, max_pages)`, int32, contiguous.
        rows: The row of `table` of each token, of shape `(tokens,)`, int32, contiguous.
        positions: The last position that each token sees, of shape `(tokens,)`, int32, contiguous.
        value_dim: Size of a value.
        scale: What scores are multiplied by.
        window: How many of the last positions a token sees; 0 for all. Compiled in.
        softcap: The cap of the scores; 0 for none. Compiled in.
        splits: How many programs share the keys of one row, at most: a power of two (see `default_splits`). The last of
            them to be done combines what all have found; a row of few keys is for one alone.
        arrivals: What `arrivals` gives; without it no row is shared. Holds zeros before and after, and belongs to one
            call at a time.

    Returns:
        The attended values of shape `(1, tokens, heads, value_dim)`, contiguous, in the dtype of `query`.

    Source:
        Sharing a row: Flash-Decoding, https://pytorch.org/blog/flash-decoding/.
    """
    query = _dense(query)
    _, heads, tokens, key_dim = query.shape
    _, page_tokens, kv_heads, _ = kv.shape
    group = heads // kv_heads
    group_rows = min(_padded(group), _MOST_GROUP_ROWS)
    if arrivals is None:
        arrivals, splits = positions, 1
    keys, warps, stages = _decode_tiles(key_dim, value_dim, kv.element_size())
    out = query.new_empty((1, tokens, heads, value_dim))
    # Where no row is shared, the kernel touches neither of these, nor the arrivals.
    parts = out if splits == 1 else kv.new_empty((tokens, heads, splits, value_dim), dtype=torch.float32)
    levels = out if splits == 1 else kv.new_empty((tokens, heads, splits), dtype=torch.float32)
    _decode_kernel[(tokens, kv_heads * -(-group // group_rows), splits)](
        query,
        kv,
        table,
        rows,
        positions,
        out,
        parts,
        levels,
        arrivals,
        scale,
        query.stride(1),
        query.stride(2),
        table.stride(0),
        page_tokens=page_tokens,
        kv_heads=kv_heads,
        group=group,
        key_dim=key_dim,
        value_dim=value_dim,
        window=window,
        softcap=softcap,
        splits=splits,
        key_block=_padded(key_dim),
        value_block=_padded(value_dim),
        group_rows=group_rows,
        heads_block=1 << (min(group, group_rows) - 1).bit_length(),
        keys=keys,
        least=_ALONE_TILES,
        num_warps=warps,
        num_stages=stages,
        **launch_options(kv.device),
    )
    return out


def arrivals(multiprocessors: int, device: torch.device) -> torch.Tensor:
    """Make what counts the programs of `decode_attention` that are done with a row.

    Args:
        multiprocessors: Multiprocessors of the device, as `default_splits` is told.
        device: Where the pools are.

    Returns:
        Zeros, int32, as many as a step has groups of heads that `default_splits` shares, where a group has no more than
        1,024 heads.
    """
    most_groups = 8 * multiprocessors // 3
    return torch.zeros(most_groups * (1024 // _MOST_GROUP_ROWS), dtype=torch.int32, device=device)


def prefill_attention(
    query: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    blocks: torch.Tensor,
    *,
    value_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attend with packed chunks of several prompts to the pages of their rows: `reference.prefill_attention`.

    Args:
        query: Queries of shape `(1, heads, tokens, key_dim)`, floating, with any strides.
        kv: The pool of one layer, as in `write_kv`; holds the keys and values of these tokens already.
        table: The pages of each row of shape `(slots, max_pages)`, int32, contiguous.
        blocks: Runs of tokens of shape `(n, 4)`, int32, contiguous: the row of `table`, the first token's index in the
            pack, its position, and the number of tokens, at most `PREFILL_TILE`; n is at most 65535.
        value_dim: Size of a value.
        scale: What scores are multiplied by.
        window: How many of the last positions a token sees; 0 for all. Compiled in.
        softcap: The cap of the scores; 0 for none. Compiled in.

    Returns:
        The attended values of shape `(1, tokens, heads, value_dim)`, contiguous, in the dtype of `query`; undefined
        for tokens that are in no block.

    Source:
        The softmax over tiles: FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithm 1.
    """
    query = _dense(query)
    _, heads, tokens, key_dim = query.shape
    _, page_tokens, kv_heads, _ = kv.shape
    queries, keys, warps, stages = _prefill_tiles(key_dim, value_dim, kv.element_size(), kv.device)
    out = query.new_empty((1, tokens, heads, value_dim))
    _prefill_kernel[(heads, blocks.shape[0], PREFILL_TILE // queries)](
        query,
        kv,
        table,
        blocks,
        out,
        scale,
        query.stride(1),
        query.stride(2),
        table.stride(0),
        page_tokens=page_tokens,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        window=window,
        softcap=softcap,
        key_block=_padded(key_dim),
        value_block=_padded(value_dim),
        queries=queries,
        keys=keys,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def default_splits(tokens: int, kv_heads: int, multiprocessors: int) -> int:
    """Choose how many programs of `decode_attention` share a row.

    Args:
        tokens: Rows of the step.
        kv_heads: Key heads of the layer.
        multiprocessors: Multiprocessors of the device.

    Returns:
        The power of two from 1 to 64 with which there are about four programs for each multiprocessor: between 8/3
        and 16/3, where the limits allow. On an H200, fewer are slower for long rows, up to twice; more are slower
        for short ones.
    """
    programs, splits = tokens * kv_heads, 1
    while splits < 64 and 3 * programs * splits <= 8 * multiprocessors:
        splits *= 2
    return splits


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor whose last dimension is strided: the kernels read whole vectors."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


@cache
def _padded(size: int) -> int:
    """Round up to a power of two that `tl.dot` takes."""
    return max(16, 1 << (size - 1).bit_length())


def _keys_within(tile_bytes: int, token_bytes: int, most: int) -> int:
    """Give the largest power of two of keys, from 16 to `most`, whose tile fits."""
    return min(most, max(16, 1 << (tile_bytes // token_bytes).bit_length() - 1))


@cache
def _decode_tiles(key_dim: int, value_dim: int, element_bytes: int) -> tuple[int, int, int]:
    """Choose keys per tile, warps and stages, for 99 KB of shared memory, which consumer cards have."""
    token_bytes = (_padded(key_dim) + _padded(value_dim)) * element_bytes
    if element_bytes == 4:
        # Without tensor cores the operands of a product lie in registers: small tiles, many warps.
        return _keys_within(32768, token_bytes, 32), 8, 2
    return _keys_within(32768, token_bytes, 64), 4, 2


@cache
def _prefill_tiles(key_dim: int, value_dim: int, element_bytes: int, device: torch.device) -> tuple[int, int, int, int]:
    """Choose queries and keys per tile, warps and stages, for 99 KB of shared memory or Hopper's 227."""
    token_bytes = (_padded(key_dim) + _padded(value_dim)) * element_bytes
    if element_bytes == 4:
        return PREFILL_TILE // 2, 16, 8, 2
    if token_bytes <= 512:
        return PREFILL_TILE, _keys_within(32768, token_bytes, 128), 4, 2
    # One warpgroup multiplies 64 rows on Hopper, and holds them; elsewhere, they are too many for 4 warps' registers.
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9:
        return PREFILL_TILE, _keys_within(65536, token_bytes, 64), 4, 2
    return PREFILL_TILE, _keys_within(32768, token_bytes, 64), 8, 2


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _write_kernel(
    key: tl.tensor,
    value: tl.tensor,
    kv: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    positions: tl.tensor,
    key_head_stride: tl.tensor,
    key_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_token_stride: tl.tensor,
    table_stride: tl.tensor,
    page_tokens: tl.constexpr,
    kv_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_block: tl.constexpr,
    value_block: tl.constexpr,
) -> None:
    """Write one token of one head; grid `(tokens, kv_heads)`."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    pages = table + tl.load(rows + token).to(tl.int64) * table_stride
    position = tl.load(positions + token)
    place = kv + _places(pages, position, None, page_tokens, kv_heads, head) * (key_dim + value_dim)
    columns = tl.arange(0, key_block)
    found = tl.load(key + head * key_head_stride + token * key_token_stride + columns, mask=columns < key_dim)
    tl.store(place + columns, found, mask=columns < key_dim)
    columns = tl.arange(0, value_block)
    found = tl.load(value + head * value_head_stride + token * value_token_stride + columns, mask=columns < value_dim)
    tl.store(place + key_dim + columns, found, mask=columns < value_dim)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _decode_kernel(
    query: tl.tensor,
    kv: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    positions: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    levels: tl.tensor,
    arrivals: tl.tensor,
    scale: tl.tensor,
    query_head_stride: tl.tensor,
    query_token_stride: tl.tensor,
    table_stride: tl.tensor,
    page_tokens: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    window: tl.constexpr,
    softcap: tl.constexpr,
    splits: tl.constexpr,
    key_block: tl.constexpr,
    value_block: tl.constexpr,
    group_rows: tl.constexpr,
    heads_block: tl.constexpr,
    keys: tl.constexpr,
    least: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Attend with the query heads of one key head to one share of a row; the last of the row to come combines them.

    Grid `(tokens, kv_heads * programs of a group, splits)`. Where a row has several shares, `parts` gets what each has
    found, `levels` the binary logarithm of the sum of its exponentials, and `arrivals` counts those that are written.
    """
    wait_for_inputs(early)
    token = tl.program_id(0).to(tl.int64)
    programs: tl.constexpr = (group + group_rows - 1) // group_rows
    head = tl.program_id(1) // programs
    split = tl.program_id(2)
    members = tl.program_id(1) % programs * group_rows + tl.arange(0, group_rows)
    heads = head * group + members
    key_columns = tl.arange(0, key_block)
    value_columns = tl.arange(0, value_block)
    pages = table + tl.load(rows + token).to(tl.int64) * table_stride
    end = tl.load(positions + token) + 1
    begin = 0
    if window > 0:
        begin = tl.maximum(end - window, 0)
    first_tile = begin // keys
    tiles = tl.cdiv(end, keys) - first_tile
    share = tl.cdiv(tiles, splits)
    if splits > 1:
        share = tl.where(tiles <= least, tiles, share)
        if split * share >= tiles:
            return
    start = (first_tile + split * share) * keys
    stop = tl.minimum(start + share * keys, end)
    asked = tl.load(
        query + token * query_token_stride + heads[:, None] * query_head_stride + key_columns[None, :],
        mask=(members[:, None] < group) & (key_columns[None, :] < key_dim),
        other=0.0,
    ).to(kv.dtype.element_ty)

    highest = tl.full([group_rows], float("-inf"), tl.float32)
    weight = tl.zeros([group_rows], tl.float32)
    total = tl.zeros([group_rows, value_block], tl.float32)
    for tile in range(start, stop, keys):
        seen = tile + tl.arange(0, keys)
        visible = (seen >= begin) & (seen < end)
        places = kv + _places(pages, seen, visible, page_tokens, kv_heads, head) * (key_dim + value_dim)
        key = tl.load(
            places[:, None] + key_columns[None, :],
            mask=visible[:, None] & (key_columns[None, :] < key_dim),
            other=0.0,
        )
        value = tl.load(
            places[:, None] + key_dim + value_columns[None, :],
            mask=visible[:, None] & (value_columns[None, :] < value_dim),
            other=0.0,
        )
        scores = tl.where(visible[None, :], _scores(asked, key, scale, softcap), float("-inf"))
        total, highest, weight = _fold(total, highest, weight, scores, value)

    found = total / tl.where(weight > 0, weight, 1.0)[:, None]
    row = token * (kv_heads * group) + heads
    held = (members[:, None] < group) & (value_columns[None, :] < value_dim)
    shares = tl.cdiv(tiles, share)
    if splits == 1 or shares == 1:
        tl.store(out + row[:, None] * value_dim + value_columns[None, :], found.to(out.dtype.element_ty), mask=held)
    else:
        at = row * splits + split
        tl.store(parts + at[:, None] * value_dim + value_columns[None, :], found, mask=held)
        tl.store(levels + at, highest + tl.log2(weight), mask=members < group)
        tl.debug_barrier()  # all threads have written before one of them says so
        arrived = arrivals + token * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(arrived, 1, sem="acq_rel") == shares - 1:
            tl.store(arrived, 0)
            skipped = tl.program_id(1) % programs * group_rows
            first = (token * kv_heads + head) * group + skipped
            count = tl.minimum(group - skipped, group_rows)
            _combine(out, parts, levels, first, count, shares, value_dim, splits, value_block, heads_block)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _combine(
    out: tl.tensor,
    parts: tl.tensor,
    levels: tl.tensor,
    first: tl.tensor,
    heads: tl.tensor,
    shares: tl.tensor,
    value_dim: tl.constexpr,
    splits: tl.constexpr,
    value_block: tl.constexpr,
    heads_block: tl.constexpr,
) -> None:
    """Weigh the shares of some heads of one token by their levels.

    Args:
        out: Results of shape `(tokens * heads, value_dim)`.
        parts: What the shares have found, of shape `(tokens * heads, splits, value_dim)`, float32.
        levels: Their binary logarithms of shape `(tokens * heads, splits)`, float32; finite.
        first: The first of the `tokens * heads`.
        heads: How many of them, 1 at least.
        shares: How many of the `splits` are written.
        value_dim: Size of a value.
        splits: Places for shares; a power of two.
        value_block: `value_dim`, rounded up to a power of two.
        heads_block: A power of two, not less than `heads`.
    """
    members = tl.arange(0, heads_block)
    held = members < heads
    columns = tl.arange(0, value_block)
    rows = first + members
    every = tl.arange(0, splits)
    found = tl.load(levels + rows[:, None] * splits + every, mask=held[:, None] & (every < shares), other=float("-inf"))
    highest = tl.where(held, tl.max(found, 1), 0.0)
    weight = tl.where(held, tl.sum(tl.exp2(found - highest[:, None]), 1), 1.0)
    total = tl.zeros([heads_block, value_block], tl.float32)
    room: tl.constexpr = _COMBINED_AT_ONCE // (heads_block * value_block)
    at_once: tl.constexpr = min(splits, max(1, room))
    for begin in range(0, shares, at_once):
        numbers = begin + tl.arange(0, at_once)
        places = rows[:, None] * splits + numbers
        wanted = held[:, None] & (numbers < shares)
        level = tl.load(levels + places, mask=wanted, other=float("-inf"))
        part = tl.load(
            parts + places[:, :, None] * value_dim + columns, mask=wanted[:, :, None] & (columns < value_dim), other=0.0
        )
        total += tl.sum(part * tl.exp2(level - highest[:, None])[:, :, None], 1)
    combined = (total / weight[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * value_dim + columns, combined, mask=held[:, None] & (columns < value_dim))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _prefill_kernel(
    query: tl.tensor,
    kv: tl.tensor,
    table: tl.tensor,
    blocks: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    query_head_stride: tl.tensor,
    query_token_stride: tl.tensor,
    table_stride: tl.tensor,
    page_tokens: tl.constexpr,
    kv_heads: tl.constexpr,
    group: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    window: tl.constexpr,
    softcap: tl.constexpr,
    key_block: tl.constexpr,
    value_block: tl.constexpr,
    queries: tl.constexpr,
    keys: tl.constexpr,
) -> None:
    """Attend with one head of one piece of a block; grid `(heads, blocks, pieces of a block)`.

    Heads come first, so that those of one key head run together and find its keys in the cache.
    """
    head = tl.program_id(0)
    # The last blocks of a chunk see the most keys: they start first, so that none of them is alone at the end.
    block = blocks + 4 * (tl.num_programs(1) - 1 - tl.program_id(1))
    skipped = tl.program_id(2) * queries
    count = tl.load(block + 3) - skipped
    if count <= 0:
        return
    pages = table + tl.load(block).to(tl.int64) * table_stride
    first = tl.load(block + 1).to(tl.int64) + skipped
    position = tl.load(block + 2) + skipped
    end = position + tl.minimum(count, queries)
    members = tl.arange(0, queries)
    key_columns = tl.arange(0, key_block)
    value_columns = tl.arange(0, value_block)
    asked = tl.load(
        query
        + tl.cast(head, tl.int64) * query_head_stride
        + (first + members)[:, None] * query_token_stride
        + key_columns[None, :],
        mask=(members[:, None] < count) & (key_columns[None, :] < key_dim),
        other=0.0,
    ).to(kv.dtype.element_ty)
    key_places = kv + key_columns[None, :]
    value_places = kv + key_dim + value_columns[None, :]
    highest = tl.full([queries], float("-inf"), tl.float32)
    weight = tl.zeros([queries], tl.float32)
    total = tl.zeros([queries, value_block], tl.float32)

    start = 0
    begin = 0
    if window > 0:
        begin = tl.maximum(position - window + 1, 0)
        start = begin // keys * keys
    else:
        # Whole tiles that every query sees need no mask.
        start = (position + 1) // keys * keys
        for tile in range(0, start, keys):
            seen = tile + tl.arange(0, keys)
            places = _places(pages, seen, None, page_tokens, kv_heads, head // group) * (key_dim + value_dim)
            key = tl.load(key_places + places[:, None], mask=key_columns[None, :] < key_dim, other=0.0)
            value = tl.load(value_places + places[:, None], mask=value_columns[None, :] < value_dim, other=0.0)
            scores = _scores(asked, key, scale, softcap)
            total, highest, weight = _fold(total, highest, weight, scores, value)
    for tile in range(start, end, keys):
        seen = tile + tl.arange(0, keys)
        written = (seen >= begin) & (seen < end)
        places = _places(pages, seen, written, page_tokens, kv_heads, head // group) * (key_dim + value_dim)
        key = tl.load(key_places + places[:, None], mask=written[:, None] & (key_columns[None, :] < key_dim), other=0.0)
        value = tl.load(
            value_places + places[:, None], mask=written[:, None] & (value_columns[None, :] < value_dim), other=0.0
        )
        ages = (position + members)[:, None] - seen[None, :]
        visible = ages >= 0
        if window > 0:
            visible = visible & (ages < window)
        scores = tl.where(visible, _scores(asked, key, scale, softcap), float("-inf"))
        total, highest, weight = _fold(total, highest, weight, scores, value)

    # Only rows behind the block's last token can have seen nothing; they are not stored.
    found = total / tl.where(weight > 0, weight, 1.0)[:, None]
    heads = tl.num_programs(0)
    tl.store(
        out + ((first + members) * heads + head)[:, None] * value_dim + value_columns[None, :],
        found.to(out.dtype.element_ty),
        mask=(members[:, None] < count) & (value_columns[None, :] < value_dim),
    )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _places(
    pages: tl.tensor,
    positions: tl.tensor,
    wanted: tl.tensor,
    page_tokens: tl.constexpr,
    kv_heads: tl.constexpr,
    head: tl.tensor,
) -> tl.tensor:
    """Find the indices of a head's keys among all of the pool; 64 bits, as pools are large.

    Args:
        pages: Where the row of the table begins.
        positions: Places in the row.
        wanted: Where to read the table; None for everywhere.
        page_tokens: Tokens of a page.
        kv_heads: Key heads of the pool.
        head: The key head.

    Returns:
        Indices in the shape of `positions`, int64, counted in keys with their values.
    """
    # Where it is not wanted the page is undefined; what is read with it has the same mask.
    page = tl.load(pages + positions // page_tokens, mask=wanted).to(tl.int64)
    return (page * page_tokens + positions % page_tokens) * kv_heads + head


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _scores(query: tl.tensor, key: tl.tensor, scale: tl.tensor, softcap: tl.constexpr) -> tl.tensor:
    """Compute scores to the base of 2, for `exp2` is what the device has.

    Args:
        query: Queries of shape `(queries, key_block)`.
        key: Keys of shape `(keys, key_block)`.
        scale: What scores are multiplied by.
        softcap: The cap of the scores; 0 for none.

    Returns:
        Scores of shape `(queries, keys)`, float32.
    """
    scores = _dot(query, tl.trans(key), None)
    if softcap > 0:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which has no overflow: its exponential may be 0 or inf.
        doubled = tl.exp2(scores * (scale * (2 * _LOG2_E / softcap)))
        scores = (1 - 2 / (doubled + 1)) * (softcap * _LOG2_E)
    else:
        scores = scores * (scale * _LOG2_E)
    return scores


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _fold(
    total: tl.tensor, highest: tl.tensor, weight: tl.tensor, scores: tl.tensor, value: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Fold a tile into the softmax so far.

    Args:
        total: Weighted values so far, relative to `highest`, of shape `(queries, value_block)`, float32.
        highest: The highest score so far of shape `(queries,)`, float32; -inf where nothing was seen.
        weight: The sum of the exponentials so far, relative to `highest`, of shape `(queries,)`, float32.
        scores: Scores to the base of 2 of shape `(queries, keys)`, float32; -inf where not visible.
        value: Values of shape `(keys, value_block)`, finite where not visible too.

    Returns:
        `total`, `highest` and `weight` with the tile.

    Source:
        FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithm 1, lines 8 to 10.
    """
    peak = tl.maximum(highest, tl.max(scores, 1))
    # A query that has seen nothing yet, because of a window: -inf - -inf would be NaN.
    level = tl.where(peak == float("-inf"), 0.0, peak)
    shares = tl.exp2(scores - level[:, None])
    decay = tl.exp2(highest - level)
    weight = weight * decay + tl.sum(shares, 1)
    total = _dot(shares.to(value.dtype), value, total * decay[:, None])
    return total, peak, weight


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _dot(left: tl.tensor, right: tl.tensor, added: tl.tensor) -> tl.tensor:
    """Multiply in the dtype of both, float32 without shortcuts, and add to `added` in float32."""
    if _INTERPRETED:
        # The interpreter has bfloat16 as integers and multiplies these. Products of two are exact in float32.
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, added, input_precision="ieee")


_INTERPRETED = tl.constexpr(not isinstance(_dot, triton.JITFunction))
