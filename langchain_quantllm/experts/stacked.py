"""The quantized weights of one projection of all experts, as a module in a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from langchain_quantllm.kernels.experts import reference
from langchain_quantllm.kernels.experts.weights import FloatStack, Stack


class StackedLinear(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
    """A linear layer for each expert, all of one shape and format.

    The tensors of its stack are its buffers, so that they move with the model and are counted with it.
    """

    def __init__(self, stack: Stack) -> None:
        """Hold a stack, whose tensors are not copied."""
        super().__init__()
        tensors = _tensors(stack)
        bare: Any = stack
        self._bare: Any = replace(bare, **dict.fromkeys(tensors))
        for name, value in tensors.items():
            self.register_buffer(name, value)

    @property
    def in_features(self) -> int:
        """Inputs of each expert."""
        return int(self._bare.in_features)

    @property
    def out_features(self) -> int:
        """Outputs of each expert."""
        return int(self._bare.out_features)

    @property
    def stack(self) -> Stack:
        """The weights as the kernels read them."""
        stack: Stack = replace(self._bare, **{name: getattr(self, name) for name in self._buffers})
        return stack

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StackedLinear:
        """Apply a function of `to`, `cuda` or `half` to the tensors; quantized weights and scales keep theirs."""
        stays = type(self._bare) is not FloatStack

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if not stays or moved.dtype == tensor.dtype or tensor is self.bias:
                return moved
            return tensor.to(moved.device)

        super()._apply(apply, recurse)
        return self

    def dequantize(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight of one expert, of shape `(out_features, in_features)`."""
        return reference.dequantize(self.stack, expert, dtype)

    def product(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """Multiply rows of shape `(rows, in_features)` by the weight of one expert, and add its bias."""
        stack = self.stack
        bias = None if stack.bias is None else stack.bias[expert].to(x.dtype)
        weight = reference.dequantize(stack, expert, torch.float32)  # 16 bits would round code and scale each
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        """Describe the layer in its model's text."""
        kind = type(self._bare).__name__.removesuffix("Stack")
        return f"in_features={self.in_features}, out_features={self.out_features}, format={kind}"


def _tensors(stack: Stack) -> dict[str, Any]:
    values = {field.name: getattr(stack, field.name) for field in fields(stack)}
    return {name: value for name, value in values.items() if value is None or isinstance(value, torch.Tensor)}
