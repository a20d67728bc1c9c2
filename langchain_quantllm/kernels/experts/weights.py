"""The weights of one projection of all experts, as the kernels read them.

A stack has a tensor for each part of a weight, with the experts as its first axis. The formats are those of
`kernels.linear.weights`, of which `weight` returns one expert's, without copying; and mxfp4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from langchain_quantllm.kernels.linear.weights import FourBitWeight, GPTQWeight, Int8Weight

__all__ = ["MXFP4_BLOCK", "FloatStack", "FourBitStack", "GPTQStack", "Int8Stack", "Mxfp4Stack", "Stack"]

MXFP4_BLOCK = 32
"""Elements of mxfp4 that share a scale."""


@dataclass(frozen=True, kw_only=True)
class FloatStack:
    """Weights that are not quantized.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        values: The weights of shape `(experts, out_features, in_features)`, floating, of any strides: a transposed view
            where a model stores `(experts, in_features, out_features)`.
        bias: Biases of shape `(experts, out_features)`, or None.
    """

    in_features: int
    out_features: int
    values: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return len(self.values)


@dataclass(frozen=True, kw_only=True)
class FourBitStack:
    """Weights of bitsandbytes in nf4 or fp4, each expert quantized by itself; see `FourBitWeight`.

    Args:
        kind: "nf4" or "fp4".
        in_features: Inputs, a multiple of 8.
        out_features: Outputs.
        words: The indices of shape `(experts, out_features * in_features / 8)`, int32.
        code: The 16 values of shape `(16,)`, float32.
        scales: The largest magnitude of each block, of shape `(experts, blocks)`, float32; with `nested`, indices into
            `nested_code`, uint8.
        block_size: Elements that share a scale: a power of two, at least 8.
        nested: Whether the scales are quantized, as `nested_code[scales] * nested_scales + offset`.
        nested_code: 256 values, float32; `code` if not `nested`.
        nested_scales: Scales of the scales, of shape `(experts, ceil(blocks / nested_block_size))`, float32; `code` if
            not `nested`.
        nested_block_size: Scales that share one of `nested_scales`.
        offset: Added to every scale of an expert, of shape `(experts,)`, float32; `code` if not `nested`.
        bias: Biases of shape `(experts, out_features)`, or None.
    """

    kind: str
    in_features: int
    out_features: int
    words: torch.Tensor
    code: torch.Tensor
    scales: torch.Tensor
    block_size: int
    nested: bool
    nested_code: torch.Tensor
    nested_scales: torch.Tensor
    nested_block_size: int
    offset: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return len(self.words)

    def weight(self, expert: int) -> FourBitWeight:
        """Return the weight of one expert."""
        return FourBitWeight(
            kind=self.kind,
            in_features=self.in_features,
            out_features=self.out_features,
            words=self.words[expert],
            code=self.code,
            scales=self.scales[expert],
            block_size=self.block_size,
            nested=self.nested,
            nested_code=self.nested_code,
            nested_scales=self.nested_scales[expert] if self.nested else self.code,
            nested_block_size=self.nested_block_size,
            offset=self.offset[expert] if self.nested else self.code,
            bias=None if self.bias is None else self.bias[expert],
        )


@dataclass(frozen=True, kw_only=True)
class Int8Stack:
    """Weights of bitsandbytes in 8 bits: `codes * scales / 127`, a scale for each output of each expert.

    Args:
        in_features: Inputs, a multiple of 4.
        out_features: Outputs.
        words: The codes of shape `(experts, out_features * in_features / 4)`, int32: a view of int8.
        scales: Magnitudes of shape `(experts, out_features)`, float32.
        bias: Biases of shape `(experts, out_features)`, or None.
    """

    in_features: int
    out_features: int
    words: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return len(self.words)

    def weight(self, expert: int) -> Int8Weight:
        """Return the weight of one expert."""
        return Int8Weight(
            in_features=self.in_features,
            out_features=self.out_features,
            words=self.words[expert],
            scales=self.scales[expert],
            bias=None if self.bias is None else self.bias[expert],
        )


@dataclass(frozen=True, kw_only=True)
class GPTQStack:
    """Weights of GPTQ in 2, 3, 4 or 8 bits: `(codes - zeros) * scales`, in groups of inputs; see `GPTQWeight`.

    Args:
        in_features: Inputs, a multiple of `32 / bits`, and in 3 bits of 32.
        out_features: Outputs, likewise.
        bits: Bits of a code.
        words: The codes of shape `(experts, in_features * bits / 32, out_features)`, int32.
        zeros: The zero points as they are (v2), of shape `(experts, groups, out_features * bits / 32)`, int32.
        scales: Scales of shape `(experts, groups, out_features)`, floating.
        groups: The group of each input, of shape `(experts, in_features)`, int32.
        group_size: Inputs of a group, if groups are consecutive and a word has one group, in all experts; else 0.
        zero_point: The zero point, if all are the same; otherwise -1.
        bias: Biases of shape `(experts, out_features)`, or None.
    """

    in_features: int
    out_features: int
    bits: int
    words: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor
    group_size: int
    zero_point: int
    bias: torch.Tensor | None = None

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return len(self.words)

    def weight(self, expert: int) -> GPTQWeight:
        """Return the weight of one expert."""
        return GPTQWeight(
            in_features=self.in_features,
            out_features=self.out_features,
            bits=self.bits,
            words=self.words[expert],
            zeros=self.zeros[expert],
            scales=self.scales[expert],
            groups=self.groups[expert],
            group_size=self.group_size,
            zero_point=self.zero_point,
            bias=None if self.bias is None else self.bias[expert],
        )


@dataclass(frozen=True, kw_only=True)
class Mxfp4Stack:
    """Weights in mxfp4: e2m1 values in blocks of 32 inputs with a scale that is a power of two.

    Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3.3 and 6.3.

    Args:
        in_features: Inputs, a multiple of 32.
        out_features: Outputs.
        words: The values of shape `(experts, out_features, in_features / 8)`, int32: bytes of two, the first in the
            lower half.
        scales: Exponents, biased by 127, of shape `(experts, out_features, in_features / 32)`, uint8.
        bias: Biases of shape `(experts, out_features)`, or None.
    """

    in_features: int
    out_features: int
    words: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return len(self.words)


Stack: TypeAlias = "FloatStack | FourBitStack | Int8Stack | GPTQStack | Mxfp4Stack"
