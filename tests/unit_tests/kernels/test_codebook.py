"""The codebooks of nf4 and fp4, and the PTX that looks them up, emulated."""

from __future__ import annotations

import re

import pytest
import torch

from langchain_quantllm.kernels.linear.codebook import CODEBOOKS, GROUPS_SHUFFLED, MXFP4, lookup_ptx


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codebooks_are_those_of_bitsandbytes(kind: str) -> None:
    from bitsandbytes.functional import get_4bit_type

    assert torch.equal(torch.tensor(CODEBOOKS[kind]), get_4bit_type(kind, device="cpu"))


def test_the_codebook_of_mxfp4_is_that_of_transformers() -> None:
    from transformers.integrations.mxfp4 import FP4_VALUES

    assert list(CODEBOOKS[MXFP4]) == FP4_VALUES


def emulate(ptx: str, words: tuple[int, int]) -> list[int]:
    """Run the instructions in one lane of a warp, in which `shfl` asks the others what they hold."""
    lanes: list[dict[str, int]] = [{"%laneid": lane, "$8": words[0], "$9": words[1]} for lane in range(32)]
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
    return [lanes[5][f"${j}"] for j in range(8)]


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


OPERATIONS = {
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
