"""Proposed tokens of one sequence in a step."""

from __future__ import annotations

from dataclasses import dataclass

MOST_TOKENS = 64
"""Most tokens of a proposal, those for steps in flight included."""

FORCED, NGRAM, DRAFT = "forced", "ngram", "draft"
"""Sources of proposals: the grammar of a constrained text, earlier places of the same text, and a draft model."""


@dataclass(frozen=True)
class Proposal:
    """Tokens that a sequence may go on with.

    The host may propose while steps are in flight, whose tokens it does not know yet: then the device takes the tokens
    behind its last one.

    Args:
        known: Tokens of the sequence that were known: the first proposed one has this position.
        tokens: The proposed tokens, at most `MOST_TOKENS`.
        count: How many of them a step verifies.
        source: Where they come from.
    """

    known: int
    tokens: tuple[int, ...] = ()
    count: int = 0
    source: str = NGRAM

    def fed(self, last: int) -> list[int]:
        """Return the tokens that are verified behind the last token, by its position: -1 where there is none."""
        first = last + 1 - self.known
        tokens = self.tokens[first : first + self.count]
        return [*tokens, *[-1] * (self.count - len(tokens))]
