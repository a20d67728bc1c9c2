"""Products with quantized weights as they are stored, in the place of what the library that made them computes.

Owns the step of one linear layer, and that of several layers of one input. How a product is computed is the kernels'
business, and whether it gives what the layer gives `product_checks`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from langchain_quantllm.kernels.weights import FourBitWeight, Int8Weight, Weight

_MOST_FOUR_BIT_ROWS = 64
"""Rows above which bitsandbytes' own way, to dequantize a matrix once, is the faster one."""


@dataclass(frozen=True, kw_only=True)
class ProductStep:
    """A linear layer over a quantized weight.

    Args:
        kernels: `kernels.weight_only` or `kernels.weight_reference`.
        weight: The layer's weight.
    """

    kernels: Any
    weight: Weight

    @property
    def is_exact(self) -> bool:
        """Whether it leaves out a rounding that the layer makes, and so differs from it."""
        return isinstance(self.weight, Int8Weight)

    @property
    def is_whole(self) -> bool:
        """Whether the layer itself is never called."""
        return not isinstance(self.weight, FourBitWeight)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether it is the step that multiplies activations of shape `(..., in_features)`, rather than the layer."""
        return self.is_whole or x.numel() <= _MOST_FOUR_BIT_ROWS * x.shape[-1]

    def run(
        self, module: Any, forward: Callable[..., Any], carried: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Multiply; see `fused_layers.Step.run`."""
        del module, carried
        if len(args) != 1 or kwargs or not self.takes(args[0]):
            return forward(*args, **kwargs)
        return self.kernels.product(args[0], self.weight, self.weight.bias).to(args[0].dtype)


def project(steps: Sequence[ProductStep | None], modules: Sequence[Any], x: torch.Tensor) -> list[torch.Tensor]:
    """Give what several layers make of one input: in one product, if all of them have a step that takes it.

    Args:
        steps: The step of each layer, or None.
        modules: The layers.
        x: Activations of shape `(..., in_features)`.
    """
    taken = [step for step in steps if step is not None and step.takes(x)]
    if len(taken) < len(modules):
        return [module(x) for module in modules]
    found = taken[0].kernels.products_of_one_input(x, [step.weight for step in taken])
    return [one.to(x.dtype) for one in found]
