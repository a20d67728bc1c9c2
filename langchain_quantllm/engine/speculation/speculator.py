"""The choice of a step's proposals: which sequences get how many tokens verified, if that pays at all.

It pays if it gives more tokens for the time of a step, by the share of right proposals so far and the measured time of
steps with so many tokens; where a draft model proposes, with the measured time of that. Sequences for which it does not
pay get no proposals for a while, longer each time, and then are tried again, with few tokens. Tries of draft models
take a small part of the whole time at most.
"""

from __future__ import annotations

import time
from collections import OrderedDict, abc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from langchain_quantllm.engine.speculation.costs import StepCosts
from langchain_quantllm.engine.speculation.ngrams import PastTexts
from langchain_quantllm.engine.speculation.proposal import DRAFT, FORCED, NGRAM, Proposal
from langchain_quantllm.engine.speculation.sequence_speculation import Acceptance, Guess

if TYPE_CHECKING:
    from langchain_quantllm.engine.sequence import Sequence

MOST_STEP_TOKENS = 128
"""Most tokens of a step that verifies."""

_MOST_PROPOSED = 15  # to a sequence in one step, where none is forced
_MOST_TRIED = 3  # in a try
_CAPS = (1, 3, 7, 15, 31, 63)  # tokens of a sequence: with its last one, those of a bucket
_LEAST_CHANCE = 0.2  # that a token is reached and right, for it to be verified
_LEAST_GAIN = 1.02  # times the tokens a second of single steps
_EXPECTED = {FORCED: 0.95, NGRAM: 0.7, DRAFT: 0.7}  # shares of right proposals before any was verified
_KEPT_OF_ALL = 0.98  # of the counts over all sequences, at each verification
_TRIED_SHARE = 0.02  # of the time, for tries of draft models
_KEPT_PROMPT = 16  # tokens before a text, that it is found by
_MOST_SALTS = 16  # whose texts are kept
_EXPECTED_TOKENS = 128  # of a text, at most, that reading its prompt is for


class Drafter(Protocol):
    """A draft model; see `draft_model`."""

    def unread(self, row: Sequence) -> int | None:
        """Count the tokens that it would read first; None if it cannot propose to a sequence."""
        ...

    def seconds(self, rows: int, count: int, unread: float) -> float | None:
        """Estimate the time of proposals."""
        ...

    def propose(self, counts: abc.Mapping[Sequence, int]) -> abc.Mapping[Sequence, tuple[int, ...]]:
        """Propose tokens; fewer or none where it cannot."""
        ...

    def forget(self, row: Sequence) -> None:
        """Drop what was kept of a sequence."""
        ...


@dataclass(frozen=True)
class _Candidate:
    """A sequence with a guess, and how many of its tokens would be verified."""

    sequence: Sequence
    guess: Guess
    rate: float
    count: int
    drafter: Drafter | None = None
    unread: int = 0

    def gain(self, count: int) -> float:
        """Return how many of so many tokens are expected to be right."""
        return self.rate * (1 - self.rate**count) / (1 - self.rate) if self.rate < 1 else count

    @property
    def acceptance(self) -> Acceptance:
        """Its sequence's record."""
        assert self.sequence.speculation is not None
        return self.sequence.speculation.acceptance[self.guess.source]

    def unread_share(self, gain: float) -> float:
        """Return the part of the unread tokens that one step pays for, if reading a prompt pays over a whole text."""
        left = self.sequence.max_new_tokens - self.sequence.sampled
        return self.unread * min(1.0, (1 + gain) / max(1, min(left, _EXPECTED_TOKENS)))


