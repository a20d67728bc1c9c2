"""The proposals of one sequence: where they come from, and how many of them have been right."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.engine.speculation.ngrams import NGramIndex, PastTexts
from langchain_quantllm.engine.speculation.proposal import DRAFT, FORCED, MOST_TOKENS, NGRAM

_PRIOR = 2.0  # proposals that what is known of other sequences counts for
_KEPT = 0.9  # of the counts so far, at each verification
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 256


class Acceptance:
    """How often proposals of one source were right, the older ones counting less.

    Attributes:
        is_due: Whether they are to be tried, be it known to pay or not: the pause after the last try has ended.
    """

    def __init__(self, *, kept: float = _KEPT) -> None:
        """Begin without a verification; of the counts so far, each one keeps such a part."""
        self._kept = kept
        self._right = self._tried = 0.0
        self._pause = _FIRST_PAUSE
        self._waits = 0
        self.is_due = False

    def rate(self, expected: float) -> float:
        """Estimate the chance that a proposal is right if those before it are, from the chance without knowledge."""
        return (self._right + _PRIOR * expected) / (self._tried + _PRIOR)

    def note(self, proposed: int, accepted: int) -> None:
        """Count a verification."""
        self._right = self._kept * self._right + accepted
        self._tried = self._kept * self._tried + min(proposed, accepted + 1)

    def rest(self) -> None:
        """Pause, as proposals do not pay; each time for longer."""
        self._waits, self._pause, self.is_due = self._pause, min(2 * self._pause, _LONGEST_PAUSE), False

    @property
    def rests(self) -> bool:
        """Whether a pause goes on."""
        return self._waits > 0

    def begin_step(self) -> bool:
        """Count a step of the pause; whether it has ended."""
        if self._waits:
            self._waits -= 1
            self.is_due = not self._waits
        return not self._waits

    def go_on(self) -> None:
        """Note that proposals pay, so that the next pause is short."""
        self._pause, self.is_due = _FIRST_PAUSE, False


@dataclass(frozen=True)
class Guess:
    """Tokens that a sequence may go on with.

    Args:
        tokens: The tokens; none of a draft model, which makes them once they are asked for.
        source: Where they come from.
        most: How many of them are worth verifying in one step.
    """

    tokens: tuple[int, ...]
    source: str
    most: int


class SequenceSpeculation:
    """The proposals of one sequence.

    Attributes:
        acceptance: By source.
        drafts: Whether a draft model may propose.
        proposed: Tokens proposed so far.
        accepted: Those of them that were right.
        past: Texts of other requests that it may go on like; None for none.
    """

    def __init__(self, ids: Sequence[int], source: str) -> None:
        """Propose to a text.

        Args:
            ids: Its tokens, as they grow.
            source: `DRAFT` for all sources, `NGRAM` for both but that one, `FORCED` for that one alone.
        """
        self.acceptance = {kind: Acceptance() for kind in (FORCED, NGRAM, DRAFT)}
        self.drafts = source == DRAFT
        self.proposed = self.accepted = 0
        self.past: PastTexts | None = None
        self._ids = ids
        self._index = NGramIndex(ids) if source in (NGRAM, DRAFT) else None

    def guess(self, mask: Any) -> Guess | None:
        """Guess the tokens behind the known ones, by the mask if the sequence has one; None if there is no guess."""
        if mask is not None and self.acceptance[FORCED].begin_step():
            with contextlib.suppress(Exception):  # a mask that fails does so when it is filled
                if forced := mask.forced(MOST_TOKENS):
                    return Guess(tuple(forced), FORCED, MOST_TOKENS // 2)
        if self._index is None or not self.acceptance[NGRAM].begin_step():
            return None
        match = self._index.find()
        found = None if self.past is None else self.past.find(self._ids, MOST_TOKENS)
        if found is not None and (match is None or found[0] > match.length):
            return Guess(found[1], NGRAM, 2 * found[0])
        return None if match is None else Guess(self._index.tokens(match, MOST_TOKENS), NGRAM, 2 * match.length)

    @property
    def looks_back(self) -> bool:
        """Whether it guesses from texts."""
        return self._index is not None

    def note(self, source: str, proposed: int, accepted: int) -> None:
        """Count a verification."""
        self.proposed += proposed
        self.accepted += accepted
        self.acceptance[source].note(proposed, accepted)
