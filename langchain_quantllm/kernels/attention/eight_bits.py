"""Keys and values in 8 bits, in Triton: writing them, and decoding them in registers; see `kernels.kv_quantization`."""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object, and its compiler
# resolves every annotation of a kernel's arguments, and refuses others than its own.

from functools import cache

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from langchain_quantllm.kernels.kv_quantization import KVScales
from langchain_quantllm.kernels.launch import INTERPRETED

_INT8_PTX = tl.constexpr(
    # 1024 + code + 128 has the code's byte, with its sign bit flipped, as its lowest one.
    """{
    .reg .b32 t, c;
    xor.b32 t, $2, 0x80808080;
    mov.b32 c, 0x64806480;
    prmt.b32 $0, t, 0x64646464, 0x4140;
    prmt.b32 $1, t, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, c;
    sub.f16x2 $1, $1, c;
    }"""
)
_FP8_PTX = tl.constexpr(
    """{
    .reg .b16 a, b;
    mov.b32 {a, b}, $2;
    cvt.rn.f16x2.e4m3x2 $0, a;
    cvt.rn.f16x2.e4m3x2 $1, b;
    }"""
)
_OLD_FP8_PTX = tl.constexpr(
    # Sign, exponent and mantissa at their places in float16, whose exponent has a bias of 8 more.
    """{
    .reg .b32 t, m, c;
    mov.b32 c, 0x5c005c00;
    prmt.b32 t, $2, 0, 0x1404;
    and.b32 m, t, 0x7f007f00;
    shr.u32 m, m, 1;
    lop3.b32 m, t, 0x80008000, m, 0xea;
    prmt.b32 t, $2, 0, 0x3424;
    mul.f16x2 $0, m, c;
    and.b32 m, t, 0x7f007f00;
    shr.u32 m, m, 1;
    lop3.b32 m, t, 0x80008000, m, 0xea;
    mul.f16x2 $1, m, c;
    }"""
)
_CONSTRAINTS = tl.constexpr("=&r,=&r,r")

_HIGH_HALF = tl.constexpr(-65536)
_LARGEST_INT8, _LARGEST_FP8 = tl.constexpr(127.0), tl.constexpr(448.0)
_ROUNDS_INT8 = tl.constexpr(12582912.0)
"""1.5 * 2**23: a sum with it has no digits behind the point."""
_ROUNDS_SUBNORMAL = tl.constexpr(16384.0)
"""A sum with it is a multiple of 2**-9, the smallest fp8 number above 0."""
_SMALLEST_NORMAL = tl.constexpr(0.015625)


