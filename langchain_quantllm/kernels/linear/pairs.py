"""Decoding quantized words in pairs of values, and activations in the order of the pairs, for products of many rows.

A word of `per_word` codes is `per_word / 2` pairs of 16-bit values, each of which fills a register as tensor cores take
it. Pair `p` is of the codes `2p` and `2p + 1` in 4 bits of bitsandbytes, whose halves of a byte are looked up together,
and of `p` and `p + per_word / 2` in integers, which one mask takes out of a word. `interleave` brings activations into
the same order once, so that no program rearranges them.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import INTERPRETED, launch_options, let_next_begin, wait_for_inputs
from langchain_quantllm.kernels.linear.codebook import PAIR_CONSTRAINTS
from langchain_quantllm.kernels.linear.decoding import centered, lookup_in_memory, scaled, strided

_CONSTRAINTS = tl.constexpr(PAIR_CONSTRAINTS)
SIGNS = tl.constexpr(-2139062144)
"""0x80808080: turns four signed codes of 8 bits into unsigned ones, with 128 for zero, and back."""

_ROWS, _WORDS = 4, 128
"""Rows and words that one program rearranges."""


def interleave(
    x: torch.Tensor, *, per_word: int, neighbours: bool, padded_rows: int, padded_words: int
) -> torch.Tensor:
    """Bring activations into the order of pairs.

    Args:
        x: Activations of shape `(rows, in_features)`, whose rows are contiguous.
        per_word: Codes of a word.
        neighbours: Whether a pair is of the codes `2p` and `2p + 1`; otherwise of `p` and `p + per_word / 2`.
        padded_rows: Rows of the result; those that `x` does not have are not written.
        padded_words: Words of the result; those that `x` does not have are zeros.

    Returns:
        Of shape `(per_word / 2, padded_rows, padded_words, 2)`: for each pair, the two inputs of every word.
    """
    rows, inputs = x.shape
    out = x.new_empty(per_word // 2, padded_rows, padded_words, 2)
    _interleave_kernel[(-(-padded_words // _WORDS), -(-rows // _ROWS))](
        x, out, rows, inputs, x.stride(0), padded_words, out.stride(0),
        per_word=per_word, neighbours=neighbours, tile_rows=_ROWS, words=_WORDS, num_warps=4,
        **launch_options(x.device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])  # type: ignore[misc,untyped-decorator,unused-ignore]
def _interleave_kernel(
    x: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    inputs: tl.tensor,
    row_stride: tl.tensor,
    padded_words: tl.tensor,
    plane: tl.tensor,
    per_word: tl.constexpr,
    neighbours: tl.constexpr,
    tile_rows: tl.constexpr,
    words: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Rearrange a tile of activations; grid `(tiles of words, tiles of rows)`."""
    row = tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)
    first = tl.program_id(0) * words
    element = first * per_word + tl.arange(0, words * per_word)
    half: tl.constexpr = per_word // 2
    wait_for_inputs(early)
    let_next_begin(early)
    inside = (row < rows)[:, None] & (element < inputs)[None, :]
    tile = tl.load(x + row.to(tl.int64)[:, None] * row_stride + element[None, :], mask=inside, other=0.0)
    codes = strided(tile, tile_rows, words, per_word)
    place = 2 * first + tl.arange(0, 2 * words)
    at = out + row[:, None] * (2 * padded_words) + place[None, :]
    kept = (row < rows)[:, None] & (place < 2 * padded_words)[None, :]
    for p in tl.static_range(half):
        if neighbours:  # noqa: SIM108  # the other branch is not compiled
            pair = tl.join(codes[2 * p], codes[2 * p + 1])
        else:
            pair = tl.join(codes[p], codes[p + half])
        tl.store(at + p * plane, tl.reshape(pair, [tile_rows, 2 * words]), mask=kept)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def looked_up_pairs(
    words_read: tl.tensor, scale: tl.tensor, code: tl.tensor, dtype: tl.constexpr, ptx: tl.constexpr
) -> tl.tensor:
    """Look up the 8 indices of each word, and scale them: 4 tensors of pairs of shape `(outputs, words, 2)`.

    Args:
        words_read: Words of shape `(outputs, words)`, int32.
        scale: Their scales, of the same shape, float32.
        code: Pointer to the 16 values, float32.
        dtype: float16 or bfloat16.
        ptx: The instructions of `pair_ptx`; empty to look up in memory.
    """
    if INTERPRETED or ptx == "":
        values = lookup_in_memory(words_read, code, dtype)
        each = scale[:, :, None]
        return (
            scaled(tl.join(values[0], values[1]), each, dtype),
            scaled(tl.join(values[2], values[3]), each, dtype),
            scaled(tl.join(values[4], values[5]), each, dtype),
            scaled(tl.join(values[6], values[7]), each, dtype),
        )
    else:  # noqa: RET505  # both branches are not compiled only as an else
        a, b, c, d = tl.inline_asm_elementwise(
            ptx, _CONSTRAINTS, [words_read, scale], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
        return _both(a, dtype), _both(b, dtype), _both(c, dtype), _both(d, dtype)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def raw_pairs(
    words_read: tl.tensor, bits: tl.constexpr, signed: tl.constexpr, dtype: tl.constexpr, ptx: tl.constexpr
) -> tl.tensor:
    """Read the codes of each word as pairs, from which `pair_of_codes` makes numbers.

    Args:
        words_read: Words of two dimensions, int32.
        bits: Bits of a code.
        signed: Whether codes are signed.
        dtype: float16 or bfloat16.
        ptx: The instructions of `codes_ptx`.

    Returns:
        A tensor for each pair, of the same shape, int32; in the interpreter the words themselves.
    """
    # The instructions take signed codes of 8 bits for bfloat16, unsigned ones otherwise; so does the interpreter.
    if bits == 8 and signed != (dtype == tl.bfloat16 and not INTERPRETED):
        words_read = words_read ^ SIGNS
    if INTERPRETED:
        return (words_read,)
    elif bits == 8:  # noqa: RET505  # both branches are not compiled only as an else
        return tl.inline_asm_elementwise(
            ptx, "=&r,=&r,r", [words_read], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    elif bits == 2:
        return tl.inline_asm_elementwise(
            ptx,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [words_read],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            ptx,
            "=&r,=&r,=&r,=&r,r",
            [words_read],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def pair_of_codes(
    pairs: tl.tensor, zero: tl.tensor, p: tl.constexpr, bits: tl.constexpr, dtype: tl.constexpr
) -> tl.tensor:
    """Make numbers of pair `p` of `raw_pairs`: codes minus `zero`, exact in `dtype`.

    Args:
        pairs: From `raw_pairs`.
        zero: The zero point of each word, float32, or what broadcasts to that; of unsigned codes.
        p: Index of the pair.
        bits: Bits of a code.
        dtype: float16 or bfloat16.

    Returns:
        Of the shape of the words, and 2 behind it.
    """
    if INTERPRETED:
        half: tl.constexpr = 4 if bits == 3 else 16 // bits
        low = centered(pairs[0], zero, bits * p, bits, dtype)
        return tl.join(low, centered(pairs[0], zero, bits * (p + half), bits, dtype))
    elif dtype == tl.float16:  # noqa: RET505  # both branches are not compiled only as an else
        return _both(pairs[p], dtype) - (1024.0 + zero).to(dtype)[:, :, None]
    elif bits == 8:
        return _both(pairs[p], dtype) - (zero - 128.0).to(dtype)[:, :, None]
    else:
        return _both(pairs[p], dtype) - (128.0 + zero).to(dtype)[:, :, None]


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _both(pair: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Take two 16-bit values out of each word, the lower one first, as a last axis."""
    return tl.join(_low(pair, dtype), _high(pair, dtype))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _low(pair: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    return pair.to(tl.int16).to(dtype, bitcast=True)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _high(pair: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    return (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
