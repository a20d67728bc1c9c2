"""Prefill steps as CUDA graphs: for a few lengths, filled up with tokens of nobody.

A short prompt costs the host more time than the device. Owns the lengths, the places that the graphs read, and when
it is worth capturing one. What a forward does is the runner's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from langchain_quantllm.engine.cuda_graphs import StepGraph, WaitFinder
from langchain_quantllm.kernels.reference import PREFILL_TILE

LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024)
"""Tokens for which there may be a graph; longer steps keep the device busy while the host goes on."""

MOST_ROWS = 16
"""Most rows of a step that is a graph."""

_BLOCKS = LENGTHS[-1] // PREFILL_TILE + MOST_ROWS + 1
_USES = 2  # capturing takes about as long as a step does without


@dataclass(frozen=True, kw_only=True)
class Run:
    """New tokens of one row, as the graph is told of them.

    Args:
        slot: The row of the page table.
        position: Position of the first one in the row.
        ids: The tokens.
        is_last: Whether the row draws its next token from the last of them.
    """

    slot: int
    position: int
    ids: Sequence[int]
    is_last: bool


@dataclass(frozen=True, kw_only=True)
class Pack:
    """What a graph of one length reads, as tensors of int32 that share one memory.

    Args:
        ids: Tokens behind each other, of shape `(length,)`.
        positions: Position of each in its row, of shape `(length,)`.
        slots: Row of the page table of each, of shape `(length,)`.
        kept: Places of the tokens whose logits are wanted, of shape `(MOST_ROWS,)`; what is too many repeats a place.
        blocks: Runs of tokens as the kernel takes them, of shape `(blocks, 4)`; what is too many has no token.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    kept: torch.Tensor
    blocks: torch.Tensor


def length_for(runs: Sequence[Run]) -> int | None:
    """Choose the length of the graph for a step; None where there is none."""
    if len(runs) > MOST_ROWS:
        return None
    tokens = sum(len(run.ids) for run in runs)
    return next((length for length in LENGTHS if length >= tokens), None)


def fields(memory: torch.Tensor, length: int) -> Pack:
    """Divide memory of `size()` integers into what a graph of a length reads."""
    lines = memory[: 3 * length].view(3, length)
    rest = memory[3 * LENGTHS[-1] :]
    blocks = length // PREFILL_TILE + MOST_ROWS + 1
    return Pack(
        ids=lines[0],
        positions=lines[1],
        slots=lines[2],
        kept=rest[:MOST_ROWS],
        blocks=rest[MOST_ROWS : MOST_ROWS + 4 * blocks].view(blocks, 4),
    )


def size() -> int:
    """Give the integers that the longest graph reads."""
    return 3 * LENGTHS[-1] + MOST_ROWS + 4 * _BLOCKS


def fill(pack: Pack, runs: Sequence[Run], padding_slot: int) -> None:
    """Write a step into a pack.

    The tokens that fill it up are a row of their own, of zeros at the beginning of a text, on the page that nobody
    reads: so they are numbers like any others.

    Args:
        pack: On the CPU.
        runs: The rows of the step, of no more tokens than the pack has.
        padding_slot: A row of the page table that has no pages.
    """
    tokens = sum(len(run.ids) for run in runs)
    missing = len(pack.ids) - tokens
    parts = [(run.slot, run.position, list(run.ids)) for run in runs]
    parts += [(padding_slot, 0, [0] * min(PREFILL_TILE, missing - at)) for at in range(0, missing, PREFILL_TILE)]
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    blocks: list[tuple[int, int, int, int]] = []
    for slot, position, part in parts:
        blocks += [
            (slot, len(ids) + at, position + at, min(PREFILL_TILE, len(part) - at))
            for at in range(0, len(part), PREFILL_TILE)
        ]
        ids += part
        positions += range(position, position + len(part))
        slots += [slot] * len(part)
    kept = []
    end = 0
    for run in runs:
        end += len(run.ids)
        if run.is_last:
            kept.append(end - 1)
    kept += [0] * (MOST_ROWS - len(kept))
    blocks += [(padding_slot, 0, 0, 0)] * (len(pack.blocks) - len(blocks))
    pack.ids.copy_(torch.tensor(ids, dtype=torch.int32))
    pack.positions.copy_(torch.tensor(positions, dtype=torch.int32))
    pack.slots.copy_(torch.tensor(slots, dtype=torch.int32))
    pack.kept.copy_(torch.tensor(kept, dtype=torch.int32))
    pack.blocks.copy_(torch.tensor(blocks, dtype=torch.int32))


class PrefillGraphs:
    """The graphs of one model, captured when a length comes again."""

    def __init__(self, forward: Callable[[Pack], torch.Tensor], device: torch.device) -> None:
        """Set places aside.

        Args:
            forward: Enqueues the forward of a pack and gives logits of shape `(MOST_ROWS, vocab)`.
            device: The GPU.
        """
        self._forward = forward
        self._device = device
        self._memory = torch.zeros(size(), dtype=torch.int32, device=device)
        self._staged = [torch.zeros(size(), dtype=torch.int32, pin_memory=True) for _ in range(4)]
        self._logits: torch.Tensor | None = None  # one place for all graphs, or each would hold its own
        self._graphs: dict[int, StepGraph] = {}
        self._uses: Counter[int] = Counter()
        self._steps = 0
        self.why_not: str | None = None
        """What made a graph impossible although nothing was known against it."""

    def clear(self) -> None:
        """Forget the graphs."""
        self._graphs.clear()

    def run(self, runs: Sequence[Run], padding_slot: int, pool: Any) -> torch.Tensor | None:
        """Run a step if there is a graph for it, or one can be captured.

        Args:
            runs: The rows of the step.
            padding_slot: A row of the page table that has no pages.
            pool: Memory of the graphs.

        Returns:
            The logits of the rows that draw, of shape `(rows, vocab)`; None if the step has to be run as it is.
        """
        length = None if self.why_not else length_for(runs)
        if length is None:
            return None
        self._uses[length] += 1
        if self._uses[length] < _USES:
            return None
        staged = self._staged[self._steps % len(self._staged)]  # more than there are steps on their way
        self._steps += 1
        fill(fields(staged, length), runs, padding_slot)
        self._memory.copy_(staged, non_blocking=True)
        if length in self._graphs:
            self._graphs[length].replay()
        elif not self._capture(length, pool):
            return None
        assert self._logits is not None
        return self._logits[: sum(run.is_last for run in runs)].clone()  # the next step writes there, too

    def _capture(self, length: int, pool: Any) -> bool:
        """Run the step as it is, and capture it for those after it."""
        pack = fields(self._memory, length)

        def body() -> torch.Tensor:
            logits = self._forward(pack)
            if self._logits is None:
                self._logits = torch.empty_like(logits)
            return self._logits.copy_(logits)

        try:
            with WaitFinder() as finder:
                body()
            if finder.found is not None:
                self.why_not = f"{finder.found} makes the host wait"
                return False
            self._graphs[length] = StepGraph(body, self._device, pool)
        except RuntimeError as error:  # for want of memory, too: without graphs, a step can be divided
            self.why_not = f"capturing failed with {error!r}"
            return False
        return True
