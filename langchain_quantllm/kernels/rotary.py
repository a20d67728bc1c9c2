"""Rotary positions: their cosines and sines, and rotating by them with the writing of keys and values, in Triton.

Owns the kernels and how they are launched. What they mean is `reference`'s to say. Knows tensors, pages and rows;
no model and no engine. They are as lean as the others of `fused`.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object. And its compiler
# looks every annotation of a kernel's arguments up, and refuses what is not its own.

from functools import cache

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import launch_options, wait_for_inputs
from langchain_quantllm.kernels.reference import HALVES, PAIRS_OF_HALVES

_HALVES, _PAIRS_OF_HALVES = tl.constexpr(HALVES), tl.constexpr(PAIRS_OF_HALVES)


def angles(
    positions: torch.Tensor, frequencies: torch.Tensor, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the cosines and sines by which positions are rotated: `reference.angles`.

    Args:
        positions: Of shape `(1, tokens)`, int64, contiguous.
        frequencies: Of shape `(rotary_dim / 2,)`, float32, contiguous.
        scale: What cosines and sines are multiplied by. Compiled in.
        dtype: What they are rounded to.

    Returns:
        Cosines and sines of shape `(1, tokens, rotary_dim)`, contiguous.
    """
    tokens, half = positions.shape[1], len(frequencies)
    cos, sin = torch.empty(2, 1, tokens, 2 * half, dtype=dtype, device=positions.device)
    _angles_kernel[(tokens,)](
        positions,
        frequencies,
        cos,
        sin,
        scale=scale,
        half=half,
        block=_padded(half),
        num_warps=1,
        **launch_options(positions.device),
    )
    return cos, sin


