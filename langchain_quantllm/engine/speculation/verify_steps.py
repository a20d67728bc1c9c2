"""Verify steps: the last token of each sequence and its proposed ones in one forward, and a draw at each of them.

To the model it is a step that decodes, with several tokens of a sequence as rows of their own: each is written to its
block before any attends, and sees the positions up to its own. On a CPU, those of a longer sequence attend together, as
a chunk of a prompt does, so that its blocks are gathered once. What proposals that were wrong have left behind lies
beyond the sequence's end, until its next tokens overwrite it. Owns the tensors and graphs of these steps.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from langchain_quantllm.engine.attention import Batch, Span
from langchain_quantllm.engine.cuda_graphs import StepGraph, WaitFinder
from langchain_quantllm.engine.sampler import MASKS, BatchSampler
from langchain_quantllm.engine.sequence import Sequence
from langchain_quantllm.engine.speculation.verify_inputs import (
    BUCKETS,
    COUNTS,
    MAY_NOT_END,
    SAMPLING_LINES,
    UNIFORM,
    VerifyPack,
    pack_size,
    token_counts,
)
from langchain_quantllm.engine.staging import StagingBuffers
from langchain_quantllm.engine.step import Step

_MOST = BUCKETS[-1]
_LONG = 192
"""Position from which on it is faster on a CPU that the tokens of a sequence attend together."""


class Forward(Protocol):
    """Enqueues the forward of a batch."""

    def __call__(self, ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Run tokens of shape `(tokens,)`, int64; returns logits of shape `(tokens, vocab)`."""
        ...


