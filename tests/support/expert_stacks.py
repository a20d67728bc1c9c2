"""Stacks of experts' weights in tests: in every format, quantized by the formats' own libraries."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from langchain_quantllm.kernels.experts.weights import (
    FloatStack,
    FourBitStack,
    GPTQStack,
    Int8Stack,
    Mxfp4Stack,
    Stack,
)
from langchain_quantllm.kernels.linear.weights import FourBitWeight, GPTQWeight, Int8Weight, Weight

_STACKS = {FourBitWeight: FourBitStack, Int8Weight: Int8Stack, GPTQWeight: GPTQStack}
_SHARED = ("code", "nested_code")


def stack_of(weights: list[Weight]) -> Stack:
    """Put the weights of all experts on top of each other."""
    first: Any = weights[0]
    kind: Any = _STACKS[type(first)]
    values: dict[str, Any] = {}
    for field in fields(kind):
        value = getattr(first, field.name)
        is_shared = field.name in _SHARED or (
            isinstance(first, FourBitWeight) and not first.nested and field.name in ("nested_scales", "offset")
        )
        if isinstance(value, torch.Tensor) and not is_shared:
            value = torch.stack([getattr(weight, field.name) for weight in weights])
        values[field.name] = value
    if isinstance(first, GPTQWeight):
        points = {weight.zero_point for weight in weights if isinstance(weight, GPTQWeight)}
        sizes = {weight.group_size for weight in weights if isinstance(weight, GPTQWeight)}
        values["zero_point"] = points.pop() if len(points) == 1 else -1
        values["group_size"] = sizes.pop() if len(sizes) == 1 else 0
    stack: Stack = kind(**values)
    return stack


def float_stack(experts: int, outputs: int, inputs: int, *, transposed: bool, made: torch.Generator) -> FloatStack:
    """Make random weights that are not quantized."""
    shape = (experts, inputs, outputs) if transposed else (experts, outputs, inputs)
    values = torch.randn(shape, generator=made) / inputs**0.5
    values = values.transpose(1, 2) if transposed else values
    return FloatStack(in_features=inputs, out_features=outputs, values=values)


def mxfp4_stack(experts: int, outputs: int, inputs: int, *, made: torch.Generator) -> Mxfp4Stack:
    """Make random weights in mxfp4."""
    octets = torch.randint(0, 256, (experts, outputs, inputs // 2), dtype=torch.uint8, generator=made)
    scales = torch.randint(121, 125, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=made)
    return Mxfp4Stack(in_features=inputs, out_features=outputs, words=octets.view(torch.int32), scales=scales)


def with_bias(stack: Stack, made: torch.Generator) -> Stack:
    """Give each expert random biases."""
    any_stack: Any = stack
    biased: Stack = replace(any_stack, bias=torch.randn(stack.experts, stack.out_features, generator=made))
    return biased


def moved(stack: Stack, device: str, dtype: torch.dtype) -> Stack:
    """Move a stack to a device, and its biases and numbers that are not quantized to a dtype."""
    any_stack: Any = stack
    values = {}
    for field in fields(any_stack):
        value = getattr(any_stack, field.name)
        if isinstance(value, torch.Tensor):
            changes = field.name in ("bias", "values")
            values[field.name] = value.to(device, dtype) if changes else value.to(device)
    found: Stack = replace(any_stack, **values)
    return found
