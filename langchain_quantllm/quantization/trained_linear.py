"""A rounded linear layer in training: its scales, and where wanted its codes, follow the gradients of a loss.

A weight is `scale * round(place)`, and its place among the codes learns as if nothing was rounded. It begins where the
unquantized weight is, but within the code that the solver chose, so that the first weight is the one of the codes, and
those near the edge of two codes change first. Places move as soon as a layer's gradient is known, so that neither it
nor an optimizer's moments are kept: training codes takes four bytes for each weight.

Source: Bengio et al., https://arxiv.org/abs/1308.3432 (straight-through), and Cheng et al., Optimize weight rounding
via signed gradient descent, https://arxiv.org/abs/2309.05516 (steps of one size, which fall linearly).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from langchain_quantllm.quantization.packing import RoundedLinear

_EDGE = 0.49  # of a code, the furthest that a place begins at; above 0.5 the code would be another


class TrainedLinear(nn.Module):  # type: ignore[misc]  # torch is not followed
    """A layer whose scales are `scales * (1 + change)`, and whose codes are rounded places where they are trained too.

    Inside it, inputs are sorted by their groups: codes and places have the shape `(groups, group_size, out_features)`.
    """

    def __init__(
        self,
        rounded: RoundedLinear,
        *,
        bias: torch.Tensor | None,
        weight: torch.Tensor | None,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        """Start with a rounded layer.

        Args:
            rounded: The layer, on any device.
            bias: Its bias.
            weight: The unquantized weight of shape `(out_features, in_features)`; None leaves the codes as they are.
            product_dtype: In which products and those of gradients are computed; None takes that of the inputs.
        """
        super().__init__()
        self._rounded = rounded
        self.product_dtype = product_dtype
        self.step = 0.0
        """How far places move at the next backward pass, in codes; 0 leaves them."""
        self.change = nn.Parameter(torch.zeros(rounded.scales.shape, dtype=torch.float32))
        order = rounded.group_of.argsort(stable=True)
        is_sorted = bool((order.diff() == 1).all())
        zeros = rounded.zeros.float()
        centered = self._grouped(rounded.codes.float()[order]) - zeros.unsqueeze(1)
        self.register_buffer("order", None if is_sorted else order)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("scales", rounded.scales)
        self.register_buffer("least", -zeros.unsqueeze(1))
        self.register_buffer("places", None)
        self.register_buffer("centered", None)
        if weight is None:
            self.centered = centered.to(torch.int16 if rounded.bits == 8 else torch.int8)
        else:
            exact = self._grouped(weight.detach().t().float()[order]) / rounded.scales.float().unsqueeze(1)
            self.places = self._allowed(centered + (exact - centered).clamp_(-_EDGE, _EDGE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the outputs of inputs of shape `(..., in_features)`."""
        x = x if self.order is None else x[..., self.order]
        return _Product.apply(x, self.scales.float() * (1 + self.change), self)

    def codes(self) -> torch.Tensor:
        """Return the codes as they are now, less their zero points, of a shape as inside the layer."""
        return self.centered if self.places is None else self.places.round()

    def follow(self, of_weight: torch.Tensor) -> None:
        """Move the places against the gradient of the weights, float32 of their shape.

        Of one input, the squares of the moves have the mean `step**2`, however large its values are.
        """
        if self.places is None or not self.step:
            return
        moves = of_weight / of_weight.square().mean(-1, keepdim=True).sqrt_().clamp_(min=1e-30)
        self.places.copy_(self._allowed(moves.mul_(-self.step).add_(self.places)))

    def trained(self) -> dict[str, torch.Tensor]:
        """Return what the training changes, to be kept or set."""
        return {"change": self.change.detach(), **({} if self.places is None else {"places": self.places})}

    def rounded(self) -> RoundedLinear:
        """Return the layer as it is now, on the CPU."""
        codes = self._rounded.codes
        if self.places is not None:
            found = (self.codes() - self.least).to(torch.uint8).cpu().flatten(0, 1)
            codes = torch.empty_like(found)
            codes[slice(None) if self.order is None else self.order.cpu()] = found
        scales = self.scales.float() * (1 + self.change.detach())
        return replace(self._rounded, codes=codes).with_scales(scales.cpu())

    def _grouped(self, columns: torch.Tensor) -> torch.Tensor:
        return columns.reshape(len(self.change), -1, columns.shape[-1])

    def _allowed(self, places: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.maximum(places, self.least), self.least + (2**self._rounded.bits - 1))


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """The product with `codes * scales`; the dequantized weight is computed again for the gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scales: torch.Tensor, layer: TrainedLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        x = x.to(layer.product_dtype or x.dtype)
        ctx.save_for_backward(x, scales)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return nn.functional.linear(x, _dequantized(layer.codes(), scales, x.dtype).t(), bias).to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, scales = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        layer = ctx.layer
        codes = layer.codes()
        of_x = (grad @ _dequantized(codes, scales, x.dtype).t()).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        of_weight = (x.flatten(0, -2).t() @ grad.flatten(0, -2)).float().view(codes.shape)
        of_scales = (of_weight * codes).sum(1)
        layer.follow(of_weight)
        return of_x, of_scales, None


def _dequantized(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight of shape `(in_features, out_features)`, inputs sorted by their groups."""
    return (codes.to(dtype) * scales.to(dtype).unsqueeze(1)).flatten(0, 1)
