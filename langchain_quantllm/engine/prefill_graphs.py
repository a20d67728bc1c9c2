"""Steps of prompts as CUDA graphs: one graph per length, shorter steps padded.

A short prompt costs the host more time than the device. Owns the lengths, the tensors that the graphs read, and when
a graph is captured. The forward itself is the model runner's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from langchain_quantllm.engine.cuda_graphs import StepGraph, WaitFinder
from langchain_quantllm.engine.staging import StagingBuffers
from langchain_quantllm.engine.step import PrefillChunk
from langchain_quantllm.kernels.reference import PREFILL_TILE

LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024)
"""Tokens of the graphs; longer steps keep the device busy while the host prepares the next."""

MOST_SEQUENCES = 16
"""Most sequences of a step that runs as a graph."""

_TILES = LENGTHS[-1] // PREFILL_TILE + MOST_SEQUENCES + 1
_USES = 2  # of a length before it is captured: capturing takes about as long as an eager step

PACK_SIZE = 3 * LENGTHS[-1] + MOST_SEQUENCES + 4 * _TILES
"""Integers that the longest graph reads."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """The inputs of a graph of one length, as int32 tensors that share one memory.

    Args:
        ids: Tokens behind each other, of shape `(length,)`.
        positions: Position of each in its sequence, of shape `(length,)`.
        slots: Row of the block table of each, of shape `(length,)`.
        kept: Indices of the tokens whose logits are wanted, of shape `(MOST_SEQUENCES,)`; unused entries are 0.
        tiles: Runs of tokens as the prefill kernel takes them, of shape `(tiles, 4)`; unused ones have
            no token.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    kept: torch.Tensor
    tiles: torch.Tensor

    @staticmethod
    def over(memory: torch.Tensor, length: int) -> Pack:
        """Divide memory of `PACK_SIZE` integers into the inputs of a graph."""
        lines = memory[: 3 * length].view(3, length)
        rest = memory[3 * LENGTHS[-1] :]
        count = length // PREFILL_TILE + MOST_SEQUENCES + 1
        return Pack(
            ids=lines[0],
            positions=lines[1],
            slots=lines[2],
            kept=rest[:MOST_SEQUENCES],
            tiles=rest[MOST_SEQUENCES : MOST_SEQUENCES + 4 * count].view(count, 4),
        )

    def fill(self, chunks: Sequence[PrefillChunk], padding_slot: int) -> None:
        """Write a step into the pack, which lies on the CPU.

        Padding is a sequence of its own: zeros at the beginning of a text, written to block 0.

        Args:
            chunks: The step, of no more tokens than the pack has.
            padding_slot: A row of the block table without blocks.
        """
        parts = [(chunk.sequence.slot, chunk.start, chunk.ids) for chunk in chunks]
        missing = len(self.ids) - sum(len(part) for _, _, part in parts)
        parts += [(padding_slot, 0, [0] * min(PREFILL_TILE, missing - at)) for at in range(0, missing, PREFILL_TILE)]
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        tiles: list[tuple[int, int, int, int]] = []
        for slot, position, part in parts:
            tiles += [
                (slot, len(ids) + at, position + at, min(PREFILL_TILE, len(part) - at))
                for at in range(0, len(part), PREFILL_TILE)
            ]
            ids += part
            positions += range(position, position + len(part))
            slots += [slot] * len(part)
        kept = last_tokens(chunks)
        kept += [0] * (MOST_SEQUENCES - len(kept))
        tiles += [(padding_slot, 0, 0, 0)] * (len(self.tiles) - len(tiles))
        for field, values in (
            (self.ids, ids),
            (self.positions, positions),
            (self.slots, slots),
            (self.kept, kept),
            (self.tiles, tiles),
        ):
            field.copy_(torch.tensor(values, dtype=torch.int32))


def last_tokens(chunks: Sequence[PrefillChunk], first: int = 0) -> list[int]:
    """List the indices, among packed tokens from `first` on, of those that a next token is sampled after."""
    kept, end = [], first
    for chunk in chunks:
        end += chunk.count
        if chunk.is_last:
            kept.append(end - 1)
    return kept


def length_for(chunks: Sequence[PrefillChunk]) -> int | None:
    """Choose the length of the graph for a step; None if there is none."""
    if len(chunks) > MOST_SEQUENCES:
        return None
    tokens = sum(chunk.count for chunk in chunks)
    return next((length for length in LENGTHS if length >= tokens), None)


class PrefillGraphs:
    """The prefill graphs of one model, each captured at the second use of its length."""

    def __init__(self, forward: Callable[[Pack], torch.Tensor], device: torch.device) -> None:
        """Allocate the inputs.

        Args:
            forward: Enqueues the forward of a pack and returns logits of shape `(MOST_SEQUENCES, vocab)`.
            device: The GPU.
        """
        self._forward = forward
        self._device = device
        self._memory = torch.zeros(PACK_SIZE, dtype=torch.int32, device=device)
        self._staging = StagingBuffers(PACK_SIZE)
        self._logits: torch.Tensor | None = None  # shared by all graphs, or each would hold its own
        self._graphs: dict[int, StepGraph] = {}
        self._uses: Counter[int] = Counter()
        self.no_graph_reason: str | None = None
        """What made a capture fail although nothing was known against it."""

    def clear(self) -> None:
        """Drop the graphs."""
        self._graphs.clear()

    def run(self, chunks: Sequence[PrefillChunk], padding_slot: int, pool: Any) -> torch.Tensor | None:
        """Run a step if there is a graph for it, or one can be captured.

        Args:
            chunks: The step.
            padding_slot: A row of the block table without blocks.
            pool: The graphs' memory pool.

        Returns:
            The logits after each chunk that is its prompt's last, of shape `(sequences, vocab)`; None if the step has
            to run eagerly.
        """
        length = None if self.no_graph_reason else length_for(chunks)
        if length is None:
            return None
        self._uses[length] += 1
        if self._uses[length] < _USES:
            return None
        staged = self._staging.next()
        Pack.over(staged, length).fill(chunks, padding_slot)
        self._memory.copy_(staged, non_blocking=True)
        self._staging.copied()
        if length in self._graphs:
            self._graphs[length].replay()
        elif not self._capture(length, pool):
            return None
        assert self._logits is not None
        return self._logits[: sum(chunk.is_last for chunk in chunks)].clone()  # the next step overwrites them

    def _capture(self, length: int, pool: Any) -> bool:
        """Run the step eagerly, and capture it for later steps."""
        pack = Pack.over(self._memory, length)

        def body() -> torch.Tensor:
            logits = self._forward(pack)
            if self._logits is None:
                self._logits = torch.empty_like(logits)
            return self._logits.copy_(logits)

        try:
            with WaitFinder() as finder:
                body()
            if finder.found is not None:
                self.no_graph_reason = f"{finder.found} makes the host wait"
                return False
            self._graphs[length] = StepGraph(body, self._device, pool)
        except RuntimeError as error:  # out of memory too: without graphs, a step can be divided
            self.no_graph_reason = f"capturing failed with {error!r}"
            return False
        return True