def pointers(scales: KVScales | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the scales with those of a key and its value as one word, which are loaded together, and the factors."""
    return (None, None) if scales is None else (scales.pairs.view(torch.int32), scales.factors)


@cache
def converts_fp8(device: torch.device) -> bool:
    """Whether a GPU has instructions that read fp8."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def decoded(codes: tl.tensor, converts: tl.constexpr) -> tl.tensor:
    """Return the numbers of codes, int8 or the bytes of fp8, in float16, which holds them all; others as they are.

    Args:
        codes: Codes, of which each thread has multiples of 4 side by side.
        converts: Whether the device has an instruction for fp8.
    """
    if codes.dtype.is_floating():
        return codes
    elif INTERPRETED:  # noqa: RET505  # both branches are not compiled only as an else
        if codes.dtype == tl.int8:
            return codes.to(tl.float16)
        bits = codes.to(tl.int16)
        halves = ((bits & 128) << 8) | ((bits & 127) << 7)
        return halves.to(tl.float16, bitcast=True) * 256
    elif codes.dtype == tl.int8:
        return tl.inline_asm_elementwise(_INT8_PTX, _CONSTRAINTS, [codes], dtype=tl.float16, is_pure=True, pack=4)
    elif converts:
        return tl.inline_asm_elementwise(_FP8_PTX, _CONSTRAINTS, [codes], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(_OLD_FP8_PTX, _CONSTRAINTS, [codes], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def load_scales(scales: tl.tensor, indices: tl.tensor, wanted: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Load the scales of keys and of values, float32.

    A scale of 0 is that of a place to which nothing was written, and must not spoil steps that are only timed.

    Args:
        scales: Pointer to the pairs of scales, int32.
        indices: Of the pairs.
        wanted: Mask of the pairs to load; None for all.
    """
    pairs = tl.load(scales + indices, mask=wanted, other=None if wanted is None else 0)
    of_values = (pairs & _HIGH_HALF).to(tl.float32, bitcast=True)
    return (pairs << 16).to(tl.float32, bitcast=True), tl.maximum(of_values, 1e-30)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def normalized(query: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Divide queries by their largest numbers, so that float16 holds them.

    Args:
        query: Of shape `(queries, key_tile)`.

    Returns:
        The quotients, float16, and the divisors of shape `(queries,)`, float32.
    """
    wide = query.to(tl.float32)
    sizes = tl.max(tl.abs(wide), 1)
    # Where one is NaN, which the maximum may not be, the quotient is as well.
    sizes = tl.where(sizes > 0, sizes, 1.0)
    return (wide / sizes[:, None]).to(tl.float16), sizes


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def store_rounded(
    target: tl.tensor,
    pair: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_tile: tl.constexpr,
    value_tile: tl.constexpr,
) -> None:
    """Store a key and its value in 8 bits, with their scales.

    Args:
        target: Pointer to the key's codes; those of the value follow.
        pair: Pointer to the pair of scales, int32.
        key: The key of shape `(key_tile,)`, zeros behind its end.
        value: The value of shape `(value_tile,)`, likewise.
        key_dim: Size of a key.
        value_dim: Size of a value.
        key_tile: `key_dim`, rounded up to a power of two.
        value_tile: `value_dim`, rounded up to a power of two.
    """
    key, value = key.to(tl.float32), value.to(tl.float32)
    value_is_finite = tl.min((tl.abs(value) < float("inf")).to(tl.int32), 0) > 0
    is_finite = value_is_finite & (tl.min((tl.abs(key) < float("inf")).to(tl.int32), 0) > 0)
    key_codes, key_scale = _rounded(tl.where(is_finite, key, 0.0), target.dtype.element_ty)
    value_codes, value_scale = _rounded(tl.where(value_is_finite, value, 0.0), target.dtype.element_ty)
    columns = tl.arange(0, key_tile)
    tl.store(target + columns, key_codes, mask=columns < key_dim)
    value_columns = tl.arange(0, value_tile)
    tl.store(target + key_dim + value_columns, value_codes, mask=value_columns < value_dim)
    key_scale = tl.where(is_finite, key_scale, float("nan"))
    tl.store(pair, ((key_scale.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | value_scale.to(tl.int32, bitcast=True))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _rounded(numbers: tl.tensor, dtype: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Round numbers to codes with one scale, a float32 that bfloat16 holds; see `kv_quantization.quantize`."""
    largest: tl.constexpr = _LARGEST_INT8 if dtype == tl.int8 else _LARGEST_FP8
    # A float32 of more digits is rounded in its bits, to the nearest of the even ones in the middle.
    bits = tl.div_rn(tl.max(tl.abs(numbers), 0), largest).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & _HIGH_HALF
    scale = bits.to(tl.float32, bitcast=True)
    scale = tl.where(scale == 0, 1.0, scale)
    scaled = tl.div_rn(numbers, scale + tl.zeros_like(numbers))
    scaled = tl.minimum(tl.maximum(scaled, -largest), largest)
    if dtype == tl.int8:
        return ((scaled + _ROUNDS_INT8) - _ROUNDS_INT8).to(tl.int8), scale
    else:  # noqa: RET505  # both branches are not compiled only as an else
        return _fp8_of(scaled), scale


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _fp8_of(numbers: tl.tensor) -> tl.tensor:
    """Round float32 numbers of at most 448 to the bytes of E4M3: by whole numbers, as not every GPU has it."""
    bits = numbers.to(tl.int32, bitcast=True)
    sizes = tl.abs(numbers)
    own = sizes.to(tl.int32, bitcast=True)
    normal = ((own + 0x7FFFF + ((own >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (sizes + _ROUNDS_SUBNORMAL).to(tl.int32, bitcast=True) - 0x46800000
    codes = tl.where(sizes < _SMALLEST_NORMAL, subnormal, normal)
    return (codes | ((bits >> 24) & 128)).to(tl.uint8)