@dataclass(frozen=True)
class PendingVerification:
    """The forward of a verify step in flight.

    Args:
        step: The step.
        logits: Of shape `(tokens, vocab)`; padded for a graph.
        pack: Its inputs on the device.
        proposed: The proposed token at each position, and -1 where there is none, of shape `(tokens,)`, int32.
        positions: Position of each token, of shape `(tokens,)`, int32.
        is_graph: Whether it is a graph's replay, whose tensors the next replay overwrites.
    """

    step: Step
    logits: torch.Tensor
    pack: VerifyPack
    proposed: torch.Tensor
    positions: torch.Tensor
    is_graph: bool = False

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences."""
        return self.step.decoding

    @property
    def counts(self) -> list[int]:
        """The tokens of each."""
        return token_counts(self.step)


class VerifySteps:
    """The verify steps of one model.

    Attributes:
        no_graph_reason: What made a capture fail although nothing was known against it.
    """

    def __init__(
        self,
        forward: Forward,
        table: torch.Tensor,
        sampler: BatchSampler,
        *,
        mask_words: int,
        operations: abc.Callable[[], Any],
    ) -> None:
        """Allocate the tables.

        Args:
            forward: Enqueues the forward of a batch.
            table: The block table, of shape `(slots + 1, blocks)`, int32; the last row is for padding.
            sampler: The sequences' sampling, on the same device.
            mask_words: Integers of a token mask.
            operations: Makes the context in which the sampler runs.
        """
        self._forward_batch = forward
        self._table = table
        self._sampler = sampler
        self._mask_words = mask_words
        self._operations = operations
        self._device = table.device
        self._padding_slot = len(table) - 1
        self._last_positions = torch.zeros(len(table), dtype=torch.int32, device=self._device)
        """Position of the last token of each slot, after its last verify step."""
        self._staged: _Staged | None = None
        self._forwards: dict[int, tuple[StepGraph, PendingVerification]] = {}
        self._samplings: dict[tuple[int, int, int], StepGraph] = {}
        self.no_graph_reason: str | None = None

    def clear(self) -> None:
        """Drop the graphs."""
        self._forwards.clear()
        self._samplings.clear()
        self.no_graph_reason = None

    def run(self, step: Step, pool: Any) -> PendingVerification:
        """Enqueue the forward of a step.

        Args:
            step: The step, of at most as many tokens as the last of `BUCKETS`.
            pool: The graphs' memory pool; None to run without graphs. Then all positions must be known.
        """
        if pool is None or self.no_graph_reason is not None:
            memory = torch.zeros(pack_size(step.tokens), dtype=torch.int32)
            VerifyPack.over(memory, step.tokens).fill(step, self._padding_slot)
            pack = VerifyPack.over(memory.to(self._device), step.tokens)
            return replace(self._forward(pack, step), step=step)
        bucket = next(size for size in BUCKETS if size >= step.tokens)
        staged = self._staged = self._staged or _Staged(self._device, self._mask_words)
        staged.enter(step, bucket, self._padding_slot)
        if bucket not in self._forwards and not self._capture(bucket, staged, pool):
            return self.run(step, None)
        graph, pending = self._forwards[bucket]
        graph.replay()
        return replace(pending, step=step)

    def _forward(self, pack: VerifyPack, step: Step | None = None) -> PendingVerification:
        """Enqueue a forward; without graphs, attention is told the positions of a step on the host as well."""
        pack.enter_blocks(self._table)
        slots, positions = pack.slots(), pack.positions(self._last_positions)
        spans = [] if step is None else self._spans(step, positions)
        proposed = pack.proposed(positions)
        last_ids = self._sampler.last_ids[slots.long()]
        ids = torch.where(pack.offset == 0, last_ids, proposed.long().clamp(min=0))
        decodes = all(span.count == 1 for span in spans)
        batch = Batch(table=self._table, slots=slots, positions=positions, spans=spans, decodes=decodes)
        logits = self._forward_batch(ids, batch)
        return PendingVerification(Step([], [], []), logits, pack, proposed, positions)

    def _spans(self, step: Step, positions: torch.Tensor) -> list[Span]:
        counts = token_counts(step)
        if self._device.type == "cpu":
            known = positions.tolist()
        else:  # not read back: no proposals are in flight
            placed = zip(step.positions, counts, strict=True)
            known = [position + i for position, count in placed for i in range(count)]
        spans, first = [], 0
        for sequence, count in zip(step.decoding, counts, strict=True):
            together = count if self._device.type == "cpu" and known[first] >= _LONG else 1
            spans += [
                Span(slot=sequence.slot, first=at, position=known[at], count=together)
                for at in range(first, first + count, together)
            ]
            first += count
        return spans

    def _capture(self, bucket: int, staged: _Staged, pool: Any) -> bool:
        """Run a step of padding, and capture it; false if it cannot be."""
        pack = VerifyPack.over(staged.memory, bucket)
        kept = staged.memory.clone()
        pack.clear(self._padding_slot)
        found: list[PendingVerification] = []

        def body() -> torch.Tensor:
            found.append(self._forward(pack))
            return found[-1].logits

        try:
            with WaitFinder() as finder:
                body()
            if finder.found is not None:
                self.no_graph_reason = f"{finder.found} makes the host wait"
                return False
            graph = StepGraph(body, self._device, pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.no_graph_reason = f"capturing failed with {error!r}"
            return False
        finally:
            staged.memory.copy_(kept)
        self._forwards[bucket] = graph, replace(found[-1], is_graph=True)
        return True

    def sample(
        self, pending: PendingVerification, inputs: torch.Tensor, needs: int, mask: torch.Tensor | None, pool: Any
    ) -> torch.Tensor:
        """Draw a token at each position, and keep the right ones.

        Args:
            pending: The forward.
            inputs: Of shape `(SAMPLING_LINES, tokens)`, int32, on the CPU; `UNIFORM` holds the bits of float32.
            needs: The combined flags of the sequences; see `sampler`.
            mask: Allowed tokens at each position, on the CPU; needed if any sequence has a mask.
            pool: The graphs' memory pool.

        Returns:
            Token ids of shape `(tokens,)`, int32.
        """
        if not pending.is_graph:
            on_device = None if mask is None else mask.to(self._device, non_blocking=True)
            return self._sample(pending, inputs.to(self._device), needs, on_device)
        staged = self._staged
        assert staged is not None
        count, bucket = inputs.shape[1], len(pending.pack.row)
        staged.enter_sampling(inputs, bucket)
        if mask is not None:
            staged.mask[:count].copy_(mask, non_blocking=True)
        key = (bucket, needs, self._sampler.version)
        if key not in self._samplings:
            self._samplings[key] = self._capture_sampling(pending, staged, needs, pool)
        return self._samplings[key].replay()[:count]

    def _capture_sampling(self, pending: PendingVerification, staged: _Staged, needs: int, pool: Any) -> StepGraph:
        bucket = len(pending.pack.row)
        inputs, mask = staged.sampling[:, :bucket], staged.mask[:bucket] if needs & MASKS else None
        kept = staged.memory.clone()
        pending.pack.clear(self._padding_slot)  # the first run must not touch the sequences

        def body() -> torch.Tensor:
            return self._sample(pending, inputs, needs, mask)

        body()
        graph = StepGraph(body, self._device, pool)
        staged.memory.copy_(kept)
        return graph

    def _sample(
        self, pending: PendingVerification, inputs: torch.Tensor, needs: int, mask: torch.Tensor | None
    ) -> torch.Tensor:
        pack, proposed = pending.pack, pending.proposed
        slots, offset = pack.slots(), pack.offset
        rows = torch.arange(len(offset), device=self._device)
        firsts = rows - offset
        uniforms, may_not_end = inputs[UNIFORM].view(torch.float32), inputs[MAY_NOT_END]
        with self._operations():
            draws = self._sampler.sample_ahead(
                pending.logits, slots, uniforms, may_not_end, needs, mask, proposed, firsts
            )
        is_right = right_draws(draws, proposed, offset, inputs[COUNTS])
        has_next = torch.cat([is_right[1:] & (offset[1:] > 0), torch.zeros_like(is_right[:1])])
        is_last = is_right & ~has_next
        self._sampler.keep(slots, draws, is_right, is_last)
        targets = torch.where(is_last, slots, self._padding_slot).long()
        self._last_positions[targets] = pending.positions + 1
        return draws


def right_draws(
    draws: torch.Tensor, proposed: torch.Tensor, offset: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Find the draws that are tokens of their text: those whose inputs all were drawn before them.

    Args:
        draws: The token drawn after each position, of shape `(tokens,)`, the positions of a sequence side by side.
        proposed: The proposed token that is each position's input, of shape `(tokens,)`; below 0 for none.
        offset: How far a position is behind its sequence's first one, of shape `(tokens,)`.
        counts: 0 where no draw may count, of shape `(tokens,)`.

    Returns:
        Of shape `(tokens,)`, bool.
    """
    before = torch.cat([draws[:1], draws[:-1]])
    goes_on = (offset == 0) | ((counts != 0) & (proposed >= 0) & (before == proposed))
    wrong = (~goes_on).cumsum(0)
    firsts = torch.arange(len(offset), device=offset.device) - offset
    return wrong == wrong[firsts]


