"""Decoding quantized words in registers, as Triton functions that the kernels of all formats share.

Each word has `per_word` codes of consecutive inputs. Code `j` of all words is multiplied by every `per_word`-th input,
so that no code moves between threads. In 3 bits, a word is the 3 bytes that hold 8 codes.
"""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.launch import INTERPRETED, prefetch
from langchain_quantllm.kernels.linear.codebook import CONSTRAINTS

_CONSTRAINTS = tl.constexpr(CONSTRAINTS)
MAGIC = 0x4B000000
"""The bits of 2**23 in float32: a code in the lowest bits is added to it. Kernels that decode many codes take it as an
argument, because an instruction takes only one constant, and that is the mask of the code."""

_MAGIC_32 = tl.constexpr(MAGIC)
_MAGIC_FLOAT16 = tl.constexpr(0x6400)  # 1024
_MAGIC_BFLOAT16 = tl.constexpr(0x4300)  # 128
_BASE_32 = tl.constexpr(8388608.0)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def every_fourth(values: tl.tensor, rows: tl.constexpr, words: tl.constexpr) -> tl.tensor:
    """Cut `(rows, words, 4)` into 4 tensors of shape `(rows, words)`, in order."""
    even, odd = tl.split(tl.reshape(values, (rows, words, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def every_eighth(values: tl.tensor, rows: tl.constexpr, words: tl.constexpr) -> tl.tensor:
    """Cut `(rows, words, 8)` into 8 tensors of shape `(rows, words)`, in order."""
    even, odd = tl.split(tl.reshape(values, (rows, words, 4, 2)))
    a, c, e, g = every_fourth(even, rows, words)
    b, d, f, h = every_fourth(odd, rows, words)
    return a, b, c, d, e, f, g, h


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def every_sixteenth(values: tl.tensor, rows: tl.constexpr, words: tl.constexpr) -> tl.tensor:
    """Cut `(rows, words, 16)` into 16 tensors of shape `(rows, words)`, in order."""
    even, odd = tl.split(tl.reshape(values, (rows, words, 8, 2)))
    a, c, e, g, i, k, m, o = every_eighth(even, rows, words)
    b, d, f, h, j, l, n, p = every_eighth(odd, rows, words)  # noqa: E741
    return a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def strided(values: tl.tensor, rows: tl.constexpr, words: tl.constexpr, per_word: tl.constexpr) -> tl.tensor:
    """Cut inputs of shape `(rows, words * per_word)` into one tensor of shape `(rows, words)` for each code."""
    if per_word == 4:
        return every_fourth(values, rows, words)
    elif per_word == 8:  # noqa: RET505  # both branches are not compiled only as an else
        return every_eighth(values, rows, words)
    else:
        return every_sixteenth(values, rows, words)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def lane_value(code: tl.tensor) -> tl.tensor:
    """Load the one of 16 values that the lane holds for the others: a scalar that differs between threads."""
    lane = tl.inline_asm_elementwise(
        "mov.u32 $0, %laneid;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=True, pack=1
    )
    return tl.load(code + (lane & 15))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def lookup_by_shuffle(words: tl.tensor, value: tl.tensor, shift: tl.constexpr) -> tl.tensor:
    """Look up, in float32, the index of 4 bits at `shift` of each word, in the registers of the warp's lanes."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; shr.u32 t, $1, $3; shfl.sync.idx.b32 $0, $2, t, 0x100f, 0xffffffff; }",
        "=f,r,f,r",
        [words, value, shift],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def lookup_in_memory(words: tl.tensor, code: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Look up the 8 indices of each word in memory; element 0 is in the upper half of the lowest byte."""
    return (
        tl.load(code + ((words >> 4) & 15)).to(dtype),
        tl.load(code + (words & 15)).to(dtype),
        tl.load(code + ((words >> 12) & 15)).to(dtype),
        tl.load(code + ((words >> 8) & 15)).to(dtype),
        tl.load(code + ((words >> 20) & 15)).to(dtype),
        tl.load(code + ((words >> 16) & 15)).to(dtype),
        tl.load(code + ((words >> 28) & 15)).to(dtype),
        tl.load(code + ((words >> 24) & 15)).to(dtype),
    )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def decoded(words: tl.tensor, code: tl.tensor, dtype: tl.constexpr, ptx: tl.constexpr) -> tl.tensor:
    """Look up the 8 indices of each word.

    All inputs must be made of loads: only then does Triton load an operand of a product in the layout of tensor cores.

    Args:
        words: Words of shape `(outputs, words)`, int32; each thread has an even number of them along the last axis.
        code: Pointer to the 16 values, float32.
        dtype: float16 or bfloat16, and without `ptx` float32 too.
        ptx: The instructions, of this `dtype`; empty to look up in memory.

    Returns:
        8 tensors of the shape of `words`, in `dtype`.
    """
    if INTERPRETED or ptx == "":
        return lookup_in_memory(words, code, dtype)
    elif dtype == tl.float16:  # noqa: RET505  # both branches are not compiled only as an else
        # The dtypes are spelled out: a tuple of dtypes cannot be built from a kernel parameter.
        return tl.inline_asm_elementwise(
            ptx,
            _CONSTRAINTS,
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            ptx,
            _CONSTRAINTS,
            [words],
            dtype=(
                tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
            ),
            is_pure=True,
            pack=2,
        )  # fmt: skip


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def halves_swapped(values: tl.tensor) -> tl.tensor:
    """Swap the two values of each byte of a word of 8."""
    return values[1], values[0], values[3], values[2], values[5], values[4], values[7], values[6]


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def joined(values: tl.tensor, rows: tl.constexpr, words: tl.constexpr, per_word: tl.constexpr) -> tl.tensor:
    """Join `per_word` tensors of shape `(rows, words)` to `(rows, words, per_word)`; threads keep their numbers."""
    if per_word == 4:
        found = _four_joined(values[0], values[1], values[2], values[3])
    elif per_word == 8:
        even = _four_joined(values[0], values[2], values[4], values[6])
        found = tl.join(even, _four_joined(values[1], values[3], values[5], values[7]))
    else:
        a = _four_joined(values[0], values[4], values[8], values[12])
        b = _four_joined(values[1], values[5], values[9], values[13])
        c = _four_joined(values[2], values[6], values[10], values[14])
        d = _four_joined(values[3], values[7], values[11], values[15])
        found = _four_joined(a, b, c, d)
    return tl.reshape(found, [rows, words, per_word])


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _four_joined(first: tl.tensor, second: tl.tensor, third: tl.tensor, fourth: tl.tensor) -> tl.tensor:
    return tl.join(tl.join(first, third), tl.join(second, fourth))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def lookup_word_by_shuffle(words: tl.tensor, value: tl.tensor) -> tl.tensor:
    """Look up the 8 indices of each word by `lookup_by_shuffle`."""
    return (
        lookup_by_shuffle(words, value, 4),
        lookup_by_shuffle(words, value, 0),
        lookup_by_shuffle(words, value, 12),
        lookup_by_shuffle(words, value, 8),
        lookup_by_shuffle(words, value, 20),
        lookup_by_shuffle(words, value, 16),
        lookup_by_shuffle(words, value, 28),
        lookup_by_shuffle(words, value, 24),
    )


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def all_scaled_codes(words: tl.tensor, magic: tl.tensor, bits: tl.constexpr, zero: tl.constexpr) -> tl.tensor:
    """Read all codes of each word by `scaled_code`."""
    a = scaled_code(words, magic, 0, bits, zero)
    b = scaled_code(words, magic, bits, bits, zero)
    c = scaled_code(words, magic, 2 * bits, bits, zero)
    d = scaled_code(words, magic, 3 * bits, bits, zero)
    if bits == 8:
        return a, b, c, d
    else:  # noqa: RET505  # both branches are not compiled only as an else
        e = scaled_code(words, magic, 4 * bits, bits, zero)
        f = scaled_code(words, magic, 5 * bits, bits, zero)
        g = scaled_code(words, magic, 6 * bits, bits, zero)
        h = scaled_code(words, magic, 7 * bits, bits, zero)
        if bits > 2:
            return a, b, c, d, e, f, g, h
        else:  # noqa: RET505
            return (
                a, b, c, d, e, f, g, h,
                scaled_code(words, magic, 8 * bits, bits, zero), scaled_code(words, magic, 9 * bits, bits, zero),
                scaled_code(words, magic, 10 * bits, bits, zero), scaled_code(words, magic, 11 * bits, bits, zero),
                scaled_code(words, magic, 12 * bits, bits, zero), scaled_code(words, magic, 13 * bits, bits, zero),
                scaled_code(words, magic, 14 * bits, bits, zero), scaled_code(words, magic, 15 * bits, bits, zero),
            )  # fmt: skip


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def inverse_units(bits: tl.constexpr, per_word: tl.constexpr) -> tl.tensor:
    """Return the inverse `code_unit` of each code of a word: powers of two of shape `(1, per_word)`, float32."""
    places = tl.arange(0, per_word) * bits % 16
    return ((127 - places) << 23).to(tl.float32, bitcast=True)[None, :]


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def scaled_code(
    words: tl.tensor, magic: tl.tensor, place: tl.constexpr, bits: tl.constexpr, zero: tl.constexpr
) -> tl.tensor:
    """Read the code at bit `place` of each word, minus `zero`, as float32 times `code_unit(place)`, to save shifts."""
    upper: tl.constexpr = place // 16 * 16
    fields = (words >> upper) & (((1 << bits) - 1) << (place - upper))
    return (fields | magic).to(tl.float32, bitcast=True) - (_BASE_32 + zero * code_unit(place))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def code_unit(place: tl.constexpr) -> tl.constexpr:
    """Return the factor of `scaled_code`."""
    return 1.0 * (1 << (place % 16))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def centered(
    words: tl.tensor, zero: tl.tensor, place: tl.constexpr, bits: tl.constexpr, dtype: tl.constexpr
) -> tl.tensor:
    """Read the code at bit `place` of each word, minus `zero`; exact in `dtype`, as both are below 257."""
    fields = (words >> place) & ((1 << bits) - 1)
    if INTERPRETED or dtype == tl.float32 or (dtype == tl.bfloat16 and bits == 8):
        return ((fields | _MAGIC_32).to(tl.float32, bitcast=True) - (_BASE_32 + zero)).to(dtype)
    elif dtype == tl.float16:  # noqa: RET505  # both branches are not compiled only as an else
        return (fields | _MAGIC_FLOAT16).to(tl.int16).to(dtype, bitcast=True) - (1024.0 + zero).to(dtype)
    else:
        return (fields | _MAGIC_BFLOAT16).to(tl.int16).to(dtype, bitcast=True) - (128.0 + zero).to(dtype)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def packed_words(
    stored: tl.tensor, place: tl.tensor, column: tl.tensor, width: tl.tensor, inside: tl.tensor, bits: tl.constexpr
) -> tl.tensor:
    """Load words of shape `(words, outputs)` that are packed along the inputs.

    Args:
        stored: Pointer to the codes: words of shape `(inputs * bits / 32, width)`.
        place: Indices of the words of an output, of shape `(words,)`; in 3 bits, of the 3 bytes.
        column: Indices of the outputs, of shape `(outputs,)`.
        width: Number of all outputs.
        inside: Mask of the words that exist, of shape `(words, outputs)`.
        bits: Bits of a code.

    Returns:
        int32; in 3 bits, the upper 8 bits are undefined.
    """
    if bits != 3:
        return tl.load(stored + place[:, None] * width + column[None, :], mask=inside, other=0)
    else:  # noqa: RET505  # both branches are not compiled only as an else
        at = stored + (place * 3 // 4)[:, None] * width + column[None, :]
        shift = (place * 3 % 4 * 8)[:, None]
        return _across(at, width, shift, inside, inside & (shift > 8))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def prefetch_columns(
    stored: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    left: tl.tensor,
    width: tl.tensor,
    bits: tl.constexpr,
    outputs: tl.constexpr,
    ahead: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """Ask for the first `ahead` rows of packed words, from `start` on, of the program's outputs from `left` on."""
    scale: tl.constexpr = 3 if bits == 3 else 4  # bytes of a word in memory
    place = start * scale // 4 + tl.arange(0, ahead)
    rows_inside = tl.where(place * 4 < stop * scale, outputs, 0)
    at = stored + place[:, None] * width + left
    prefetch(at, tl.minimum(rows_inside, width - left)[:, None], outputs * 4 // 128 if outputs > 32 else 1, early)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def zero_points(
    zeros: tl.tensor, group: tl.tensor, column: tl.tensor, width: tl.tensor, inside: tl.tensor, bits: tl.constexpr
) -> tl.tensor:
    """Load the zero points of groups, which are packed along the outputs, as int32."""
    at = zeros + group * (width * bits // 32) + column * bits // 32
    place = column * bits % 32
    if bits == 3:
        packed = _across(at, 1, place, inside, inside & (place > 32 - bits))
    else:
        packed = tl.load(at, mask=inside, other=0) >> place
    return packed & ((1 << bits) - 1)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _across(at: tl.tensor, step: tl.tensor, shift: tl.tensor, inside: tl.tensor, crosses: tl.tensor) -> tl.tensor:
    """Load 32 bits from `shift` on: of a word, and if they cross its end, of the word a `step` further."""
    low = tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(at + step, mask=crosses, other=0).to(tl.uint32, bitcast=True)
    # A shift by 32 is undefined: it becomes one by 0, where `high` is 0.
    return ((low >> shift) | (high << (32 - shift & 31))).to(tl.int32, bitcast=True)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def columns_of(at: tl.tensor, inside: tl.tensor, words: tl.constexpr, per_word: tl.constexpr) -> tl.tensor:
    """Load inputs of shape `(words, per_word)` as `per_word` tensors of shape `(words,)`, float32."""
    loaded = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    if per_word == 4:
        return _four(loaded, words)
    elif per_word == 8:  # noqa: RET505  # both branches are not compiled only as an else
        return _eight(loaded, words)
    else:
        even, odd = tl.split(tl.reshape(loaded, (words, 8, 2)))
        a, c, e, g, i, k, m, o = _eight(even, words)
        b, d, f, h, j, l, n, p = _eight(odd, words)  # noqa: E741
        return a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _eight(values: tl.tensor, words: tl.constexpr) -> tl.tensor:
    """Cut `(words, 8)` into its 8 columns, in order."""
    even, odd = tl.split(tl.reshape(values, (words, 4, 2)))
    a, c, e, g = _four(even, words)
    b, d, f, h = _four(odd, words)
    return a, b, c, d, e, f, g, h


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _four(values: tl.tensor, words: tl.constexpr) -> tl.tensor:
    """Cut `(words, 4)` into its 4 columns, in order."""
    even, odd = tl.split(tl.reshape(values, (words, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def scaled(values: tl.tensor, scale: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Multiply values by their scales in `dtype`, the dtype of both operands on tensor cores."""
    if INTERPRETED:
        # The interpreter stores bfloat16 as integers.
        return (values.to(tl.float32) * scale).to(dtype)
    else:  # noqa: RET505  # both branches are not compiled only as an else
        return values * scale.to(dtype)
