"""Shapes of models and random quantized weights, for the developers' benches."""

from __future__ import annotations

import time
from typing import Any

import torch

from langchain_quantllm.kernels.linear.bit_packing import pack_bits
from langchain_quantllm.kernels.linear.codebook import CODEBOOKS
from langchain_quantllm.kernels.linear.weights import FourBitWeight, GPTQWeight, Int8Weight, Weight

LINEAR_SHAPES = {
    "llama-2-7b": [(4096, (4096,) * 3), (4096, (4096,)), (4096, (11008,) * 2), (11008, (4096,))],
    "llama-3-8b": [(4096, (4096, 1024, 1024)), (4096, (14336,) * 2), (14336, (4096,))],
    "qwen2.5-1.5b": [(1536, (1536, 256, 256)), (1536, (1536,)), (1536, (8960,) * 2), (8960, (1536,))],
}
"""Inputs, and the outputs of the weights that are multiplied together: query, key and value; gate and up."""

ATTENTION_SHAPES = {"llama-2-7b": (32, 32, 128), "llama-3-8b": (32, 8, 128), "qwen2.5-1.5b": (12, 2, 128)}
"""Query heads, key heads, and the dimension of a head."""

_BITS = {"nf4": 4, "fp4": 4, "int8": 8, "gptq2": 2, "gptq3": 3, "gptq4": 4, "gptq8": 8}


def synchronized_s() -> float:
    """Wait for the GPU, and return the time in seconds."""
    torch.cuda.synchronize()
    return time.perf_counter()


def random_weight(kind: str, inputs: int, outputs: int) -> Weight:
    """Make a weight of random bits on the GPU, with scales of about the size that they have in models.

    Args:
        kind: "nf4", "fp4", "int8", or "gptq" with the bits; "-nested" or "-asymmetric" behind it.
        inputs: Inputs, a multiple of 128.
        outputs: Outputs.
    """
    format_, _, variant = kind.partition("-")
    size = inputs * outputs
    words = torch.randint(-(2**31), 2**31, (size * _BITS[format_] // 32,), dtype=torch.int64, device="cuda").int()
    common = {"in_features": inputs, "out_features": outputs, "bias": None}
    if format_ == "int8":
        return Int8Weight(words=words, scales=torch.rand(outputs, device="cuda") + 0.5, **common)
    if format_.startswith("gptq"):
        bits, groups = _BITS[format_], inputs // 128
        middle = 1 << bits - 1
        zeros = pack_bits(torch.full((groups, outputs), middle, dtype=torch.uint8, device="cuda"), bits)
        if variant:
            zeros = torch.randint(-(2**31), 2**31, zeros.shape, dtype=torch.int64, device="cuda").int()
        return GPTQWeight(
            bits=bits,
            words=words.view(inputs * bits // 32, outputs),
            zeros=zeros,
            scales=((torch.rand(groups, outputs, device="cuda") + 0.5) / (4 << bits)).half(),
            groups=torch.arange(inputs, dtype=torch.int32, device="cuda") // 128,
            group_size=128,
            zero_point=-1 if variant else middle,
            **common,
        )
    code = torch.tensor(CODEBOOKS[format_], device="cuda")
    blocks = size // 64
    nested: dict[str, Any] = {"nested_code": code, "nested_scales": code, "nested_block_size": 1, "offset": code}
    scales = torch.rand(blocks, device="cuda") / 16 + 0.01
    if variant:
        scales = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device="cuda")
        nested = {
            "nested_code": torch.linspace(-1, 1, 256, device="cuda"),
            "nested_scales": torch.rand(-(-blocks // 256), device="cuda") / 32,
            "nested_block_size": 256,
            "offset": torch.tensor(0.05, device="cuda"),
        }
    return FourBitWeight(
        kind=format_, words=words, code=code, scales=scales, block_size=64, nested=bool(variant), **nested, **common
    )
