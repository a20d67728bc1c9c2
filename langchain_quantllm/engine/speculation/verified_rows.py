"""The host's part of a verify step: what each draw is made with, and which draws are tokens of the text."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import Any

import torch

from langchain_quantllm.engine.sampler import BLOCKS
from langchain_quantllm.engine.sequence import SamplingInput, Sequence
from langchain_quantllm.engine.speculation.proposal import Proposal
from langchain_quantllm.engine.speculation.verify_inputs import COUNTS, MAY_NOT_END, SAMPLING_LINES, UNIFORM
from langchain_quantllm.engine.speculation.verify_steps import PendingVerification
from langchain_quantllm.engine.staging import LARGEST_UNIFORM


@dataclass
class VerifiedRow:
    """A sequence in a verify step, once the tokens of the steps before are known.

    Args:
        sequence: The sequence.
        proposal: Its proposal.
        first: Index of its first draw in the step.
        fed: The proposed tokens before each of the other draws, -1 where there is none.
        counting: How many of the draws may count; fewer than all where a mask cuts the proposals.
        masks: The state of its mask before each of these; empty without a mask.
    """

    sequence: Sequence
    proposal: Proposal
    first: int
    fed: list[int]
    counting: int = 0
    masks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Count the draws behind proposed tokens."""
        self.counting = 1 + next((i for i, token in enumerate(self.fed) if token < 0), len(self.fed))

    @property
    def draws(self) -> range:
        """Indices of its draws in the step."""
        return range(self.first, self.first + 1 + len(self.fed))

    def fill_ahead(self, bits: torch.Tensor) -> None:
        """Fill the masks behind proposed tokens, up to the first one that the mask before it forbids.

        Args:
            bits: Of shape `(draws, words)`, int32; the first row is filled.
        """
        mask: Any = self.sequence.mask
        self.masks = [mask]
        for i, token in enumerate(self.fed[: self.counting - 1], 1):
            if mask.ended or not int(bits[i - 1, token // 32]) >> token % 32 & 1:
                break
            try:
                mask = mask.fork()
                mask.accept(token)
                if not mask.fill(bits[i : i + 1]):
                    bits[i] = -1
            except Exception:  # which a step of its own would meet, if the text gets there
                break
            self.masks.append(mask)
        self.counting = len(self.masks)

    def accepted(self, ids: abc.Sequence[int]) -> int:
        """Count the proposed tokens that are right, from the draws of the whole step."""
        for i in range(self.counting - 1):
            if ids[self.first + i] != self.fed[i]:
                return i
        return self.counting - 1


def verified_rows(pending: PendingVerification) -> list[VerifiedRow]:
    """Return the rows of a step; the tokens of all steps before it are known, but for sequences that have ended."""
    rows, first = [], 0
    for sequence in pending.sequences:
        proposal = pending.step.proposals.get(sequence, Proposal(0))
        fed = [-1] * proposal.count if sequence.has_ended else proposal.fed(len(sequence.ids) - 1)
        rows.append(VerifiedRow(sequence, proposal, first, fed))
        first += 1 + len(fed)
    return rows


def sampling_inputs(rows: abc.Sequence[VerifiedRow]) -> tuple[torch.Tensor, int]:
    """Lay out the inputs of the draws of all rows.

    Returns:
        A tensor for `VerifySteps.sample`, on the CPU; and the combined flags of the sequences.
    """
    lines: list[tuple[SamplingInput, bool]] = []
    needs = 0
    for row in rows:
        sequence = row.sequence
        inputs = sequence.sampling_inputs(len(sequence.ids) - sequence.prompt_tokens, len(row.draws))
        lines += [(one, i < row.counting) for i, one in enumerate(inputs)]
        needs |= sequence.sampling_needs
    needs |= BLOCKS * any(not one.may_end for one, _ in lines)
    laid = torch.zeros(SAMPLING_LINES, len(lines), dtype=torch.int32)
    uniforms = torch.tensor([min(one.uniform, LARGEST_UNIFORM) for one, _ in lines], dtype=torch.float32)
    laid[UNIFORM] = uniforms.view(torch.int32)
    laid[MAY_NOT_END] = torch.tensor([not one.may_end for one, _ in lines])
    laid[COUNTS] = torch.tensor([counts for _, counts in lines])
    return laid, needs
