"""The inputs of a verify step on their way to the device, before its forward and before its sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.sequence import Sequence
from langchain_quantllm.engine.speculation.proposal import MOST_TOKENS, Proposal
from langchain_quantllm.engine.step import Step

BUCKETS = (2, 4, 8, 16, 32, 64, 128)
"""Tokens of the steps that have a graph; smaller ones are padded."""

_BLOCKS = 2 + (MOST_TOKENS - 1) // BLOCK_TOKENS  # that a sequence's tokens in one step may lie in
_SLOT, _POSITION, _KNOWN = range(3)
_INDICES = slice(3, 3 + _BLOCKS)
_ENTRIES = slice(3 + _BLOCKS, 3 + 2 * _BLOCKS)
_TOKENS = slice(3 + 2 * _BLOCKS, 3 + 2 * _BLOCKS + MOST_TOKENS)
_COLUMNS = _TOKENS.stop
_FOLLOWS = -1  # in place of a position that only the device knows

SAMPLING_LINES = 3
UNIFORM, MAY_NOT_END, COUNTS = range(SAMPLING_LINES)
"""Lines of the sampling's inputs; `COUNTS` is whether a draw may count if the proposals before it are right."""


def pack_size(bucket: int) -> int:
    """Return how many integers a step of so many tokens reads."""
    return (bucket + 1) * _COLUMNS + 2 * bucket


@dataclass(frozen=True, kw_only=True)
class VerifyPack:
    """The inputs of a step's forward, as int32 tensors that share one memory.

    Args:
        rows: A row for each sequence, and one of padding at the end, of shape `(bucket + 1, columns)`.
        row: Row of each token, of shape `(bucket,)`.
        offset: How far each token is behind its sequence's last one, of shape `(bucket,)`.
    """

    rows: torch.Tensor
    row: torch.Tensor
    offset: torch.Tensor

    @staticmethod
    def over(memory: torch.Tensor, bucket: int) -> VerifyPack:
        """Divide memory of `pack_size` integers into the inputs of a step."""
        cut = (bucket + 1) * _COLUMNS
        lines = memory[cut : cut + 2 * bucket].view(2, bucket)
        return VerifyPack(rows=memory[:cut].view(bucket + 1, _COLUMNS), row=lines[0], offset=lines[1])

    def fill(self, step: Step, padding_slot: int) -> None:
        """Write a step into the pack, which lies on the CPU."""
        count = len(step.decoding)
        self.clear(padding_slot)
        rows = [_row(s, at, step.proposals.get(s)) for s, at in zip(step.decoding, step.positions, strict=True)]
        self.rows[:count, : _TOKENS.start] = torch.tensor(rows, dtype=torch.int32)
        for row, sequence in zip(self.rows[:, _TOKENS], step.decoding, strict=False):
            if (proposal := step.proposals.get(sequence)) is not None and proposal.tokens:
                row[: len(proposal.tokens)] = torch.tensor(proposal.tokens, dtype=torch.int32)
        places = [(row, offset) for row, count in enumerate(token_counts(step)) for offset in range(count)]
        places += [(len(self.rows) - 1, 0)] * (len(self.row) - len(places))
        of_row, of_offset = zip(*places, strict=True)
        self.row[:], self.offset[:] = torch.tensor(of_row), torch.tensor(of_offset)

    def clear(self, padding_slot: int) -> None:
        """Make all of it padding."""
        self.rows.zero_()
        self.rows[:, _SLOT] = padding_slot
        self.rows[:, _TOKENS] = -1
        self.row.fill_(len(self.rows) - 1)
        self.offset.zero_()

    def enter_blocks(self, table: torch.Tensor) -> None:
        """Enter the blocks that the step writes to into the block table, of shape `(slots, blocks)`."""
        table[self.rows[:, _SLOT, None].long(), self.rows[:, _INDICES].long()] = self.rows[:, _ENTRIES]

    def slots(self) -> torch.Tensor:
        """Return the slot of each token."""
        return self.rows[:, _SLOT][self.row.long()]

    def positions(self, last_positions: torch.Tensor) -> torch.Tensor:
        """Compute the position of each token, int32, from those of the last tokens of slots, as the device has them."""
        given = self.rows[:, _POSITION]
        of_rows = torch.where(given == _FOLLOWS, last_positions[self.rows[:, _SLOT].long()], given)
        return of_rows[self.row.long()] + self.offset

    def proposed(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the proposed token at each position, of shape `(bucket,)`, int32; -1 where there is none."""
        rows = self.rows[self.row.long()]
        index = (positions - rows[:, _KNOWN]).long()
        tokens = rows[:, _TOKENS].gather(1, index.clamp(0, MOST_TOKENS - 1)[:, None])[:, 0]
        return torch.where((index >= 0) & (index < MOST_TOKENS), tokens, -1)


def token_counts(step: Step) -> list[int]:
    """Count the tokens of each sequence in a step: the last one, and those that are verified."""
    return [1 + step.proposals[s].count if s in step.proposals else 1 for s in step.decoding]


def _row(sequence: Sequence, position: int, proposal: Proposal | None) -> list[int]:
    """Lay out a sequence's columns before its tokens."""
    known, count = (0, 0) if proposal is None else (proposal.known, proposal.count)
    first, last = position // BLOCK_TOKENS, (position + sequence.in_flight) // BLOCK_TOKENS
    indices = [min(first + i, last) for i in range(_BLOCKS)]
    place = _FOLLOWS if sequence.in_flight > count else position
    return [sequence.slot, place, known, *indices, *(sequence.blocks[i] for i in indices)]