class Speculator:
    """Chooses the proposals of steps, and learns from their results.

    Attributes:
        no_reason: Why nothing can be proposed; None if it can.
        follows: Whether a step may run while the result of the proposals before it is not known: the device then
            finds a sequence's position by itself.
        most_masked: Most sequences with a mask in a step of which any gets proposals; None for any number.
        proposed: Tokens proposed so far, by all sequences.
        accepted: Those of them that were right.
        drafters: The draft models, by the `draft` of requests' options.
        drafting_s: Time of all their proposals.
    """

    def __init__(self) -> None:
        """Begin without knowledge."""
        self.no_reason: str | None = None
        self.follows = False
        self.most_masked: int | None = None
        self.proposed = self.accepted = 0
        self.costs = StepCosts()
        self.drafters: dict[str, Drafter] = {}
        self._past: OrderedDict[str | None, PastTexts] = OrderedDict()  # by the salt of requests
        self.drafting_s = self._tried_s = 0.0
        self._acceptance = {source: Acceptance(kept=_KEPT_OF_ALL) for source in _EXPECTED}

    def choose(self, rows: abc.Sequence[Sequence]) -> dict[Sequence, Proposal]:
        """Choose the proposals of a step that only decodes.

        Args:
            rows: The sequences that can decode.

        Returns:
            Proposals by sequence, and one of no token for each sequence with proposals in flight.
        """
        chosen = {row: Proposal(len(row.ids)) for row in rows if row.in_flight}
        if self.no_reason is not None or len(rows) >= MOST_STEP_TOKENS:
            return chosen
        masked = sum(row.mask is not None for row in rows)
        is_masked, bars = masked > 0, self.most_masked is not None and masked > self.most_masked
        free = [row for row in rows if not (bars and row.mask is not None)]
        candidates = [candidate for row in free if (candidate := self._candidate(row)) is not None]
        if any(c.drafter is not None for c in candidates) and self.costs.needs_single(len(rows), is_masked=is_masked):
            return chosen
        paying = self._paying(candidates, len(rows), is_masked=is_masked)
        drafted = self._draft([candidate for candidate in paying if candidate.drafter is not None])
        for candidate in paying:
            row, guess, count = candidate.sequence, candidate.guess, candidate.count
            if candidate.drafter is not None:
                guess = replace(guess, tokens=drafted.get(row, ()))
                count = min(count, len(guess.tokens))
            if count:
                chosen[row] = Proposal(len(row.ids), guess.tokens, count, guess.source)
        return chosen

    def awaits(self, row: Sequence) -> bool:
        """Whether a sequence does not run before all its tokens are known, as a draft model then proposes to it."""
        if self.no_reason is not None or row.speculation is None or not row.speculation.drafts or row.is_known:
            return False
        return not row.speculation.acceptance[DRAFT].rests and self._drafter(row) is not None

    def begin(self, row: Sequence) -> None:
        """Let a sequence guess from texts of ended requests: those that could share blocks of their prompts with it."""
        if row.speculation is not None and row.speculation.looks_back and row.request.shares_prefix:
            salt = row.request.options.cache_salt
            row.speculation.past = self._past.setdefault(salt, PastTexts())
            self._past.move_to_end(salt)
            if len(self._past) > _MOST_SALTS:
                self._past.popitem(last=False)

    def end(self, row: Sequence) -> None:
        """Keep the text of a sequence that has ended for others, and drop what draft models keep of it."""
        for drafter in self.drafters.values():
            drafter.forget(row)
        if row.speculation is not None and row.speculation.past is not None:
            row.speculation.past.add(row.ids[max(0, row.prompt_tokens - _KEPT_PROMPT) :])

    def note(self, sequence: Sequence, proposal: Proposal, proposed: int, accepted: int) -> None:
        """Count a verification: the tokens that were proposed, and those of them that were right."""
        if sequence.speculation is not None and proposed:
            sequence.speculation.note(proposal.source, proposed, accepted)
            self._acceptance[proposal.source].note(proposed, accepted)
            self.proposed += proposed
            self.accepted += accepted

    def _candidate(self, row: Sequence) -> _Candidate | None:
        """Return the candidate of a sequence with the likeliest guess; None if it has none, or may have none."""
        speculation = row.speculation
        if speculation is None or row.most_proposed <= 0:
            return None
        found, guess = None, speculation.guess(row.mask)
        if guess is not None:
            # The first tokens of the guess are for the steps in flight.
            left = len(guess.tokens) - (row.written + 1 + row.in_flight - len(row.ids))
            found = self._counted(row, guess, min(left, guess.most))
        if (guess is not None and guess.source == FORCED) or not speculation.drafts or not row.is_known:
            return found
        drafted = self._draft_candidate(row)
        return max((c for c in (found, drafted) if c is not None), key=lambda c: c.rate, default=None)

    def _draft_candidate(self, row: Sequence) -> _Candidate | None:
        assert row.speculation is not None
        drafter = self._drafter(row)
        if drafter is None or not row.speculation.acceptance[DRAFT].begin_step():
            return None
        if (unread := drafter.unread(row)) is None:
            return None
        counted = self._counted(row, Guess((), DRAFT, _MOST_PROPOSED), _MOST_PROPOSED)
        return None if counted is None else replace(counted, drafter=drafter, unread=unread)

    def _drafter(self, row: Sequence) -> Drafter | None:
        draft = row.request.options.draft
        return None if draft is None else self.drafters.get(draft)

    def _counted(self, row: Sequence, guess: Guess, most: int) -> _Candidate | None:
        """Return a candidate with as many tokens, up to `most`, as are likely enough to be right."""
        assert row.speculation is not None
        acceptance = row.speculation.acceptance[guess.source]
        rate = acceptance.rate(self._acceptance[guess.source].rate(_EXPECTED[guess.source]))
        most = min(most, row.most_proposed)
        most = min(most, _MOST_TRIED if acceptance.is_due else most if guess.source == FORCED else _MOST_PROPOSED)
        count = 1
        while count < most and rate ** (count + 1) >= _LEAST_CHANCE:
            count += 1
        return None if most <= 0 else _Candidate(row, guess, rate, count)

    def _draft(self, candidates: abc.Sequence[_Candidate]) -> dict[Sequence, tuple[int, ...]]:
        """Let draft models propose to their sequences; those that get nothing begin a pause, unless they are read."""
        found: dict[Sequence, tuple[int, ...]] = {}
        for drafter in {id(c.drafter): c.drafter for c in candidates}.values():
            assert drafter is not None
            own = {c.sequence: c.count for c in candidates if c.drafter is drafter}
            began_s = time.perf_counter()
            found.update(drafter.propose(own))
            self.drafting_s += time.perf_counter() - began_s
        for candidate in candidates:
            unread = candidate.drafter.unread(candidate.sequence) if candidate.drafter is not None else None
            if candidate.sequence not in found and (unread is None or unread >= candidate.unread):
                candidate.acceptance.rest()
        return found

    def _paying(self, candidates: abc.Sequence[_Candidate], rows: int, *, is_masked: bool) -> list[_Candidate]:
        """Choose the candidates that pay together beside `rows` tokens, and those that are to be tried.

        The others begin a pause.
        """
        ordered = sorted(candidates, key=lambda candidate: candidate.rate, reverse=True)
        best, cap = _fastest(ordered, rows, self.costs, is_masked=is_masked)
        chosen = [replace(candidate, count=min(candidate.count, cap)) for candidate in ordered[:best]]
        for candidate in chosen:
            candidate.acceptance.go_on()
        room = MOST_STEP_TOKENS - rows - sum(candidate.count for candidate in chosen)
        for candidate in ordered[best:]:
            if candidate.acceptance.is_due and candidate.count <= room and self._may_try(candidate):
                chosen.append(candidate)
                candidate.acceptance.is_due = False
                room -= candidate.count
            else:
                candidate.acceptance.rest()
        return chosen

    def _may_try(self, candidate: _Candidate) -> bool:
        """Whether there is time left for a try, which it then takes; without a draft model it takes none."""
        if candidate.drafter is None:
            return True
        seconds = candidate.drafter.seconds(1, candidate.count, candidate.unread)
        if seconds is not None and self._tried_s + seconds > _TRIED_SHARE * self.costs.total_s:
            return False
        self._tried_s += seconds or 0.0
        return True


