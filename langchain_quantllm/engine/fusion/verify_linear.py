"""Whether the product with a quantized weight gives what its linear layer gives: found out on a call that it answered.

Owns which layers are tried, and what LLM.int8() may differ by. The comparison is `fusion_checks`'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from langchain_quantllm.compat.bitsandbytes import is_quantized
from langchain_quantllm.engine.fusion.linear import ProductStep
from langchain_quantllm.engine.fusion.verify import TOLERANCES, Call, check_same, output_of
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.linear import reference as linear_reference
from langchain_quantllm.kernels.linear.weights import GPTQWeight, Int8Weight, weight_of

_INT8_TOLERANCE = 0.1
"""What LLM.int8() may be off by: it rounds activations to 8 bits, which the step does not."""

_CHECKED_OUTPUTS = 512
"""Outputs of a layer in int8 that are compared with its dequantized weight."""


def is_product(module: Any) -> bool:
    """Whether a module may be a linear layer over a quantized weight of its own; peft's layers have that of another."""
    own = {**module._buffers, **module._parameters}
    return is_quantized(own.get("weight")) or isinstance(own.get("qweight"), torch.Tensor)


def product_step(call: Call, kernels: Any) -> ProductStep:
    """Find the step of a linear layer, and compare it on all tokens of a call and on one by itself.

    Raises:
        UnsupportedError: If the weight is stored in another way, or the step gives something else.
    """
    expected, weight = output_of(call), weight_of(call.module)
    if weight is None:
        msg = "its weight is stored in a way that has no kernel"
        raise UnsupportedError(msg)
    step = ProductStep(kernels=kernels, weight=weight)
    [x] = call.args
    found, single = call.run(step), step.kernels.quantized_linear(x[..., :1, :], weight, weight.bias).to(x.dtype)
    if isinstance(weight, Int8Weight):
        check_same(found, expected, tolerance=_INT8_TOLERANCE)
        outputs = min(_CHECKED_OUTPUTS, weight.out_features)
        bias = None if weight.bias is None else weight.bias[:outputs]
        expected = linear_reference.quantized_linear(x, _first_outputs(weight, outputs), bias, dtype=torch.float32).to(
            x.dtype
        )
        found, single = found[..., :outputs], single[..., :outputs]
    # GPTQModel rounds dequantized weights to float16, in a model of float32 too.
    tolerance = (
        TOLERANCES[torch.float16] if expected.dtype == torch.float32 and isinstance(weight, GPTQWeight) else None
    )
    check_same(found, expected, tolerance)
    check_same(single, expected[..., :1, :], tolerance)
    return step


def _first_outputs(weight: Int8Weight, outputs: int) -> Int8Weight:
    words = weight.words[: outputs * weight.in_features // 4]
    return replace(weight, out_features=outputs, words=words, scales=weight.scales[:outputs], bias=None)
