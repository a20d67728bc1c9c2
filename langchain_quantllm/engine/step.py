"""One step of the running batch: which sequences decode, with which proposals, and which chunks of prompts run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from langchain_quantllm.engine.sequence import Sequence
from langchain_quantllm.engine.speculation.proposal import Proposal


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens `start` to `start + count` of a sequence's ids, to be run in one step.

    Args:
        sequence: The sequence.
        start: Position of the first token.
        count: Tokens.
        is_last: Whether the next token is sampled after them.
        restored: Row of the state pool whose states it goes on from; None for its own.
        saves: Positions behind some of its tokens, in order, and the rows that the states there are copied to.
    """

    sequence: Sequence
    start: int
    count: int
    is_last: bool
    restored: int | None = None
    saves: tuple[tuple[int, int], ...] = ()

    @property
    def ids(self) -> list[int]:
        """The tokens."""
        return self.sequence.ids[self.start : self.start + self.count]


@dataclass(frozen=True)
class Step:
    """One forward: the last token of each decoding sequence, and chunks of prompts.

    Args:
        decoding: Sequences whose last token is run; it lies on the device.
        positions: Positions of these tokens; the least ones, where proposals of an earlier step are in flight.
        chunks: Chunks of prompts, one for each of other sequences.
        proposals: Of decoding sequences, the proposals that are verified. If there are any, there are no chunks, and
            each sequence with proposals in flight has an entry, too.
    """

    decoding: list[Sequence]
    positions: list[int]
    chunks: list[PrefillChunk]
    proposals: dict[Sequence, Proposal] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens that the model runs."""
        proposed = sum(proposal.count for proposal in self.proposals.values())
        return len(self.decoding) + proposed + sum(chunk.count for chunk in self.chunks)

    @property
    def sampled(self) -> list[Sequence]:
        """Sequences that a token is sampled for: the decoding ones, then those whose prompt ends here."""
        return self.decoding + self.starting

    @property
    def starting(self) -> list[Sequence]:
        """Sequences whose prompt ends in this step."""
        return [chunk.sequence for chunk in self.chunks if chunk.is_last]


def split_step(step: Step, first_tokens: int) -> tuple[Step, Step]:
    """Divide the chunks of a step: the first one keeps the decoding sequences and so many tokens of prompts.

    Where a chunk cannot be cut, the first one may have more tokens.
    """
    first: list[PrefillChunk] = []
    rest = list(step.chunks)
    while rest and rest[0].count <= first_tokens:
        first_tokens -= rest[0].count
        first.append(rest.pop(0))
    if rest and first_tokens:
        chunk = rest[0]
        cut = chunk.sequence.chunk_end(chunk.start, chunk.start + first_tokens)
        kept = min(cut - chunk.start, chunk.count)
        end = chunk.start + kept
        before, after = (tuple(s for s in chunk.saves if (s[0] <= end) is is_before) for is_before in (True, False))
        first.append(replace(chunk, count=kept, is_last=chunk.is_last and kept == chunk.count, saves=before))
        rest[0] = replace(chunk, start=end, count=chunk.count - kept, restored=None, saves=after)
        if not rest[0].count:
            del rest[0]
    return replace(step, chunks=first), Step([], [], rest)
