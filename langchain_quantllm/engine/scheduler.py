"""The scheduler: which sequences prefill, decode or wait in the next step.

Owns the waiting and the running sequences, their blocks, and the order of prefill and decode steps. Counts tokens
only: it reads no tensors and no text.
"""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass, replace

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.sequence import Sequence


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens `start` to `start + count` of a sequence's ids, to be run in one step.

    `is_last` says that the next token is sampled after them.
    """

    sequence: Sequence
    start: int
    count: int
    is_last: bool

    @property
    def ids(self) -> list[int]:
        """The tokens."""
        return self.sequence.ids[self.start : self.start + self.count]


@dataclass(frozen=True)
class Prefill:
    """A step over chunks of prompts, packed behind each other."""

    chunks: list[PrefillChunk]


@dataclass(frozen=True)
class Decode:
    """A step over one token of each sequence. `positions` are the positions of these tokens."""

    sequences: list[Sequence]
    positions: list[int]


class Scheduler:
    """Plans one step after another: first come, first served, prefill and decode in turns."""

    def __init__(
        self, blocks: BlockManager, *, slots: int, prefill_tokens: int, prefill_tokens_while_decoding: int
    ) -> None:
        """Begin with no sequences.

        Args:
            blocks: The KV cache's blocks.
            slots: Maximum number of sequences at once.
            prefill_tokens: Most tokens of a prefill step while no sequence decodes.
            prefill_tokens_while_decoding: Most tokens of a prefill step while sequences wait to decode.
        """
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order in which they joined
        self.prefill_tokens = prefill_tokens
        self.prefill_tokens_while_decoding = prefill_tokens_while_decoding
        self.preempted = 0
        """Preemptions so far: a sequence gave up its blocks for an older one."""
        self._slots = list(range(slots - 1, -1, -1))
        self._prefilled_last = False

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences, running and waiting."""
        return [*self.running, *self.waiting]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended, running or waiting, and free its blocks."""
        if sequence in self.running:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def plan(self) -> Prefill | Decode | None:
        """Choose the next step; None if nothing can run before pending tokens are known.

        The step counts as run: its tokens count as written and sampled from now on.
        """
        decoding = [sequence for sequence in self.running if sequence.decodes and not sequence.is_complete]
        if not (self._prefilled_last and decoding) and (chunks := self._plan_prefill(bool(decoding))):
            self._prefilled_last = True
            return Prefill(chunks)
        self._prefilled_last = False
        return self._plan_decode(decoding)

    def push(self, sequence: Sequence, token_id: int) -> None:
        """Append a sampled token that the device has returned."""
        sequence.ids.append(token_id)
        if sequence.slot >= 0:
            sequence.register(self.blocks)

    # Prefill.

    def _plan_prefill(self, beside_decoding: bool) -> list[PrefillChunk]:
        budget = self.prefill_tokens_while_decoding if beside_decoding else self.prefill_tokens
        chunks: list[PrefillChunk] = []
        for sequence in [sequence for sequence in self.running if not sequence.decodes]:
            if budget <= 0:
                break
            if sequence.slot >= 0 and (chunk := self._plan_chunk(sequence, budget)):
                chunks.append(chunk)
                budget -= chunk.count
        while budget > 0 and self.waiting and self._admit(self.waiting[0]):
            chunk = self._plan_chunk(self.waiting.popleft(), budget)
            if chunk is None:  # it was preempted at once: older sequences need the blocks
                break
            chunks.append(chunk)
            budget -= chunk.count
        return chunks

    def _admit(self, sequence: Sequence) -> bool:
        if not self._slots or not sequence.is_known:
            return False
        limits = [other.max_rows for other in (*self.running, sequence) if other.max_rows is not None]
        if limits and len(self.running) >= min(limits):
            return False
        found, held = sequence.find_shared(self.blocks)
        needed = -(-(len(sequence.ids) + 1) // BLOCK_TOKENS) - held
        # Each running sequence soon needs a block too; without this margin the newcomer would be preempted at once.
        if needed + len(self.running) > self.blocks.available and self.running:
            return False
        sequence.slot = self._slots.pop()
        self.running.append(sequence)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = found * BLOCK_TOKENS
        return True

    def _plan_chunk(self, sequence: Sequence, budget: int) -> PrefillChunk | None:
        before = sequence.written
        sequence.share(self.blocks)
        if sequence.cached_tokens is not None and before and sequence.sampled == 0:
            # Another sequence has written these tokens meanwhile.
            sequence.cached_tokens += sequence.written - before
        start = sequence.written
        count = min(budget, len(sequence.ids) - start)
        if not self._reserve(sequence, start + count):
            return None
        sequence.written += count
        is_last = sequence.written == len(sequence.ids)
        if is_last:
            sequence.decodes = True
            sequence.sampled += 1
        sequence.register(self.blocks)
        return PrefillChunk(sequence, start, count, is_last)

    # Decode.

    def _plan_decode(self, decoding: list[Sequence]) -> Decode | None:
        for sequence in decoding:
            if sequence.slot >= 0:
                self._reserve(sequence, sequence.written + 1)
        # Those that were preempted for an older sequence are back in the queue.
        ready = [s for s in decoding if s.slot >= 0 and len(s.blocks) * BLOCK_TOKENS > s.written]
        positions = [sequence.written for sequence in ready]
        for sequence in ready:
            sequence.written += 1
            sequence.sampled += 1
            sequence.register(self.blocks)
        return Decode(ready, positions) if ready else None

    # Blocks.

    def _reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Take blocks for so many tokens of a sequence, preempting the youngest sequences if need be."""
        while len(sequence.blocks) * BLOCK_TOKENS < tokens:
            block = self.blocks.take()
            if block is not None:
                sequence.blocks.append(block)
                continue
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preempted += 1
        self._leave(sequence)
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        sequence.release(self.blocks)


def split_chunks(
    chunks: abc.Sequence[PrefillChunk], first_tokens: int
) -> tuple[list[PrefillChunk], list[PrefillChunk]]:
    """Divide chunks into those of the first tokens, and the rest."""
    first: list[PrefillChunk] = []
    rest = list(chunks)
    while rest and rest[0].count <= first_tokens:
        first_tokens -= rest[0].count
        first.append(rest.pop(0))
    if rest and first_tokens:
        chunk = rest[0]
        first.append(replace(chunk, count=first_tokens, is_last=False))
        rest[0] = replace(chunk, start=chunk.start + first_tokens, count=chunk.count - first_tokens)
    return first, rest
