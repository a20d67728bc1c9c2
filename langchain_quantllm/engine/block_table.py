"""The block table on the device: the blocks, the adapter and the length of the sequence in each slot."""

from __future__ import annotations

from collections import abc

import torch

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.lora import NO_ADAPTER
from langchain_quantllm.engine.sequence import Sequence
from langchain_quantllm.engine.step import Step


class BlockTable:
    """A row for each slot.

    Attributes:
        blocks: The blocks of each row's sequence in their order, of shape `(slots, blocks of a sequence)`, int32.
        adapters: Number of the adapter that it runs with, of shape `(slots,)`, int32.
        position_deltas: See `Sequence.position_delta`; of shape `(slots,)`, int32.
        prompt_lengths: Tokens of its prompt; see `Sequence.rotary_tokens`. Of shape `(slots,)`, int32.
    """

    def __init__(self, slots: int, blocks_per_sequence: int, device: torch.device) -> None:
        """Allocate rows of block 0 and no adapter."""
        self.blocks = torch.zeros(slots, blocks_per_sequence, dtype=torch.int32, device=device)
        self.adapters = torch.full((slots,), NO_ADAPTER, dtype=torch.int32, device=device)
        self.position_deltas = torch.zeros(slots, dtype=torch.int32, device=device)
        self.prompt_lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        self._device = device

    def enter_step(self, step: Step) -> None:
        """Enter the blocks that a step of prompts reads and writes."""
        self.enter([chunk.sequence for chunk in step.chunks])
        # Of decoding sequences, those that begin a block with this token.
        new = [
            (sequence.slot, position // BLOCK_TOKENS, sequence.blocks[position // BLOCK_TOKENS])
            for sequence, position in zip(step.decoding, step.positions, strict=True)
            if position % BLOCK_TOKENS == 0
        ]
        if new:
            slots, indices, blocks = torch.tensor(new, dtype=torch.int32).T.to(self._device, non_blocking=True)
            self.blocks[slots.long(), indices.long()] = blocks

    def enter(self, sequences: abc.Sequence[Sequence]) -> None:
        """Enter sequences, at least one, with all their blocks."""
        width = max(len(sequence.blocks) for sequence in sequences)
        blocks = torch.tensor([s.blocks + [0] * (width - len(s.blocks)) for s in sequences], dtype=torch.int32)
        slots = torch.tensor([sequence.slot for sequence in sequences]).to(self._device, non_blocking=True)
        self.blocks[slots, :width] = blocks.to(self._device, non_blocking=True)
        rows = torch.tensor([(s.adapter, s.position_delta, s.rotary_tokens) for s in sequences], dtype=torch.int32)
        adapters, deltas, lengths = rows.T.to(self._device, non_blocking=True)
        self.adapters[slots], self.position_deltas[slots], self.prompt_lengths[slots] = adapters, deltas, lengths
