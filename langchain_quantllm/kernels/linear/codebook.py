"""PTX that looks up 16 indices of 4 bits, in two words, as values of nf4, fp4 or mxfp4 in 16 bits.

The values come in pairs from the same place of two neighbouring words, as tensor cores take them.

On an H200, 7e9 weights take about 1 ms for every two instructions that run at half rate (`prmt`, `lop3`, shifts),
and 1 ms for one `shfl`, which runs beside them. "permute" is 3 of the former, "shuffle" 1.5 and one `shfl`; "mixed" is
half and half.

Source: `prmt` and `shfl.sync` are described in NVIDIA's PTX ISA 8.5, sections 9.7.8.7 and 9.7.8.6. The values:
bitsandbytes 0.50.2, bitsandbytes/functional.py, `get_4bit_type`; those of mxfp4, e2m1: OCP Microscaling Formats (MX)
Specification v1.0, section 5.3.3.
"""

from __future__ import annotations

import struct

__all__ = ["CODEBOOKS", "CONSTRAINTS", "GROUPS_SHUFFLED", "MXFP4", "lookup_ptx"]

MXFP4 = "mxfp4"

_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
CODEBOOKS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(value / 12 for value in _FP4) + tuple(-value / 12 for value in _FP4),
    MXFP4: (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
}  # fmt: skip
"""The 16 values that indices stand for."""

GROUPS_SHUFFLED = {"permute": 0, "mixed": 2, "shuffle": 4}
"""How many of the four bytes of a word are looked up with `shfl`; the others with `prmt`."""

CONSTRAINTS = ",".join(["=&r"] * 8 + ["r"] * 2)
"""Registers: 8 pairs of values, then the two words."""

_WORDS = ("$8", "$9")


def lookup_ptx(method: str, kind: str, dtype: str) -> str:
    """Write the instructions that look up the 16 indices of two words.

    Args:
        method: A key of `GROUPS_SHUFFLED`.
        kind: A key of `CODEBOOKS`.
        dtype: "float16" or "bfloat16".

    Returns:
        PTX for `inline_asm_elementwise` with `pack=2` and `CONSTRAINTS`. The pair `j` is of element `j` of either
        word, where element 0 is in the upper half of the lowest byte, and 1 in its lower half.
    """
    shuffled = GROUPS_SHUFFLED[method]
    lines = ["{ .reg .b32 s, m, t, n, l, h, u, v, lane, t0, t1, t2, t3, t4, t5, t6, t7;", *_tables(kind, dtype)]
    if shuffled:
        lines += _own_value()
    for octet in range(4):
        if octet >= 4 - shuffled:
            lines += _shuffled(octet)
        elif octet % 2 == 0:
            lines += _selectors(octet) + _permuted(octet)
        else:
            # The second two of the bytes that `_selectors` has put side by side.
            lines += ["shr.u32 s, s, 16;", "shr.u32 m, m, 16;", *_permuted(octet)]
    return "\n".join([*lines, "}"])


def _tables(kind: str, dtype: str) -> list[str]:
    """Put the low bytes of the 16 values into `t0` to `t3`, and the high bytes into `t4` to `t7`."""
    halves = [_half(value, dtype) for value in CODEBOOKS[kind]]
    octets = bytes(half & 255 for half in halves) + bytes(half >> 8 for half in halves)
    return [f"mov.b32 t{index}, {word:#x};" for index, word in enumerate(struct.unpack("<8I", octets))]


def _half(value: float, dtype: str) -> int:
    """Round to nearest, ties to even, and give the bits."""
    if dtype == "float16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return int(bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _own_value() -> list[str]:
    """Put the bits of value `lane % 16` into both halves of `lane`."""
    return [
        "mov.u32 lane, %laneid;",
        "and.b32 s, lane, 7;",
        "prmt.b32 n, t0, t1, s;",
        "prmt.b32 l, t2, t3, s;",
        "prmt.b32 h, t4, t5, s;",
        "prmt.b32 v, t6, t7, s;",
        "prmt.b32 n, n, h, 0x4040;",
        "prmt.b32 l, l, v, 0x4040;",
        "shl.b32 u, lane, 28;",
        "shr.s32 u, u, 31;",  # all bits set for the upper 8 values
        "lop3.b32 lane, u, l, n, 0xca;",
    ]


def _selectors(octet: int) -> list[str]:
    """Put bytes `octet` and `octet + 1` of both words side by side; `s` looks up in 8, `m` tells which 8."""
    bytes_of_both = octet | octet + 4 << 4 | octet + 1 << 8 | octet + 5 << 12
    return [
        f"prmt.b32 t, {_WORDS[0]}, {_WORDS[1]}, {bytes_of_both:#x};",
        "and.b32 s, t, 0x77777777;",
        "shr.u32 m, t, 3;",
        "and.b32 m, m, 0x11111111;",
    ]


def _permuted(octet: int) -> list[str]:
    """Look up four indices: the low bytes of their values in either half of the table, then the high bytes."""
    lines = ["prmt.b32 u, 0xff00, 0, m;"]
    for name, first in (("l", 0), ("h", 4)):
        lines += [
            f"prmt.b32 n, t{first}, t{first + 1}, s;",
            f"prmt.b32 {name}, t{first + 2}, t{first + 3}, s;",
            f"lop3.b32 {name}, u, {name}, n, 0xca;",  # u ? upper 8 : lower 8
        ]
    even, odd = f"${2 * octet}", f"${2 * octet + 1}"
    return [*lines, f"prmt.b32 {even}, l, h, 0x7351;", f"prmt.b32 {odd}, l, h, 0x6240;"]


def _shuffled(octet: int) -> list[str]:
    """Look up four indices in the registers of the warp's lanes; 0x100f keeps to 16 lanes, and to 4 bits."""
    lines = []
    for element, shift in ((2 * octet, 8 * octet + 4), (2 * octet + 1, 8 * octet)):
        for word, name in zip(_WORDS, ("u", "v"), strict=True):
            lines += [
                f"shr.u32 t, {word}, {shift};",
                f"shfl.sync.idx.b32 {name}, lane, t, 0x100f, 0xffffffff;",
            ]
        lines.append(f"prmt.b32 ${element}, u, v, 0x5410;")
    return lines
