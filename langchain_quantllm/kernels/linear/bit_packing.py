"""Codes of few bits in words of 32: one little-endian stream of bits."""

from __future__ import annotations

import torch


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along their last axis into words, as one little-endian stream of bits.

    Args:
        codes: uint8 of shape `(rows, n)`, `n * bits` a multiple of 32.
        bits: Bits of a code.

    Returns:
        int32 of shape `(rows, n * bits / 32)`; 3 bits put 32 codes into 3 words, two of them across a border.
    """
    rows, n = codes.shape
    single = (codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    octets = single.reshape(rows, n * bits // 8, 8) << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return octets.sum(-1, dtype=torch.uint8).contiguous().view(torch.int32)


def unpack_bits(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Read codes from words; the reverse of `pack_bits`.

    Args:
        words: int32 of shape `(rows, m)`.
        bits: Bits of a code.

    Returns:
        uint8 of shape `(rows, m * 32 / bits)`.
    """
    octets = words.contiguous().view(torch.uint8)
    single = (octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=words.device)) & 1
    codes = single.reshape(words.shape[0], -1, bits) << torch.arange(bits, dtype=torch.uint8, device=words.device)
    return codes.sum(-1, dtype=torch.uint8)
