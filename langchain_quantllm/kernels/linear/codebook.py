"""PTX that looks up indices of 4 bits as values of nf4, fp4 or mxfp4 in 16 bits.

The values come in pairs, as tensor cores take them: from the same place of two neighbouring words, or from one byte.

On an H200, 7e9 weights take about 1 ms for every two instructions that run at half rate (`prmt`, `lop3`, shifts),
and 1 ms for one `shfl`, which runs beside them. "permute" is 3 of the former, "shuffle" 1.5 and one `shfl`; "mixed" is
half and half.

Source: `prmt` and `shfl.sync` are described in NVIDIA's PTX ISA 8.5, sections 9.7.8.7 and 9.7.8.6. The values:
bitsandbytes 0.50.2, bitsandbytes/functional.py, `get_4bit_type`; those of mxfp4, e2m1: OCP Microscaling Formats (MX)
Specification v1.0, section 5.3.3.
"""

from __future__ import annotations

import struct

__all__ = [
    "CODEBOOKS",
    "CONSTRAINTS",
    "GROUPS_SHUFFLED",
    "MXFP4",
    "PAIR_CONSTRAINTS",
    "codes_ptx",
    "lookup_ptx",
    "pair_ptx",
]

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

PAIR_CONSTRAINTS = ",".join(["=&r"] * 4 + ["r", "f"])
"""Registers of `pair_ptx`: 4 pairs of values, then the word and its scale."""

_WORDS = ("$8", "$9")
_REGISTERS = "{ .reg .b32 s, m, t, n, l, h, u, v, x, y, z, lane, t0, t1, t2, t3, t4, t5, t6, t7;"


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
    lines = [_REGISTERS, *_tables(kind, dtype)]
    if shuffled:
        lines += _own_value()
    for octet in range(4):
        if octet >= 4 - shuffled:
            lines += _shuffled(octet)
        elif octet % 2 == 0:
            lines += _selectors(octet) + _permuted(f"${2 * octet}", 0x7351, f"${2 * octet + 1}", 0x6240)
        else:
            # The second two of the bytes that `_selectors` has put side by side.
            lines += [*_NEXT_BYTES, *_permuted(f"${2 * octet}", 0x7351, f"${2 * octet + 1}", 0x6240)]
    return "\n".join([*lines, "}"])


def pair_ptx(kind: str, dtype: str) -> str:
    """Write the instructions that look up the 8 indices of one word, by `prmt`, and multiply by its scale.

    Args:
        kind: A key of `CODEBOOKS`.
        dtype: "float16" or "bfloat16".

    Returns:
        PTX for `inline_asm_elementwise` with `pack=1` and `PAIR_CONSTRAINTS`. The pair `j` is of the upper half of byte
        `j` of the word, and of its lower half: of the elements `2 * j` and `2 * j + 1`. Values, the scale and their
        products are rounded to `dtype`.
    """
    short = "bf16x2" if dtype == "bfloat16" else "f16x2"
    lines = [_REGISTERS, *_tables(kind, dtype), f"cvt.rn.{short}.f32 v, $5, $5;"]
    lines += ["mov.b32 z, 0x80008000;"]  # -0: a product alone is no instruction for bfloat16 before Hopper
    lines += ["and.b32 s, $4, 0x77777777;", "shr.u32 m, $4, 3;", "and.b32 m, m, 0x11111111;"]
    for first, second, following in (("$0", "$1", _NEXT_BYTES), ("$2", "$3", ())):
        lines += [*_permuted("x", 0x4051, "y", 0x6273), *following]
        lines += [f"fma.rn.{short} {first}, x, v, z;", f"fma.rn.{short} {second}, y, v, z;"]
    return "\n".join([*lines, "}"])


def codes_ptx(bits: int, dtype: str) -> str:
    """Write the instructions that read the codes of one word as 16-bit numbers, above a constant.

    A code beside the bits of 1024 or 128 is a number, without a conversion. bfloat16 has only 7 bits for it: of 8 bits
    it takes signed codes, whose sign is subtracted.

    Args:
        bits: Bits of a code: 2, 3, 4 or 8.
        dtype: "float16" or "bfloat16".

    Returns:
        PTX for `inline_asm_elementwise` with `pack=1`: a register for each pair, then one for the word. The pair `j` is
        of the code `j` and of the one as many codes further as there are pairs. Codes are above 1024 in float16, above
        128 in bfloat16, and as they are, signed, in bfloat16 of 8 bits.
    """
    count = _pairs(bits)
    is_wide = bits == 8 and dtype == "bfloat16"
    apart, mask = (12, 7) if bits == 3 else (16, (1 << bits) - 1)
    both = (0x7F if is_wide else mask) * 0x10001
    lines = ["{ .reg .b32 t, u, m, n;", f"mov.b32 m, {0x43004300 if dtype == 'bfloat16' else 0x64006400:#x};"]
    lines += ["mov.b32 n, 0xbf80bf80;"] if is_wide else []  # -1
    for j in range(count):
        lines.append(f"shr.u32 t, ${count}, {bits * j};")
        if apart != 16:
            lines += [f"shl.b32 u, t, {16 - apart};", f"and.b32 u, u, {mask << 16:#x};", f"and.b32 t, t, {mask};"]
            lines.append(f"lop3.b32 ${j}, t, u, m, 0xfe;")  # t | u | m
            continue
        lines.append(f"lop3.b32 {'u' if is_wide else f'${j}'}, t, {both:#x}, m, 0xea;")  # t & both | m
        if is_wide:
            lines += ["lop3.b32 t, t, 0x800080, m, 0xea;", f"fma.rn.bf16x2 ${j}, t, n, u;"]
    return "\n".join([*lines, "}"])


def _pairs(bits: int) -> int:
    return 4 if bits == 3 else 16 // bits


_NEXT_BYTES = ("shr.u32 s, s, 16;", "shr.u32 m, m, 16;")


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


def _permuted(first_pair: str, first_bytes: int, second_pair: str, second_bytes: int) -> list[str]:
    """Look up four indices: the low bytes of their values in either half of the table, then the high bytes.

    The pairs are made of the 8 bytes, chosen as by `prmt`: low bytes are 0 to 3, high bytes 4 to 7.
    """
    lines = ["prmt.b32 u, 0xff00, 0, m;"]
    for name, first in (("l", 0), ("h", 4)):
        lines += [
            f"prmt.b32 n, t{first}, t{first + 1}, s;",
            f"prmt.b32 {name}, t{first + 2}, t{first + 3}, s;",
            f"lop3.b32 {name}, u, {name}, n, 0xca;",  # u ? upper 8 : lower 8
        ]
    pairs = ((first_pair, first_bytes), (second_pair, second_bytes))
    return lines + [f"prmt.b32 {pair}, l, h, {chosen:#x};" for pair, chosen in pairs]


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
