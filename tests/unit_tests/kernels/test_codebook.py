"""The codebooks of nf4 and fp4, and the PTX that looks them up, emulated."""

from __future__ import annotations

import re
import struct

import pytest
import torch

from langchain_quantllm.kernels.linear.codebook import (
    CODEBOOKS,
    GROUPS_SHUFFLED,
    MXFP4,
    codes_ptx,
    lookup_ptx,
    pair_ptx,
)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codebooks_are_those_of_bitsandbytes(kind: str) -> None:
    from bitsandbytes.functional import get_4bit_type

    assert torch.equal(torch.tensor(CODEBOOKS[kind]), get_4bit_type(kind, device="cpu"))


def test_the_codebook_of_mxfp4_is_that_of_transformers() -> None:
    from transformers.integrations.mxfp4 import FP4_VALUES

    assert list(CODEBOOKS[MXFP4]) == FP4_VALUES


def emulate(ptx: str, given: tuple[int, ...], results: int = 8) -> list[int]:
    """Run the instructions in one lane of a warp, in which `shfl` asks the others what they hold.

    Args:
        ptx: The instructions, whose results are in the first registers.
        given: The numbers in the registers behind them.
        results: Number of results.
    """
    inputs = {f"${results + index}": value for index, value in enumerate(given)}
    lanes: list[dict[str, int]] = [{"%laneid": lane, **inputs} for lane in range(32)]
    for line in re.findall(r"[a-z][\w.]* [^;{}]+;", ptx.replace("{ .reg", "{;.reg")):
        name, *operands = re.split(r"[ ,;]+", line.strip(" ;"))
        if name.startswith("reg"):
            continue
        before = [dict(registers) for registers in lanes]
        for lane, registers in enumerate(lanes):
            values = [before[lane][o] if o in before[lane] else int(o, 0) for o in operands[1:]]
            if name == "shfl.sync.idx.b32":
                held, index, control, _ = values
                mask = control >> 8
                source = (lane & mask) | (index & 31 & ~mask)
                assert source <= (lane & mask) | (control & 31 & ~mask)
                result = before[source][operands[1]]
                assert held == before[lane][operands[1]]
            else:
                result = OPERATIONS[name](*values)
            registers[operands[0]] = result & 0xFFFFFFFF
    return [lanes[5][f"${j}"] for j in range(results)]


def _prmt(a: int, b: int, selector: int) -> int:
    octets = (a | b << 32).to_bytes(8, "little")
    picked = []
    for place in range(4):
        nibble = selector >> 4 * place & 15
        octet = octets[nibble & 7]
        picked.append((0xFF if octet & 0x80 else 0) if nibble & 8 else octet)
    return int.from_bytes(bytes(picked), "little")


def _lop3(a: int, b: int, c: int, table: int) -> int:
    bits = [table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32)]
    return sum(bit << i for i, bit in enumerate(bits))


def _pair(dtype: torch.dtype, value: int) -> torch.Tensor:
    return torch.tensor([value & 0xFFFF, value >> 16], dtype=torch.uint16).view(dtype).float()


def _bits(dtype: torch.dtype, pair: torch.Tensor) -> int:
    low, high = (int(bits) & 0xFFFF for bits in pair.to(dtype).view(torch.int16))
    return low | high << 16


def _rounded_twice(dtype: torch.dtype, upper: int, lower: int) -> int:
    assert upper == lower
    value = struct.unpack("<f", struct.pack("<I", upper))[0]
    return _bits(dtype, torch.tensor([value, value]))


def _fma(dtype: torch.dtype, a: int, b: int, c: int) -> int:
    # A product of two is exact in float32, and so is the sum with -0 or of small integers.
    return _bits(dtype, _pair(dtype, a) * _pair(dtype, b) + _pair(dtype, c))


OPERATIONS = {
    "cvt.rn.f16x2.f32": lambda a, b: _rounded_twice(torch.float16, a, b),
    "cvt.rn.bf16x2.f32": lambda a, b: _rounded_twice(torch.bfloat16, a, b),
    "fma.rn.f16x2": lambda a, b, c: _fma(torch.float16, a, b, c),
    "fma.rn.bf16x2": lambda a, b, c: _fma(torch.bfloat16, a, b, c),
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "shr.s32": lambda a, b: (a - (a >> 31 << 32)) >> b,
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
}


@pytest.mark.parametrize("way", GROUPS_SHUFFLED)
@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_instructions_look_up_every_index_in_every_place(way: str, kind: str, dtype: torch.dtype) -> None:
    ptx = lookup_ptx(way, kind, str(dtype)[6:])
    bits = [b & 0xFFFF for b in torch.tensor(CODEBOOKS[kind]).to(dtype).view(torch.int16).tolist()]
    for turn in range(16):
        indices = [[(turn + 3 * place + 7 * word) % 16 for place in range(8)] for word in range(2)]
        # Element 0 is in the upper half of the lowest byte.
        words = [sum(index << 4 * (place ^ 1) for place, index in enumerate(row)) for row in indices]
        expected = [bits[indices[0][j]] | bits[indices[1][j]] << 16 for j in range(8)]
        assert emulate(ptx, (words[0], words[1])) == expected


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_instructions_look_up_and_scale_the_pairs_of_a_word(kind: str, dtype: torch.dtype) -> None:
    ptx = pair_ptx(kind, str(dtype)[6:])
    values = torch.tensor(CODEBOOKS[kind]).to(dtype)
    scale = 0.37
    for turn in range(16):
        indices = [(turn + 3 * place) % 16 for place in range(8)]
        word = sum(index << 4 * (place ^ 1) for place, index in enumerate(indices))
        found = emulate(ptx, (word, struct.unpack("<I", struct.pack("<f", scale))[0]), 4)
        expected = (values[indices] * torch.tensor(scale).to(dtype)).view(-1, 2)
        assert torch.equal(torch.stack([_pair(dtype, pair) for pair in found]), expected.float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_instructions_read_the_codes_of_a_word_in_pairs(bits: int, dtype: torch.dtype) -> None:
    ptx, count = codes_ptx(bits, str(dtype)[6:]), 4 if bits == 3 else 16 // bits
    is_signed = bits == 8 and dtype == torch.bfloat16
    above = 0 if is_signed else 1024 if dtype == torch.float16 else 128
    for turn in range(1 << bits):
        codes = [(turn + 5 * place) % (1 << bits) for place in range(2 * count)]
        word = sum(code << bits * place for place, code in enumerate(codes)) | (0xAB << 24 if bits == 3 else 0)
        numbers = [code - (code >> 7 << 8) if is_signed else code + above for code in codes]
        found = [_pair(dtype, pair).tolist() for pair in emulate(ptx, (word,), count)]
        assert found == [[numbers[p], numbers[p + count]] for p in range(count)]
