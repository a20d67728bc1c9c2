"""Linear layers, multiplied by the kernels of this package: with quantized weights, and others for few rows.

A step is compared with its layer on a recorded call. Layers with the same input (query, key and value; gate and up) are
multiplied together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from langchain_quantllm.compat.bitsandbytes import is_quantized
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.fusion.recorded_call import TOLERANCES, RecordedCall, check_same, output_of
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.linear import reference
from langchain_quantllm.kernels.linear.weights import (
    FloatWeight,
    FourBitWeight,
    GPTQWeight,
    Int8Weight,
    RepackedWeight,
    Weight,
    float_weight_of,
    weight_of,
)

_INT8_TOLERANCE = 0.1
"""Largest relative difference from LLM.int8(), which rounds activations to 8 bits where the step does not."""

_CHECKED_OUTPUTS = 512
"""Outputs of an int8 layer that are compared with its dequantized weight."""


@dataclass(frozen=True, kw_only=True)
class LinearStep:
    """A linear layer.

    Args:
        kernels: `kernels.linear.dispatch`, `.reference` or `.cpu`.
        weight: The layer's weight.
        group: Ids and weights of the layers with the same input, this one included; empty if there are no others, or
            not of the same layout.
    """

    kernels: Any
    weight: Weight
    group: tuple[tuple[int, Weight], ...] = ()

    @property
    def skips_rounding(self) -> bool:
        """Whether the step is more precise than the layer, which rounds activations."""
        return isinstance(self.weight, Int8Weight)

    @property
    def replaces_layer(self) -> bool:
        """Whether the layer itself is never called."""
        return math.isinf(self._most_rows)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether the step multiplies activations of shape `(..., in_features)`; the layer multiplies others."""
        return bool(x.numel() <= self._most_rows * x.shape[-1])

    @property
    def _most_rows(self) -> float:
        if isinstance(self.weight, FloatWeight):
            return float(self.kernels.MOST_FLOAT_ROWS)
        return float(self.kernels.MOST_FOUR_BIT_ROWS) if isinstance(self.weight, FourBitWeight) else math.inf

    def run(
        self,
        module: Any,
        forward: Callable[..., Any],
        context: ForwardContext,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Multiply; see `patterns.Step.run`."""
        if len(args) != 1 or kwargs or not self.takes(args[0]):
            return forward(*args, **kwargs)
        x = args[0]
        if not self.group:
            return self.kernels.quantized_linear(x, self.weight, self.weight.bias).to(x.dtype)
        output = context.projected.take(x, id(module))
        if output is None:
            outputs = self.kernels.grouped_linear(x, [weight for _, weight in self.group])
            others = {key: out.to(x.dtype) for (key, _), out in zip(self.group, outputs, strict=True)}
            output = others.pop(id(module))
            context.projected.put(x, others)
        return output


def is_quantized_linear(module: Any) -> bool:
    """Whether a module may be a linear layer over a quantized weight of its own; a layer of peft has another's."""
    own = {**module._buffers, **module._parameters}
    return is_quantized(own.get("weight")) or isinstance(own.get("qweight"), torch.Tensor)


def is_float_linear(module: Any, kernels: Any) -> bool:
    """Whether a module is a linear layer that is not quantized, and `kernels` multiply by its weight."""
    return hasattr(kernels, "MOST_FLOAT_ROWS") and float_weight_of(module) is not None


def linear_step(call: RecordedCall, kernels: Any) -> LinearStep:
    """Make the step of a linear layer, and compare it on all tokens of a call and on a single one.

    Raises:
        UnsupportedError: If the weight is stored in another way, or the step gives something else.
    """
    expected, weight = output_of(call), weight_of(call.module) or float_weight_of(call.module)
    if weight is None:
        msg = "its weight is stored in a way that has no kernel"
        raise UnsupportedError(msg)
    step = LinearStep(kernels=kernels, weight=weight)
    [x] = call.args
    if isinstance(weight, FloatWeight):  # the layer itself multiplies more rows
        most = kernels.MOST_FLOAT_ROWS
        x, expected = x[..., :most, :], expected[..., :most, :]
        check_same(kernels.quantized_linear(x, weight, weight.bias).to(x.dtype), expected)
        check_same(kernels.quantized_linear(x[..., :1, :], weight, weight.bias).to(x.dtype), expected[..., :1, :])
        return step
    output, single = call.run(step), kernels.quantized_linear(x[..., :1, :], weight, weight.bias).to(x.dtype)
    if isinstance(weight, Int8Weight):
        check_same(output, expected, tolerance=_INT8_TOLERANCE)
        first = _first_outputs(weight, min(_CHECKED_OUTPUTS, weight.out_features))
        output, single = output[..., : first.out_features], single[..., : first.out_features]
        expected = reference.quantized_linear(x, first, first.bias, dtype=torch.float32).to(x.dtype)
    # GPTQModel rounds dequantized weights to float16, also in a model of float32.
    rounds = expected.dtype == torch.float32 and isinstance(weight, GPTQWeight)
    tolerance = TOLERANCES[torch.float16] if rounds else None
    check_same(output, expected, tolerance)
    check_same(single, expected[..., :1, :], tolerance)
    return step


def _first_outputs(weight: Int8Weight, outputs: int) -> Int8Weight:
    words = weight.words[: outputs * weight.in_features // 4]
    bias = None if weight.bias is None else weight.bias[:outputs]
    return replace(weight, out_features=outputs, words=words, scales=weight.scales[:outputs], bias=bias)


def group_shared_input(steps: dict[int, LinearStep], calls: Mapping[int, RecordedCall]) -> dict[int, LinearStep]:
    """Group the steps of layers that were called with the same tensor.

    Args:
        steps: Steps by their layers' ids. Changed in place.
        calls: Recorded calls of one forward, by the layers' ids.

    Returns:
        The same dictionary.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for key, step in steps.items():
        groups.setdefault((id(calls[key].originals[0]), step.weight.layout), []).append(key)
    for keys in groups.values():
        weights: Sequence[Weight] = [steps[key].weight for key in keys]
        if len({weight.words.data_ptr() for weight in weights}) < max(2, len(keys)):
            continue  # a single layer, or one layer twice
        share_memory = getattr(steps[keys[0]].kernels, "share_memory", None)
        if share_memory is not None and all(isinstance(weight, RepackedWeight) for weight in weights):
            modules = [calls[key].module for key in keys]
            weights = share_memory(modules, cast("list[RepackedWeight]", weights))
        group = tuple(zip(keys, weights, strict=True))
        for key, weight in group:  # in place, to free the memory that `share_memory` has copied
            steps[key] = replace(steps[key], weight=weight, group=group)
    return steps