class _Staged:
    """The tensors that graphs read, and the host's buffers for them."""

    def __init__(self, device: torch.device, mask_words: int) -> None:
        self.memory = torch.zeros(pack_size(_MOST), dtype=torch.int32, device=device)
        self.sampling = torch.zeros(SAMPLING_LINES, _MOST, dtype=torch.int32, device=device)
        self.mask = torch.zeros(_MOST, mask_words, dtype=torch.int32, device=device)
        self._memory_buffers = StagingBuffers(pack_size(_MOST))
        self._sampling_buffers = StagingBuffers(SAMPLING_LINES, _MOST)

    def enter(self, step: Step, bucket: int, padding_slot: int) -> None:
        """Copy a step's inputs to the device."""
        buffer = self._memory_buffers.next()
        VerifyPack.over(buffer, bucket).fill(step, padding_slot)
        size = pack_size(bucket)
        self.memory[:size].copy_(buffer[:size], non_blocking=True)
        self._memory_buffers.copied()

    def enter_sampling(self, inputs: torch.Tensor, bucket: int) -> None:
        """Copy the inputs of a step's sampling to the device, padded."""
        buffer = self._sampling_buffers.next()
        buffer[:, :bucket] = 0
        buffer[:, : inputs.shape[1]] = inputs
        self.sampling.copy_(buffer, non_blocking=True)
        self._sampling_buffers.copied()
