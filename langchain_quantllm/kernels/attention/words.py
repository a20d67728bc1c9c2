"""Decode attention to keys and values in 8 bits, which are read as words of four codes.

Code `j` of all words is multiplied by every fourth number of the queries, and makes every fourth number of the result:
so no code moves between threads, and none is loaded as a single byte.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object, and its compiler
# resolves every annotation of a kernel's arguments, and refuses others than its own.

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.attention.blocks import key_indices, load_blocks, scale_indices
from langchain_quantllm.kernels.attention.eight_bits import load_scales
from langchain_quantllm.kernels.attention.softmax import biased, next_shares, scaled_scores
from langchain_quantllm.kernels.launch import INTERPRETED, dot

_INT8_PTX = tl.constexpr(
    # 1024 + code + 128 has the code's byte, with its sign bit flipped, as its lowest one.
    """{
    .reg .b32 a, b, c, t;
    xor.b32 a, $4, 0x80808080;
    xor.b32 b, $5, 0x80808080;
    mov.b32 c, 0x64806480;
    prmt.b32 t, a, b, 0x5140;
    prmt.b32 $0, t, 0x64646464, 0x4140;
    prmt.b32 $1, t, 0x64646464, 0x4342;
    prmt.b32 t, a, b, 0x7362;
    prmt.b32 $2, t, 0x64646464, 0x4140;
    prmt.b32 $3, t, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, c;
    sub.f16x2 $1, $1, c;
    sub.f16x2 $2, $2, c;
    sub.f16x2 $3, $3, c;
    }"""
)
_FP8_PTX = tl.constexpr(
    """{
    .reg .b16 a, b;
    .reg .b32 t, u;
    prmt.b32 t, $4, $5, 0x5140;
    prmt.b32 u, $4, $5, 0x7362;
    mov.b32 {a, b}, t;
    cvt.rn.f16x2.e4m3x2 $0, a;
    cvt.rn.f16x2.e4m3x2 $1, b;
    mov.b32 {a, b}, u;
    cvt.rn.f16x2.e4m3x2 $2, a;
    cvt.rn.f16x2.e4m3x2 $3, b;
    }"""
)
_OLD_FP8_PTX = tl.constexpr(
    # Sign, exponent and mantissa at their places in float16, whose exponent has a bias of 8 more.
    "{\n.reg .b32 t, m, c;\nmov.b32 c, 0x5c005c00;\n"
    + "".join(
        f"""prmt.b32 t, $4, $5, {code | (4 + code) << 4:#x};
    prmt.b32 t, t, 0, 0x1404;
    and.b32 m, t, 0x7f007f00;
    shr.u32 m, m, 1;
    lop3.b32 m, t, 0x80008000, m, 0xea;
    mul.f16x2 ${code}, m, c;
    """
        for code in range(4)
    )
    + "}"
)
_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r")


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def codes_of(words: tl.tensor, is_int8: tl.constexpr, converts: tl.constexpr) -> tl.tensor:
    """Decode the four codes of each word: four tensors in the shape of `words`, float16.

    Args:
        words: Words of four codes, int32; each thread has an even number of them side by side.
        is_int8: Whether the codes are int8; else fp8.
        converts: Whether the device has an instruction for fp8.
    """
    if INTERPRETED:
        return (
            _code_of(words, 24, is_int8),
            _code_of(words, 16, is_int8),
            _code_of(words, 8, is_int8),
            _code_of(words, 0, is_int8),
        )
    else:  # noqa: RET505  # both branches are not compiled only as an else
        return tl.inline_asm_elementwise(
            _INT8_PTX if is_int8 else _FP8_PTX if converts else _OLD_FP8_PTX,
            _CONSTRAINTS,
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _code_of(words: tl.tensor, shift: tl.constexpr, is_int8: tl.constexpr) -> tl.tensor:
    code = (words << shift) >> 24  # with its sign
    if is_int8:
        return code.to(tl.float16)
    else:  # noqa: RET505  # both branches are not compiled only as an else
        halves = (((code & 128) << 8) | ((code & 127) << 7)).to(tl.int16)
        return halves.to(tl.float16, bitcast=True) * 256


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def normalized_fourths(
    rows: tl.tensor, factors: tl.tensor, wanted: tl.tensor, dim: tl.constexpr, tile: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Load every fourth number of queries, times the factors of the keys, divided by the largest one of a query.

    Args:
        rows: Pointers to the queries, of shape `(queries, 1)`.
        factors: Pointer to the factors of the key head.
        wanted: Mask of the queries, of shape `(queries, 1)`.
        dim: Size of a key, a multiple of 4.
        tile: `dim`, rounded up to a power of two.

    Returns:
        Four tensors of shape `(queries, tile / 4)`, float16, and the divisors of shape `(queries,)`, float32.
    """
    first = _fourth(rows, factors, wanted, 0, dim, tile)
    second = _fourth(rows, factors, wanted, 1, dim, tile)
    third = _fourth(rows, factors, wanted, 2, dim, tile)
    fourth = _fourth(rows, factors, wanted, 3, dim, tile)
    sizes = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
    sizes = tl.maximum(sizes, tl.maximum(tl.max(tl.abs(third), 1), tl.max(tl.abs(fourth), 1)))
    sizes = tl.where(sizes > 0, sizes, 1.0)
    return (
        (first / sizes[:, None]).to(tl.float16),
        (second / sizes[:, None]).to(tl.float16),
        (third / sizes[:, None]).to(tl.float16),
        (fourth / sizes[:, None]).to(tl.float16),
        sizes,
    )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _fourth(
    rows: tl.tensor,
    factors: tl.tensor,
    wanted: tl.tensor,
    place: tl.constexpr,
    dim: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    columns = 4 * tl.arange(0, tile // 4) + place
    numbers = tl.load(rows + columns[None, :], mask=wanted & (columns[None, :] < dim), other=0.0)
    return numbers.to(tl.float32) * tl.load(factors + columns, mask=columns < dim, other=1.0)[None, :]


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def attend_to_words(
    rows: tl.tensor,
    words: tl.tensor,
    blocks: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    biases: tl.tensor,
    own: tl.tensor,
    held: tl.tensor,
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
    is_int8: tl.constexpr,
    converts: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attend with the queries of a key head to some keys of a sequence.

    Args:
        rows: Pointers to the queries, of shape `(queries, 1)`.
        words: Pointer to the pool, int32.
        blocks: Pointer to the sequence's row of the block table.
        scales: Pointer to the pairs of scales, int32.
        factors: Pointer to the factors of all keys.
        biases: Pointers to the biases of the queries' heads, of shape `(queries, 1)`; None for none.
        own: Biases of the queries' own position; undefined without `biases`.
        held: Mask of the queries, of shape `(queries, 1)`.
        scale: Factor of the scores.
        head: The key head.
        start: The first key, at the begin of a tile.
        stop: The end of the keys.
        begin: The first key that is visible.
        end: The end of the visible keys.
        block_tokens: Tokens of a block.
        kv_heads: Key heads of the pool.
        key_dim: Size of a key, a multiple of 4.
        value_dim: Size of a value, a multiple of 4.
        key_tile: `key_dim`, rounded up to a power of two, at least 64.
        value_tile: `value_dim`, rounded up to a power of two, at least 32.
        group_rows: Queries.
        keys: Keys of a tile.
        softcap: The cap of the scores; 0 for none.
        is_int8: Whether the codes are int8; else fp8.
        converts: Whether the device has an instruction for fp8.

    Returns:
        `total`, `highest` and `weight`; see `softmax.fold`.
    """
    a, b, c, d, sizes = normalized_fourths(rows, factors + head * key_dim, held, key_dim, key_tile)
    row_scale = (sizes * scale)[:, None]
    key_columns = tl.arange(0, key_tile // 4)
    value_columns = tl.arange(0, value_tile // 4)
    row: tl.constexpr = (key_dim + value_dim) // 4
    highest = tl.full([group_rows], float("-inf"), tl.float32)
    weight = tl.zeros([group_rows], tl.float32)
    total_a = tl.zeros([group_rows, value_tile // 4], tl.float32)
    total_b = tl.zeros([group_rows, value_tile // 4], tl.float32)
    total_c = tl.zeros([group_rows, value_tile // 4], tl.float32)
    total_d = tl.zeros([group_rows, value_tile // 4], tl.float32)
    for tile in range(start, stop, keys):
        seen = tile + tl.arange(0, keys)
        visible = (seen >= begin) & (seen < end)
        block = load_blocks(blocks, seen, visible, block_tokens)
        sources = words + key_indices(block, seen, block_tokens, kv_heads, head) * row
        key = tl.load(
            sources[:, None] + key_columns[None, :],
            mask=visible[:, None] & (key_columns[None, :] < key_dim // 4),
            other=0,
        )
        value = tl.load(
            sources[:, None] + key_dim // 4 + value_columns[None, :],
            mask=visible[:, None] & (value_columns[None, :] < value_dim // 4),
            other=0,
        )
        pairs = scale_indices(block, seen, block_tokens, kv_heads, head)
        key_scales, value_scales = load_scales(scales, pairs, visible)
        key_a, key_b, key_c, key_d = codes_of(key, is_int8, converts)
        products = dot(a, tl.trans(key_a), None)
        products = dot(b, tl.trans(key_b), products)
        products = dot(c, tl.trans(key_c), products)
        products = dot(d, tl.trans(key_d), products)
        scores = scaled_scores(products * key_scales[None, :], row_scale, softcap)
        shown = visible[None, :]
        if biases is not None:
            scores = biased(scores, tl.load(biases + seen[None, :], mask=held & shown, other=0.0), own)
        scores = tl.where(shown, scores, float("-inf"))
        shares, decay, highest, weight = next_shares(highest, weight, scores, value_scales)
        shares = shares.to(tl.float16)
        value_a, value_b, value_c, value_d = codes_of(value, is_int8, converts)
        total_a = dot(shares, value_a, total_a * decay[:, None])
        total_b = dot(shares, value_b, total_b * decay[:, None])
        total_c = dot(shares, value_c, total_c * decay[:, None])
        total_d = dot(shares, value_d, total_d * decay[:, None])
    total = tl.join(tl.join(total_a, total_c), tl.join(total_b, total_d))
    return tl.reshape(total, (group_rows, value_tile)), highest, weight