def _fastest(ordered: abc.Sequence[_Candidate], rows: int, costs: StepCosts, *, is_masked: bool) -> tuple[int, int]:
    """Find how many of the candidates, and how many tokens of each at most, give the most tokens for the time."""
    best, most = (0, 0), _LEAST_GAIN
    for cap in _CAPS if ordered else ():
        tokens, gain, drafts = rows, 0.0, _Drafts(rows)
        for i, candidate in enumerate(ordered, 1):
            count = min(candidate.count, cap)
            of_candidate = candidate.gain(count)
            tokens, gain = tokens + count, gain + of_candidate
            if tokens > MOST_STEP_TOKENS:
                break
            if candidate.drafter is not None:
                drafts.add(candidate.drafter, count, candidate.unread_share(of_candidate))
            cost = costs.ratio(rows, tokens, is_masked=is_masked) + drafts.ratio(costs, is_masked=is_masked)
            if (speed := (rows + gain) / rows / cost) >= most:
                best, most = (i, cap), speed
    return best


class _Drafts:
    """The draft models' part of a step that is weighed: rows, most tokens of one, and tokens to be read, of each."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._parts: dict[int, tuple[Drafter, int, int, float]] = {}

    def add(self, drafter: Drafter, count: int, unread: float) -> None:
        _, rows, most, read = self._parts.get(id(drafter), (drafter, 0, 0, 0.0))
        self._parts[id(drafter)] = (drafter, rows + 1, max(most, count), read + unread)

    def ratio(self, costs: StepCosts, *, is_masked: bool) -> float:
        """Estimate how many times as long as a step of single tokens they take."""
        return sum(
            costs.draft_ratio(self._rows, most, drafter.seconds(rows, most, unread), is_masked=is_masked)
            for drafter, rows, most, unread in self._parts.values()
        )
