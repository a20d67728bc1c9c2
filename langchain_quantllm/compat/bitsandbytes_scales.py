"""bitsandbytes' 4-bit weights with scales of least error: other numbers in the same format.

bitsandbytes scales a block of weights by its largest magnitude. The codes of nf4 are no mirror image of each other, and
the largest weight of a block need not meet the last code: a scale that is a little smaller, or negative, leaves less of
an error in the sum over the block, about a fifth less over the weights of trained models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_FACTORS = (0.8, 0.9, 1.0, -0.8, -0.9, -1.0)
"""Scales that are tried first, as parts of a block's largest magnitude."""

_FIT_STEPS = 2


def refine_scales(weight: Any, plain: torch.Tensor) -> None:
    """Quantize a weight anew, each block with the scale that was found to have the least squared error.

    Args:
        weight: A 4-bit weight as bitsandbytes has quantized it, not yet repacked for a CPU; changed in place.
        plain: The weight before, of the same shape, on any device.

    Source: `quantize_4bit` and `QuantState` in bitsandbytes/functional.py.
    """
    import torch

    state = weight.quant_state
    if tuple(plain.shape) != tuple(state.shape):
        msg = f"the weight has the shape {tuple(state.shape)}, and the plain one {tuple(plain.shape)}"
        raise ValueError(msg)
    with torch.no_grad():
        flat = plain.detach().to(weight.device, torch.float32).reshape(-1)
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % state.blocksize)).reshape(-1, state.blocksize)
        codes = _Codes(state.code)
        scales = _hold(state, _fitted_scales(blocks, codes))
        ids = codes.nearest(blocks, scales).reshape(-1)[: flat.numel() + flat.numel() % 2]
        octets = weight.data.view(torch.uint8).reshape(-1)
        octets[: ids.numel() // 2] = (ids[0::2] << 4 | ids[1::2]).to(torch.uint8)


class _Codes:
    """The 16 values of a 4-bit type.

    Args:
        values: Of shape `(16,)`, by their ids.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values.float()
        ordered, self._ids = self._values.sort()
        self._middles = (ordered[1:] + ordered[:-1]) / 2
        self._ordered = ordered

    def nearest(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the id of the nearest value for each number; both arguments are of shape `(blocks, ...)`."""
        return self._ids[self._places(blocks, scales)]

    def rounded(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the nearest values, without their scales."""
        return self._ordered[self._places(blocks, scales)]

    def _places(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        import torch

        safe = torch.where(scales == 0, 1.0, scales)
        return torch.bucketize(blocks / safe[:, None], self._middles)


def _fitted_scales(blocks: torch.Tensor, codes: _Codes) -> torch.Tensor:
    """Find a scale for each block: the best of `_FACTORS`, then the least squares for the values that it rounds to."""
    import torch

    largest = blocks.abs().amax(dim=1)
    best, least = largest, torch.full_like(largest, float("inf"))
    for factor in _FACTORS:
        best, least = _better(blocks, codes, largest * factor, best, least)
    for _ in range(_FIT_STEPS):
        values = codes.rounded(blocks, best)
        fitted = (values * blocks).sum(1) / (values * values).sum(1).clamp_min(1e-12)
        best, least = _better(blocks, codes, fitted, best, least)
    return best


def _better(
    blocks: torch.Tensor, codes: _Codes, scales: torch.Tensor, best: torch.Tensor, least: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales of less error of two, and their squared errors."""
    import torch

    errors = (codes.rounded(blocks, scales) * scales[:, None] - blocks).square().sum(1)
    is_better = errors < least
    return torch.where(is_better, scales, best), torch.where(is_better, errors, least)


def _hold(state: Any, scales: torch.Tensor) -> torch.Tensor:
    """Put scales into a state, and return them as it holds them: rounded, where they are quantized themselves."""
    if state.state2 is None:
        state.absmax.copy_(scales)
        return scales
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    state.offset.copy_(scales.mean())
    state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=state.state2.blocksize)
    rounded: torch.Tensor = dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    return rounded
