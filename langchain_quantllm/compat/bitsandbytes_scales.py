"""bitsandbytes' 4-bit weights with scales of least error: other numbers in the same format.

bitsandbytes scales a block of weights by its largest magnitude. The codes of nf4 are no mirror image of each other, and
the largest weight of a block need not meet the last code: a scale that is a little smaller, or negative, leaves less of
an error in the sum over the block, about a fifth less over the weights of trained models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_FACTORS = (0.9, 1.0, -0.9, -1.0)
"""Scales by which codes are tried first, as parts of a block's largest magnitude."""

_CHUNK_BLOCKS = 4096  # at once: what a core's cache holds
_PLACES, _REACH = 1024, 1.28  # of the table of codes: how many, and the largest weight in it, in scales


def refine_scales(weight: Any, plain: torch.Tensor) -> None:
    """Quantize a weight anew, each block with the scale that was found to have the least squared error.

    Args:
        weight: A 4-bit weight as bitsandbytes has quantized it, not yet repacked for a CPU; changed in place.
        plain: The weight before, of the same shape, on any device.

    Source: `quantize_4bit` and `QuantState` in bitsandbytes/functional.py.
    """
    refine_state(weight.data, weight.quant_state, plain)


def refine_state(packed: torch.Tensor, state: Any, plain: torch.Tensor) -> None:
    """Do what `refine_scales` does to the results of bitsandbytes' `quantize_4bit`."""
    import torch

    if tuple(plain.shape) != tuple(state.shape):
        msg = f"the weight has the shape {tuple(state.shape)}, and the plain one {tuple(plain.shape)}"
        raise ValueError(msg)
    with torch.no_grad():
        flat = plain.detach().reshape(-1)
        codes = _Codes(state.code)
        fitted = [_fitted_scales(blocks, codes) for blocks in _chunks(flat, state.blocksize, packed.device)]
        scales = _hold(state, torch.cat(fitted))
        octets = packed.view(torch.uint8).reshape(-1)
        at = 0
        parts = scales.split(_CHUNK_BLOCKS)
        for blocks, part in zip(_chunks(flat, state.blocksize, packed.device), parts, strict=True):
            ids = codes.ids(blocks, part).reshape(-1)[: 2 * (len(octets) - at)]
            octets[at : at + len(ids) // 2] = ids[0::2] << 4 | ids[1::2]
            at += len(ids) // 2


def _chunks(flat: torch.Tensor, size: int, device: Any) -> Iterator[torch.Tensor]:
    """Yield some blocks of weights after the other, float32 of shape `(blocks, size)`; the last is filled up."""
    import torch

    for part in flat.split(_CHUNK_BLOCKS * size):
        padded = torch.nn.functional.pad(part.to(device, torch.float32), (0, -len(part) % size))
        yield padded.reshape(-1, size)


class _Codes:
    """The 16 values of a 4-bit type, and a table of the nearest one of weights divided by their scale.

    The table has a place for each 400th of a scale, so that a weight between two codes may get the one that is
    farther by as much.

    Args:
        values: Of shape `(16,)`, by their ids.
    """

    def __init__(self, values: torch.Tensor) -> None:
        import torch

        ordered, ids = values.float().sort()
        middles = (ordered[1:] + ordered[:-1]) / 2
        places = torch.arange(_PLACES, device=values.device) - _PLACES // 2
        nearest = torch.bucketize(places * (2 * _REACH / _PLACES), middles)
        self._values = ordered[nearest]
        self._ids = ids[nearest].to(torch.uint8)

    def ids(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the id of the nearest value for each number of blocks `(blocks, size)`, uint8."""
        return self._ids.index_select(0, self._places(blocks, scales)).view(blocks.shape)

    def rounded(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the nearest values, without their scales."""
        return self._values.index_select(0, self._places(blocks, scales)).view(blocks.shape)

    def _places(self, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        import torch

        factors = _PLACES / (2 * _REACH) / torch.where(scales == 0, 1.0, scales)
        places = (blocks * factors[:, None]).add_(_PLACES / 2 + 0.5).to(torch.int32)
        return places.clamp_(0, _PLACES - 1).view(-1)


def _fitted_scales(blocks: torch.Tensor, codes: _Codes) -> torch.Tensor:
    """Find a scale for each block: codes by several scales, and of these the ones with the best least-squares scale."""
    import torch

    largest = blocks.abs().amax(dim=1)
    best, most = largest, torch.full_like(largest, -1.0)
    for factor in (*_FACTORS, None):
        values = codes.rounded(blocks, best if factor is None else largest * factor)
        product, square = (values * blocks).sum(1), (values * values).sum(1).clamp_min(1e-12)
        # The squared error that is left is the sum of the squared weights, less this.
        explained = product * product / square
        is_better = explained > most
        best = torch.where(is_better, product / square, best)
        most = torch.where(is_better, explained, most)
    return best


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