def rotate_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    *,
    layout: int = HALVES,
    rounds: bool = True,
) -> torch.Tensor:
    """Rotate queries and keys, and write keys and values into their pages: `reference.rotate_and_write`.

    Args:
        query: Queries of shape `(1, heads, tokens, key_dim)`, floating, with any strides.
        key: Keys of shape `(1, kv_heads, tokens, key_dim)` in the dtype of `query`, with any strides.
        value: Values of shape `(1, kv_heads, tokens, value_dim)` in the dtype of `query`, with any strides.
        cos: Cosines of shape `(1, tokens, rotary_dim)`, floating.
        sin: Sines in the shape and dtype of `cos`.
        kv: The pool of one layer, as in `attention.write_kv`. Written to.
        table: The pages of each row, as in `attention.write_kv`.
        rows: The row of each token, as in `attention.write_kv`.
        positions: The place of each token in its row, as in `attention.write_kv`.
        layout: `HALVES`, `PAIRS` or `PAIRS_OF_HALVES`. Compiled in.
        rounds: Whether both products of a rotation are rounded before they are added. Compiled in.

    Returns:
        The rotated queries, of shape `(1, heads, tokens, key_dim)`, as a view of `(1, tokens, heads, key_dim)`.
    """
    query, key, value, cos, sin = _dense(query), _dense(key), _dense(value), _dense(cos), _dense(sin)
    _, heads, tokens, key_dim = query.shape
    kv_heads, value_dim = value.shape[1], value.shape[3]
    out = query.new_empty((1, tokens, heads, key_dim))
    _rotate_kernel[(tokens, heads + kv_heads)](
        query,
        key,
        value,
        cos,
        sin,
        out,
        kv,
        table,
        rows,
        positions,
        query.stride(1),
        query.stride(2),
        key.stride(1),
        key.stride(2),
        value.stride(1),
        value.stride(2),
        cos.stride(1),
        sin.stride(1),
        table.stride(0),
        page_tokens=kv.shape[1],
        heads=heads,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        rotary_dim=cos.shape[-1],
        layout=layout,
        rounds=rounds,
        key_block=_padded(key_dim),
        value_block=_padded(value_dim),
        num_warps=1,
        # The compiler makes a rounded product one in 16 bits, which contracted with the sum would not be rounded.
        enable_fp_fusion=False,
        **launch_options(query.device),
    )
    return out.transpose(1, 2)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Copy a tensor whose last dimension is strided: the kernels read whole vectors."""
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _padded(size: int) -> int:
    """Round up to a power of two, as blocks are."""
    return 1 << (size - 1).bit_length()


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _angles_kernel(
    positions: tl.tensor,
    frequencies: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    scale: tl.constexpr,
    half: tl.constexpr,
    block: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Give the cosines and sines of one token; grid `(tokens,)`."""
    wait_for_inputs(early)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    turned = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + columns, mask=columns < half, other=0.0)
    cosines = (tl.cos(turned) * scale).to(cos.dtype.element_ty)
    sines = (tl.sin(turned) * scale).to(sin.dtype.element_ty)
    places = token * (2 * half) + columns
    tl.store(cos + places, cosines, mask=columns < half)
    tl.store(cos + places + half, cosines, mask=columns < half)
    tl.store(sin + places, sines, mask=columns < half)
    tl.store(sin + places + half, sines, mask=columns < half)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _rotate_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out: tl.tensor,
    kv: tl.tensor,
    table: tl.tensor,
    rows: tl.tensor,
    positions: tl.tensor,
    query_head_stride: tl.tensor,
    query_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_token_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    table_stride: tl.tensor,
    page_tokens: tl.constexpr,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    layout: tl.constexpr,
    rounds: tl.constexpr,
    key_block: tl.constexpr,
    value_block: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Rotate one head of one token, a key into its page with its value; grid `(tokens, heads + kv_heads)`."""
    wait_for_inputs(early)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    cosines = cos + token * cos_stride
    sines = sin + token * sin_stride
    if head < heads:
        source = query + head * query_head_stride + token * query_token_stride
        target = out + (token * heads + head) * key_dim
        _rotate(source, target, cosines, sines, key_dim, rotary_dim, layout, rounds, key_block)
    else:
        head -= heads
        position = tl.load(positions + token)
        slot = tl.load(rows + token).to(tl.int64)
        page = tl.load(table + slot * table_stride + position // page_tokens).to(tl.int64)
        place = (page * page_tokens + position % page_tokens) * kv_heads + head
        target = kv + place * (key_dim + value_dim)
        source = key + head * key_head_stride + token * key_token_stride
        _rotate(source, target, cosines, sines, key_dim, rotary_dim, layout, rounds, key_block)
        columns = tl.arange(0, value_block)
        source = value + head * value_head_stride + token * value_token_stride
        found = tl.load(source + columns, mask=columns < value_dim)
        tl.store(target + key_dim + columns, found, mask=columns < value_dim)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _rotate(
    source: tl.tensor,
    target: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    key_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    layout: tl.constexpr,
    rounds: tl.constexpr,
    key_block: tl.constexpr,
) -> None:
    """Rotate one head.

    Args:
        source: Where its numbers begin.
        target: Where they go.
        cos: The cosines of its token.
        sin: The sines of its token.
        key_dim: Numbers of a head.
        rotary_dim: How many of them are rotated.
        layout: Which with which.
        rounds: Whether products are rounded before they are added.
        key_block: `key_dim`, rounded up to a power of two.
    """
    columns = tl.arange(0, key_block)
    turns = columns < rotary_dim
    if layout == _HALVES:
        half: tl.constexpr = rotary_dim // 2
        is_first = columns < half
        others = tl.where(is_first, columns + half, columns - half)
        angles = columns
    else:
        is_first = columns % 2 == 0
        others = tl.where(is_first, columns + 1, columns - 1)
        angles = columns
        if layout == _PAIRS_OF_HALVES:
            angles = columns // 2
    kept = tl.load(source + columns, mask=columns < key_dim)
    x = kept.to(tl.float32)
    other = tl.load(source + others, mask=turns, other=0.0).to(tl.float32)
    first = x * tl.load(cos + angles, mask=turns, other=0.0).to(tl.float32)
    second = tl.where(is_first, -other, other) * tl.load(sin + angles, mask=turns, other=0.0).to(tl.float32)
    if rounds:
        first = first.to(kept.dtype).to(tl.float32)
        second = second.to(kept.dtype).to(tl.float32)
    found = tl.where(turns, (first + second).to(kept.dtype), kept)
    tl.store(target + columns, found, mask=columns < key_dim)
