"""Rotary positions: their cosines and sines, and the rotation together with the writing of keys and values, in Triton.

The functions are documented in `reference`. Their launchers check nothing; see `norms`.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object, and its compiler
# resolves every annotation of a kernel's arguments, and refuses others than its own.

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.attention.blocks import load_blocks, store_kv
from langchain_quantllm.kernels.attention.eight_bits import pointers
from langchain_quantllm.kernels.kv_quantization import KVScales
from langchain_quantllm.kernels.launch import dense_vectors, launch_options, power_of_2, wait_for_inputs
from langchain_quantllm.kernels.reference import HALVES, HALVES_ONCE, PAIRS_OF_HALVES

_HALVES, _PAIRS_OF_HALVES = tl.constexpr(HALVES), tl.constexpr(PAIRS_OF_HALVES)
_HALVES_ONCE = tl.constexpr(HALVES_ONCE)


def cos_sin(
    positions: torch.Tensor, frequencies: torch.Tensor, scale: float, dtype: torch.dtype, *, twice: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the cosines and sines that rotate positions; see `reference.cos_sin`, with its `scale` compiled in."""
    tokens, half = positions.shape[1], len(frequencies)
    cos, sin = torch.empty(2, 1, tokens, (1 + twice) * half, dtype=dtype, device=positions.device)
    _cos_sin_kernel[(tokens,)](
        positions,
        frequencies,
        cos,
        sin,
        scale=scale,
        half=half,
        twice=twice,
        tile=power_of_2(half),
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
    slots: torch.Tensor,
    positions: torch.Tensor,
    *,
    layout: int = HALVES,
    rounds: bool = True,
    scales: KVScales | None = None,
) -> torch.Tensor:
    """Rotate queries and keys, and write keys and values into their blocks; see `reference.rotate_and_write`.

    `layout` and `rounds` are compiled in.

    Returns:
        The rotated queries, of shape `(1, heads, tokens, key_dim)`, as a view of `(1, tokens, heads, key_dim)`.
    """
    query, key, value, cos, sin = map(dense_vectors, (query, key, value, cos, sin))
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
        slots,
        positions,
        *pointers(scales),
        query.stride(1),
        query.stride(2),
        key.stride(1),
        key.stride(2),
        value.stride(1),
        value.stride(2),
        cos.stride(1),
        sin.stride(1),
        table.stride(0),
        block_tokens=kv.shape[1],
        heads=heads,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        rotary_dim=cos.shape[-1] * (2 if layout == HALVES_ONCE else 1),
        layout=layout,
        rounds=rounds,
        key_tile=power_of_2(key_dim),
        value_tile=power_of_2(value_dim),
        num_warps=1,
        # A fused multiply-add would omit the rounding of a product, which the compiler computes in 16 bits.
        **launch_options(query.device) | {"enable_fp_fusion": False},
    )
    return out.transpose(1, 2)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _cos_sin_kernel(
    positions: tl.tensor,
    frequencies: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    scale: tl.constexpr,
    half: tl.constexpr,
    twice: tl.constexpr,
    tile: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Compute the cosines and sines of one token; grid `(tokens,)`."""
    wait_for_inputs(early)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, tile)
    angles = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + columns, mask=columns < half, other=0.0)
    cosines = (tl.cos(angles) * scale).to(cos.dtype.element_ty)
    sines = (tl.sin(angles) * scale).to(sin.dtype.element_ty)
    places = token * (half + half * twice) + columns
    tl.store(cos + places, cosines, mask=columns < half)
    tl.store(sin + places, sines, mask=columns < half)
    if twice:
        tl.store(cos + places + half, cosines, mask=columns < half)
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
    slots: tl.tensor,
    positions: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    query_head_stride: tl.tensor,
    query_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    key_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_token_stride: tl.tensor,
    cos_stride: tl.tensor,
    sin_stride: tl.tensor,
    table_stride: tl.tensor,
    block_tokens: tl.constexpr,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    layout: tl.constexpr,
    rounds: tl.constexpr,
    key_tile: tl.constexpr,
    value_tile: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Rotate one head of one token, and write a key with its value; grid `(tokens, heads + kv_heads)`."""
    wait_for_inputs(early)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    cosines = cos + token * cos_stride
    sines = sin + token * sin_stride
    if head < heads:
        source = query + head * query_head_stride + token * query_token_stride
        rotated = _rotated(source, cosines, sines, key_dim, rotary_dim, layout, rounds, key_tile)
        columns = tl.arange(0, key_tile)
        tl.store(out + (token * heads + head) * key_dim + columns, rotated, mask=columns < key_dim)
    else:
        head -= heads
        position = tl.load(positions + token)
        blocks = table + tl.load(slots + token).to(tl.int64) * table_stride
        block = load_blocks(blocks, position, None, block_tokens)
        source = key + head * key_head_stride + token * key_token_stride
        numbers = _rotated(source, cosines, sines, key_dim, rotary_dim, layout, rounds, key_tile)
        source = value + head * value_head_stride + token * value_token_stride
        store_kv(
            kv,
            scales,
            factors,
            block,
            position,
            numbers,
            source,
            block_tokens,
            kv_heads,
            head,
            key_dim,
            value_dim,
            key_tile,
            value_tile,
        )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _rotated(
    source: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    key_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    layout: tl.constexpr,
    rounds: tl.constexpr,
    key_tile: tl.constexpr,
) -> tl.tensor:
    """Rotate one head; returns its numbers of shape `(key_tile,)`, zeros behind its end.

    Args:
        source: Pointer to its numbers.
        cos: Pointer to the cosines of its token.
        sin: Pointer to the sines of its token.
        key_dim: Numbers of a head.
        rotary_dim: Numbers that are rotated.
        layout: See `reference.HALVES`.
        rounds: Whether products are rounded before they are added.
        key_tile: `key_dim`, rounded up to a power of two.
    """
    columns = tl.arange(0, key_tile)
    rotates = columns < rotary_dim
    if layout == _HALVES or layout == _HALVES_ONCE:  # noqa: SIM109  (Triton knows no tuples of constants)
        half: tl.constexpr = rotary_dim // 2
        is_first = columns < half
        partners = tl.where(is_first, columns + half, columns - half)
        angles = columns
        if layout == _HALVES_ONCE:
            angles = columns % half
    else:
        is_first = columns % 2 == 0
        partners = tl.where(is_first, columns + 1, columns - 1)
        angles = columns
        if layout == _PAIRS_OF_HALVES:
            angles = columns // 2
    numbers = tl.load(source + columns, mask=columns < key_dim, other=0.0)
    x = numbers.to(tl.float32)
    partner = tl.load(source + partners, mask=rotates, other=0.0).to(tl.float32)
    first = x * tl.load(cos + angles, mask=rotates, other=0.0).to(tl.float32)
    second = tl.where(is_first, -partner, partner) * tl.load(sin + angles, mask=rotates, other=0.0).to(tl.float32)
    if rounds:
        first = first.to(numbers.dtype).to(tl.float32)
        second = second.to(numbers.dtype).to(tl.float32)
    return tl.where(rotates, (first + second).to(numbers.dtype), numbers)
