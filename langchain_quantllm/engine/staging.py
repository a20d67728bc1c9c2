"""Inputs of steps on their way to the device: their layout, and pinned host buffers."""

from __future__ import annotations

from collections import abc

import torch

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.sequence import SamplingInput, Sequence

LINES = 6
SLOT, POSITION, BLOCK_INDEX, BLOCK, UNIFORM, MAY_NOT_END = range(LINES)
"""Lines of a step's inputs; `BLOCK_INDEX` is the index of `BLOCK` among the sequence's blocks."""

_LARGEST_UNIFORM = 1 - 2**-24  # below 1 in float32, too
_BUFFERS = 4  # more than there are steps in flight: a copy has ended before its buffer is filled again


def step_inputs(
    sequences: abc.Sequence[Sequence],
    positions: abc.Sequence[int],
    blocks: abc.Sequence[int],
    sampling: abc.Sequence[SamplingInput],
) -> torch.Tensor:
    """Lay out the inputs of a step.

    Args:
        sequences: The sequences.
        positions: Position of each one's token.
        blocks: The block that it is written to.
        sampling: The inputs of each one's sampling.

    Returns:
        A tensor of shape `(LINES, sequences)`, int32, on the CPU; the line `UNIFORM` holds the bits of float32.
    """
    lines = torch.tensor(
        [
            [sequence.slot for sequence in sequences],
            list(positions),
            [position // BLOCK_TOKENS for position in positions],
            list(blocks),
            [0] * len(sequences),
            [not one.may_end for one in sampling],
        ],
        dtype=torch.int32,
    )
    uniforms = torch.tensor([min(one.uniform, _LARGEST_UNIFORM) for one in sampling], dtype=torch.float32)
    lines[UNIFORM] = uniforms.view(torch.int32)
    return lines


class StagingBuffers:
    """Pinned int32 buffers of one shape, used in turn, so that copies to the GPU need not be waited for."""

    def __init__(self, *shape: int) -> None:
        """Allocate them."""
        self._buffers = [torch.zeros(shape, dtype=torch.int32, pin_memory=True) for _ in range(_BUFFERS)]
        self._used = 0

    def next(self) -> torch.Tensor:
        """Return the buffer whose turn it is, with old content."""
        self._used += 1
        return self._buffers[self._used % _BUFFERS]
