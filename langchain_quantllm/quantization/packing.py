"""Packed linear layers in AutoGPTQ's format (v1): codes, zero points and scales.

`qweight` is packed along the inputs, `qzeros` along the outputs and one too small; `scales` and `g_idx` are plain.

Source: AutoGPTQ 0.7.1, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py, `pack`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from langchain_quantllm.kernels.linear.bit_packing import pack_bits, unpack_bits

TENSORS = ("qweight", "qzeros", "scales", "g_idx")
"""Names of a packed layer's tensors."""


@dataclass(frozen=True, kw_only=True)
class RoundedLinear:
    """A linear layer whose weights are rounded to codes.

    Args:
        codes: uint8 of shape `(in_features, out_features)`, values below `2**bits`.
        zeros: uint8 of shape `(groups, out_features)`, the code of 0; at least 1, which v1 can store.
        scales: float16 of shape `(groups, out_features)`.
        g_idx: int32 of shape `(in_features,)`, the group of each input.
        bits: Bits of a code.
    """

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bits: int

    def dequantize(self) -> torch.Tensor:
        """Compute the float32 weight of shape `(out_features, in_features)`."""
        index = self.group_of
        return ((self.codes.float() - self.zeros.float()[index]) * self.scales.float()[index]).t().contiguous()

    def pack(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the layer in a checkpoint, on the CPU."""
        tensors = {
            "qweight": pack_bits(self.codes.t().contiguous(), self.bits).t(),
            "qzeros": pack_bits(self.zeros - 1, self.bits),
            "scales": self.scales,
            "g_idx": self.g_idx,
        }
        return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}

    @classmethod
    def unpack(cls, tensors: Mapping[str, torch.Tensor], bits: int) -> RoundedLinear:
        """Read a layer from its tensors; the reverse of `pack`."""
        return cls(
            codes=unpack_bits(tensors["qweight"].t().contiguous(), bits).t().contiguous(),
            zeros=unpack_bits(tensors["qzeros"], bits) + 1,
            scales=tensors["scales"],
            g_idx=tensors["g_idx"],
            bits=bits,
        )

    @property
    def group_of(self) -> torch.Tensor:
        """The group of each input, int64 of shape `(in_features,)`."""
        return self.g_idx.long()

    def with_scales(self, scales: torch.Tensor) -> RoundedLinear:
        """Return the layer with other scales, rounded to numbers that float16 and bfloat16 both hold."""
        return replace(self, scales=scales.bfloat16().half())

    def outputs(self, which: slice) -> RoundedLinear:
        """Return a part of the outputs."""
        return RoundedLinear(
            codes=self.codes[:, which],
            zeros=self.zeros[:, which],
            scales=self.scales[:, which],
            g_idx=self.g_idx.clone(),
            bits=self.bits,
        )
