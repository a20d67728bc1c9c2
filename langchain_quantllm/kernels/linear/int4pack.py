"""Weights of GPTQ in 4 bits as PyTorch's product on a CPU reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from langchain_quantllm.compat.gptqmodel import packed_tensors


@dataclass(frozen=True, kw_only=True)
class Int4PackWeight:
    """A weight of GPTQ in 4 bits that GPTQModel has packed for PyTorch's product on a CPU.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        words: The codes; see `compat.gptqmodel.PackedTensors`. The layer's own, as all tensors here.
        scales_and_zeros: Scales and offsets of shape `(groups, out_features, 2)`, bfloat16.
        group_size: Inputs of a group.
        order: The input that each packed one is, of shape `(in_features,)`; None if they are in order.
        bias: The layer's bias of shape `(out_features,)`, or None.
    """

    in_features: int
    out_features: int
    words: torch.Tensor
    scales_and_zeros: torch.Tensor
    group_size: int
    order: torch.Tensor | None
    bias: torch.Tensor | None

    @property
    def layout(self) -> tuple[Any, ...]:
        """What weights of one launch must have in common."""
        return (Int4PackWeight, self.in_features, self.group_size, self.words.device)


def int4_pack_weight(module: torch.nn.Module) -> Int4PackWeight | None:
    """Return the weight of a layer, without copying it; None if it is stored in another way."""
    packed = packed_tensors(module)
    if packed is None:
        return None
    in_features, bias = len(packed.order), getattr(module, "bias", None)
    is_in_order = bool((packed.order == torch.arange(in_features)).all())
    return Int4PackWeight(
        in_features=in_features,
        out_features=packed.scales_and_zeros.shape[1],
        words=packed.words,
        scales_and_zeros=packed.scales_and_zeros,
        group_size=packed.group_size,
        order=None if is_in_order else packed.order.long(),
        bias=bias.detach() if isinstance(bias, torch.Tensor) else None,
    )
