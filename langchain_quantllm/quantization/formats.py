"""The formats of a checkpoint of rounded layers: GPTQ's, with codes of any kind, and AWQ's "gemm".

Both hold codes, zero points and scales. They differ in the order of codes in a word, and in how their configs name the
layers that stay unquantized. While blocks are quantized, and in the journal, layers are packed as in `packing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from langchain_quantllm.compat.transformers_saving import saved_tensors
from langchain_quantllm.kernels.linear.bit_packing import pack_awq, unpack_awq
from langchain_quantllm.quantization.layer_bits import LayerBits
from langchain_quantllm.quantization.packing import RoundedLinear
from langchain_quantllm.quantization.solver import Rounding
from langchain_quantllm.schemes import AWQ, GPTQ

__all__ = ["AWQFormat", "GPTQFormat", "format_of_scheme", "rounding_of"]

_KNOWN_BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")
"""Names of blocks that transformers finds by itself. Source: BLOCK_PATTERNS in optimum/gptq/constants.py."""


class GPTQFormat:
    """AutoGPTQ's format, v1."""

    tensors = ("qweight", "qzeros", "scales", "g_idx")

    def written(self, packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of a layer in the checkpoint."""
        return packed

    def read(self, tensors: Mapping[str, torch.Tensor], bits: int) -> RoundedLinear:
        """Read a layer of the checkpoint."""
        return RoundedLinear.unpack(tensors, bits)

    def first_outputs(self, name: str, tensor: torch.Tensor, count: int, bits: int) -> torch.Tensor:
        """Take the part of a layer's tensor that is of the first outputs, whose codes fill whole words."""
        words = count * bits // 32
        return tensor if name == "g_idx" else tensor[:, : words if name == "qzeros" else count].contiguous()

    def config(
        self, model: Any, prefix: str, rounding: Rounding, bits: LayerBits, quantized: Iterable[str] | None
    ) -> dict[str, Any]:
        """Return the format's part of the `quantization_config`.

        Args:
            model: The model with its packed layers.
            prefix: Name of its list of blocks.
            rounding: How the layers were rounded, but for their bits.
            bits: Their bits.
            quantized: Names inside a block of the layers that are quantized, if any linear layer is not; else None.
        """
        return {
            "quant_method": "gptq",
            **bits.config(prefix),
            "group_size": rounding.group_size,
            "sym": rounding.sym,
            "desc_act": rounding.desc_act,
            "checkpoint_format": "gptq",
            "damp_percent": rounding.damping,
            "true_sequential": True,
            "lm_head": False,
            **({} if quantized is None else {"modules_in_block_to_quantize": [sorted(quantized)]}),
            **({} if prefix in _KNOWN_BLOCKS else {"block_name_to_quantize": prefix}),
        }


class AWQFormat:
    """AutoAWQ's format "gemm": words along the outputs, zero points as they are.

    Source: awq/modules/linear/gemm.py of AutoAWQ.
    """

    tensors = ("qweight", "qzeros", "scales")

    def written(self, packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of a layer in the checkpoint."""
        rounded = RoundedLinear.unpack(packed, 4)
        return {"qweight": pack_awq(rounded.codes), "qzeros": pack_awq(rounded.zeros), "scales": rounded.scales}

    def read(self, tensors: Mapping[str, torch.Tensor], bits: int) -> RoundedLinear:
        """Read a layer of the checkpoint."""
        codes, groups = unpack_awq(tensors["qweight"]), len(tensors["scales"])
        index = torch.arange(len(codes), dtype=torch.int32, device=codes.device) // -(-len(codes) // groups)
        zeros, scales = unpack_awq(tensors["qzeros"]), tensors["scales"]
        return RoundedLinear(codes=codes, zeros=zeros, scales=scales, g_idx=index, bits=bits)

    def first_outputs(self, name: str, tensor: torch.Tensor, count: int, bits: int) -> torch.Tensor:
        """Take the part of a layer's tensor that is of the first outputs, whose codes fill whole words."""
        return tensor[:, : count if name == "scales" else count * bits // 32].contiguous()

    def config(
        self, model: Any, prefix: str, rounding: Rounding, bits: LayerBits, quantized: Iterable[str] | None
    ) -> dict[str, Any]:
        """Return the format's part of the `quantization_config`; see `GPTQFormat.config`.

        Every matrix of a block that is unquantized is named in full, routers with it: some loaders look for these names
        in a layer's name, others compare their ends.
        """
        kept = [name for name, tensor in saved_tensors(model).items() if name.endswith(".weight") and tensor.ndim == 2]
        kept = [name.removesuffix(".weight") for name in kept if name.startswith(f"{prefix}.")]
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": rounding.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [*kept, "lm_head"] if kept else None,
        }


def format_of_scheme(scheme: GPTQ | AWQ) -> GPTQFormat | AWQFormat:
    """Return the format that a scheme's checkpoints are written in."""
    return AWQFormat() if isinstance(scheme, AWQ) else GPTQFormat()


def rounding_of(scheme: GPTQ | AWQ, damping: float) -> Rounding:
    """Return the options of the solver for a scheme with bits and a group size; its bits are those that are known."""
    assert scheme.group_size is not None
    sym, desc_act = (scheme.sym, scheme.desc_act) if isinstance(scheme, GPTQ) else (False, False)
    return Rounding(
        bits=scheme.layer_bits[0],
        group_size=scheme.group_size,
        sym=bool(sym),
        desc_act=bool(desc_act),
        damping=damping,
    )
