"""Codes of few bits in words of 32: one little-endian stream of bits, or AWQ's order of 4 bits."""

from __future__ import annotations

import torch

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place of each of 8 codes in a word of AWQ. Source: awq/utils/packing_utils.py of AutoAWQ."""


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


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes of 4 bits along their last axis into words, in AWQ's order.

    Args:
        codes: uint8 of shape `(..., n)`, n a multiple of 8.

    Returns:
        int32 of shape `(..., n / 8)`.
    """
    places = sorted(range(8), key=_AWQ_ORDER.__getitem__)
    ordered = codes.unflatten(-1, (-1, 8))[..., places].flatten(-2)
    return pack_bits(ordered.reshape(-1, ordered.shape[-1]), 4).view(*codes.shape[:-1], -1)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """Read codes from AWQ's words; the reverse of `pack_awq`."""
    octets = words.contiguous().view(torch.uint8)
    codes = torch.stack([octets & 15, octets >> 4], dim=-1).view(*words.shape, 2, 4)
    return codes.transpose(-2, -1).flatten(-3)  # `_AWQ_ORDER`, read down its columns


def pack_inputs(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes of 4 bits along their inputs, as GPTQ does, with few bytes of memory beside them.

    Args:
        codes: uint8 of shape `(..., in_features, out_features)`, in_features a multiple of 8.

    Returns:
        int32 of shape `(..., in_features / 8, out_features)`, as `pack_bits` of the transposed codes gives it.
    """
    octets = codes[..., ::2, :] | codes[..., 1::2, :] << 4
    words = octets.unflatten(-2, (-1, 4)).transpose(-2, -1).contiguous()
    return words.view(torch.int32).squeeze(-1)
