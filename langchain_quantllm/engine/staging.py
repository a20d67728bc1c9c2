"""Inputs of steps on their way to the device: their layout, pinned host buffers, and the forward that takes them."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import torch

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.sampler import BLOCKS
from langchain_quantllm.engine.sequence import SamplingInput, Sequence

LINES = 6
SLOT, POSITION, BLOCK_INDEX, BLOCK, UNIFORM, MAY_NOT_END = range(LINES)
"""Lines of a step's inputs; `BLOCK_INDEX` is the index of `BLOCK` among the sequence's blocks."""

LARGEST_UNIFORM = 1 - 2**-24  # below 1 in float32, too
_BUFFERS = 4


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
    uniforms = torch.tensor([min(one.uniform, LARGEST_UNIFORM) for one in sampling], dtype=torch.float32)
    lines[UNIFORM] = uniforms.view(torch.int32)
    return lines


class StagingBuffers:
    """Pinned int32 buffers of one shape, used in turn, so that copies to the GPU need not be waited for.

    The host may be many steps ahead of the GPU: steps of long prompts are not waited for. So a buffer's last copy is.
    """

    def __init__(self, *shape: int) -> None:
        """Allocate them; without a GPU there is nothing to pin them for, and copies are waited for."""
        self._is_pinned = torch.cuda.is_available()
        self._buffers = [torch.zeros(shape, dtype=torch.int32, pin_memory=self._is_pinned) for _ in range(_BUFFERS)]
        self._copies: list[torch.cuda.Event | None] = [None] * _BUFFERS
        self._used = 0

    def next(self) -> torch.Tensor:
        """Return the buffer whose turn it is, with old content, once its last copy has ended."""
        self._used = (self._used + 1) % _BUFFERS
        if (copy := self._copies[self._used]) is not None:
            copy.synchronize()
        return self._buffers[self._used]

    def copied(self) -> None:
        """Note that a copy of the buffer was enqueued on the current stream."""
        if not self._is_pinned:
            return
        event = self._copies[self._used] or torch.cuda.Event()
        event.record()
        self._copies[self._used] = event


@dataclass(frozen=True)
class PendingForward:
    """A forward in flight, with the sequences to sample a token for.

    Args:
        sequences: The sequences.
        sampling: The inputs of each one's sampling.
        logits: Their logits, of shape `(sequences, vocab)` or, padded, `(bucket, vocab)`.
        inputs: The step's inputs on the device; see `step_inputs`.
        is_graph: Whether it is a graph's replay, whose tensors the next replay overwrites.
        starting: Those of the sequences that get their first token since they have their slots.
        named_logits: Finer logits of all tokens that requests of these sequences report, in order of their ids, of
            shape `(sequences, tokens)`, float32; None where the model's own are as fine.
    """

    sequences: abc.Sequence[Sequence]
    sampling: abc.Sequence[SamplingInput]
    logits: torch.Tensor
    inputs: torch.Tensor
    is_graph: bool = False
    starting: abc.Sequence[Sequence] = ()
    named_logits: torch.Tensor | None = None

    @property
    def needs(self) -> int:
        """The flags of `sampler` for all sequences."""
        needs = BLOCKS * any(not one.may_end for one in self.sampling)
        for sequence in self.sequences:
            needs |= sequence.sampling_needs
        return needs
