"""Keys and values in the blocks of the KV cache: where they are, and writing them, in Triton."""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object, and its compiler
# resolves every annotation of a kernel's arguments, and refuses others than its own.

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.attention.eight_bits import pointers, store_rounded
from langchain_quantllm.kernels.kv_quantization import KVScales
from langchain_quantllm.kernels.launch import COMPILER_OPTIONS, dense_vectors, power_of_2


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    kv: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    scales: KVScales | None = None,
) -> None:
    """Write the keys and values of new tokens into their blocks; see `reference.write_kv`."""
    key, value = dense_vectors(key), dense_vectors(value)
    _, kv_heads, tokens, key_dim = key.shape
    value_dim = value.shape[3]
    key_tile, value_tile = power_of_2(key_dim, 16), power_of_2(value_dim, 16)
    _write_kernel[(tokens, kv_heads)](
        key,
        value,
        kv,
        table,
        slots,
        positions,
        *pointers(scales),
        key.stride(1),
        key.stride(2),
        value.stride(1),
        value.stride(2),
        table.stride(0),
        block_tokens=kv.shape[1],
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        key_tile=key_tile,
        value_tile=value_tile,
        num_warps=1,
        **COMPILER_OPTIONS,
    )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _write_kernel(
    key: tl.tensor,
    value: tl.tensor,
    kv: tl.tensor,
    table: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    key_head_stride: tl.tensor,
    key_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    value_token_stride: tl.tensor,
    table_stride: tl.tensor,
    block_tokens: tl.constexpr,
    kv_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_tile: tl.constexpr,
    value_tile: tl.constexpr,
) -> None:
    """Write one token of one head; grid `(tokens, kv_heads)`."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    blocks = table + tl.load(slots + token).to(tl.int64) * table_stride
    position = tl.load(positions + token)
    block = load_blocks(blocks, position, None, block_tokens)
    columns = tl.arange(0, key_tile)
    source = key + head * key_head_stride + token * key_token_stride
    numbers = tl.load(source + columns, mask=columns < key_dim, other=0.0)
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
def store_kv(
    kv: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    block: tl.tensor,
    position: tl.tensor,
    key: tl.tensor,
    source: tl.tensor,
    block_tokens: tl.constexpr,
    kv_heads: tl.constexpr,
    head: tl.tensor,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_tile: tl.constexpr,
    value_tile: tl.constexpr,
) -> None:
    """Store a key and its value; see `reference.write_kv`.

    Args:
        kv: Pointer to the pool.
        scales: Pointer to its pairs of scales, int32; None for a pool that has none.
        factors: Pointer to the factors of its keys; None likewise.
        block: The token's block.
        position: Its position in the sequence.
        key: The key, zeros behind its end.
        source: Pointer to the value.
        block_tokens: Tokens of a block.
        kv_heads: Key heads of the pool.
        head: The key head.
        key_dim: Size of a key.
        value_dim: Size of a value.
        key_tile: `key_dim`, rounded up to a power of two.
        value_tile: `value_dim`, rounded up to a power of two.
    """
    target = kv + key_indices(block, position, block_tokens, kv_heads, head) * (key_dim + value_dim)
    if scales is None:
        columns = tl.arange(0, key_tile)
        tl.store(target + columns, key, mask=columns < key_dim)
        store_value(target, source, key_dim, value_dim, key_tile, value_tile)
    else:
        columns = tl.arange(0, value_tile)
        value = tl.load(source + columns, mask=columns < value_dim, other=0.0)
        pair = scales + scale_indices(block, position, block_tokens, kv_heads, head)
        columns = tl.arange(0, key_tile)
        factor = tl.load(factors + head * key_dim + columns, mask=columns < key_dim, other=1.0)
        key = tl.div_rn(key.to(tl.float32), factor)
        store_rounded(target, pair, key, value, key_dim, value_dim, key_tile, value_tile)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def store_value(
    target: tl.tensor,
    source: tl.tensor,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_tile: tl.constexpr,
    value_tile: tl.constexpr,
) -> None:
    """Store a value behind its key; one that is not finite as zeros, with a key of NaN. See `reference.write_kv`.

    Args:
        target: Pointer to the key, which this program has stored.
        source: Pointer to the value.
        key_dim: Size of a key.
        value_dim: Size of a value.
        key_tile: `key_dim`, rounded up to a power of two.
        value_tile: `value_dim`, rounded up to a power of two.
    """
    columns = tl.arange(0, value_tile)
    numbers = tl.load(source + columns, mask=columns < value_dim, other=0.0).to(target.dtype.element_ty)
    is_finite = tl.min((tl.abs(numbers.to(tl.float32)) < float("inf")).to(tl.int32), 0)
    kept = tl.where(is_finite > 0, numbers, tl.zeros_like(numbers))
    tl.store(target + key_dim + columns, kept, mask=columns < value_dim)
    if is_finite == 0:
        tl.debug_barrier()  # all threads have stored the key
        # A name of its own: what a branch assigns keeps its shape.
        key_columns = tl.arange(0, key_tile)
        nothing = tl.full([key_tile], float("nan"), tl.float32).to(target.dtype.element_ty)
        tl.store(target + key_columns, nothing, mask=key_columns < key_dim)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def load_blocks(blocks: tl.tensor, positions: tl.tensor, wanted: tl.tensor, block_tokens: tl.constexpr) -> tl.tensor:
    """Load the blocks of positions in a sequence.

    Args:
        blocks: Pointer to the sequence's row of the block table.
        positions: Positions in the sequence.
        wanted: Mask of the positions to look up; None for all.
        block_tokens: Tokens of a block.

    Returns:
        Blocks in the shape of `positions`, int32; undefined where not wanted.
    """
    return tl.load(blocks + positions // block_tokens, mask=wanted)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def key_indices(
    block: tl.tensor, positions: tl.tensor, block_tokens: tl.constexpr, kv_heads: tl.constexpr, head: tl.tensor
) -> tl.tensor:
    """Compute the indices of a head's keys in the pool; 64 bits, as pools are large.

    Args:
        block: The block of each position.
        positions: Positions in the sequence.
        block_tokens: Tokens of a block.
        kv_heads: Key heads of the pool.
        head: The key head.

    Returns:
        Indices in the shape of `positions`, int64, in units of a key with its value.
    """
    return (block.to(tl.int64) * block_tokens + positions % block_tokens) * kv_heads + head


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def scale_indices(
    block: tl.tensor, positions: tl.tensor, block_tokens: tl.constexpr, kv_heads: tl.constexpr, head: tl.tensor
) -> tl.tensor:
    """Compute the indices of a head's pairs of scales, those of one block behind each other; see `key_indices`."""
    return (block.to(tl.int64) * kv_heads + head) * block_tokens + positions % block_tokens
