"""Steps with chunks of prompts as CUDA graphs: one graph per length and number of sequences, smaller steps padded.

A short prompt costs the host more time than the device. Owns the lengths, the tensors that the graphs read, and when
a graph is captured. The forward itself is the model runner's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from langchain_quantllm.engine.cuda_graphs import StepGraph, WaitFinder
from langchain_quantllm.engine.scheduler import Step
from langchain_quantllm.engine.staging import StagingBuffers
from langchain_quantllm.kernels.reference import PREFILL_TILE

LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024)
"""Tokens of the graphs; longer steps keep the device busy while the host prepares the next."""

SEQUENCES = (16, 48, 144)
"""Sequences of the graphs, decoding ones included."""

ON_DEVICE = -1
"""Stands for the last token of a decoding sequence, which lies on the device."""

_USES = 2  # of a size before it is captured: capturing takes about as long as an eager step


class Size(NamedTuple):
    """The most tokens and sequences of a graph."""

    tokens: int
    sequences: int

    @property
    def tiles(self) -> int:
        """Most runs of tokens that the prefill kernel takes."""
        return self.tokens // PREFILL_TILE + self.sequences + 1

    @property
    def integers(self) -> int:
        """Integers that the graph reads."""
        return 3 * self.tokens + self.sequences + 4 * self.tiles


LARGEST = Size(LENGTHS[-1], SEQUENCES[-1])
"""The largest graph."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """The inputs of a graph, as int32 tensors that share one memory.

    Args:
        ids: Tokens behind each other, of shape `(tokens,)`, or `ON_DEVICE`.
        positions: Position of each in its sequence, of shape `(tokens,)`.
        slots: Row of the block table of each, of shape `(tokens,)`.
        kept: Indices of the tokens whose logits are wanted, of shape `(sequences,)`; unused entries are 0.
        tiles: Runs of tokens as the prefill kernel takes them, of shape `(tiles, 4)`; unused ones have
            no token.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    kept: torch.Tensor
    tiles: torch.Tensor

    @staticmethod
    def over(memory: torch.Tensor, size: Size) -> Pack:
        """Divide memory of at least `size.integers` integers into the inputs of a graph."""
        lines, kept, tiles = memory[: size.integers].split([3 * size.tokens, size.sequences, 4 * size.tiles])
        ids, positions, slots = lines.view(3, size.tokens)
        return Pack(ids=ids, positions=positions, slots=slots, kept=kept, tiles=tiles.view(size.tiles, 4))

    def fill(self, step: Step, padding_slot: int) -> None:
        """Write a step into the pack, which lies on the CPU.

        Padding is a sequence of its own: zeros at the beginning of a text, written to block 0.

        Args:
            step: The step, of no more tokens and sequences than the pack has.
            padding_slot: A row of the block table without blocks.
        """
        parts = [(s.slot, at, [ON_DEVICE]) for s, at in zip(step.decoding, step.positions, strict=True)]
        parts += [(chunk.sequence.slot, chunk.start, chunk.ids) for chunk in step.chunks]
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
        kept = sampled_tokens(step)
        kept += [0] * (len(self.kept) - len(kept))
        tiles += [(padding_slot, 0, 0, 0)] * (len(self.tiles) - len(tiles))
        for field, values in (
            (self.ids, ids),
            (self.positions, positions),
            (self.slots, slots),
            (self.kept, kept),
            (self.tiles, tiles),
        ):
            field.copy_(torch.tensor(values, dtype=torch.int32))


def sampled_tokens(step: Step) -> list[int]:
    """List the indices, among the packed tokens, of those that a next token is sampled after."""
    kept, end = list(range(len(step.decoding))), len(step.decoding)
    for chunk in step.chunks:
        end += chunk.count
        if chunk.is_last:
            kept.append(end - 1)
    return kept


def size_for(step: Step) -> Size | None:
    """Choose the graph for a step; None if there is none."""
    tokens = len(step.decoding) + sum(chunk.count for chunk in step.chunks)
    sequences = len(step.decoding) + len(step.chunks)
    length = next((length for length in LENGTHS if length >= tokens), None)
    rows = next((rows for rows in SEQUENCES if rows >= sequences), None)
    return None if length is None or rows is None else Size(length, rows)


class PrefillGraphs:
    """The prefill graphs of one model, each captured at the second use of its size."""

    def __init__(self, forward: Callable[[Pack], torch.Tensor], device: torch.device) -> None:
        """Allocate the inputs.

        Args:
            forward: Enqueues the forward of a pack and returns logits of shape `(sequences, vocab)`.
            device: The GPU.
        """
        self._forward = forward
        self._device = device
        self._memory = torch.zeros(LARGEST.integers, dtype=torch.int32, device=device)
        self._staging = StagingBuffers(LARGEST.integers)
        self._logits: dict[int, torch.Tensor] = {}  # shared by the graphs of as many sequences
        self._graphs: dict[Size, StepGraph] = {}
        self._uses: Counter[Size] = Counter()
        self.no_graph_reason: str | None = None
        """What made a capture fail although nothing was known against it."""

    def clear(self) -> None:
        """Drop the graphs."""
        self._graphs.clear()

    def run(self, step: Step, padding_slot: int, pool: Any) -> torch.Tensor | None:
        """Run a step if there is a graph for it, or one can be captured.

        Args:
            step: The step.
            padding_slot: A row of the block table without blocks.
            pool: The graphs' memory pool.

        Returns:
            The logits of the sequences that a token is sampled for, of shape `(sequences, vocab)`; None if the step
            has to run eagerly.
        """
        size = None if self.no_graph_reason else size_for(step)
        if size is None:
            return None
        self._uses[size] += 1
        if self._uses[size] < _USES:
            return None
        staged = self._staging.next()
        Pack.over(staged, size).fill(step, padding_slot)
        self._memory[: size.integers].copy_(staged[: size.integers], non_blocking=True)
        if size in self._graphs:
            self._graphs[size].replay()
        elif not self._capture(size, pool):
            return None
        return self._logits[size.sequences][: len(step.sampled)].clone()  # the next step overwrites them

    def _capture(self, size: Size, pool: Any) -> bool:
        """Run the step eagerly, and capture it for later steps."""
        pack = Pack.over(self._memory, size)

        def body() -> torch.Tensor:
            logits = self._forward(pack)
            if size.sequences not in self._logits:
                self._logits[size.sequences] = torch.empty_like(logits)
            return self._logits[size.sequences].copy_(logits)

        try:
            with WaitFinder() as finder:
                body()
            if finder.found is not None:
                self.no_graph_reason = f"{finder.found} makes the host wait"
                return False
            self._graphs[size] = StepGraph(body, self._device, pool)
        except RuntimeError as error:  # out of memory too: without graphs, a step can be divided
            self.no_graph_reason = f"capturing failed with {error!r}"
            return False
        return True
