"""The measured time of steps, by the number of tokens that they run, and by whether these have masks."""

from __future__ import annotations

import time
from typing import TypeAlias

from langchain_quantllm.engine.step import Step

_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)  # tokens of the steps that are told apart
_FIRST = 2  # steps of a kind that compile and capture
_UNSURE = 5  # steps of a kind of which the fastest counts: others may have waited for a compiler, too
_WEIGHT = 0.1  # of a new time
_OUTLIER = 3.0  # times the mean: another program on the machine, say
_UNKNOWN = 0.2  # the power of a step's tokens that its time is taken to grow by until it is measured
_UNKNOWN_DRAFT = 0.1  # of a single step's time, for a token of a draft model, likewise
_MOST_VERIFYING = 64  # steps between two single ones, so that their time stays known


_Kind: TypeAlias = tuple[bool, bool, int]
"""Whether steps verify, whether they have masks, and their bucket."""


def bucket_of(tokens: int) -> int:
    """Return the bucket of a step: the least one that holds it."""
    return next((bucket for bucket in _BUCKETS if bucket >= tokens), _BUCKETS[-1])


class StepCosts:
    """Seconds of steps: of single tokens, and of steps that verify.

    Steps with masks are told apart: the host fills a mask for each token, which may take longer than the forward.
    """

    def __init__(self) -> None:
        """Begin without times."""
        self._times: dict[_Kind, float] = {}
        self._seen: dict[_Kind, int] = {}
        self._verifying = 0  # steps since the last single one
        self.total_s = 0.0
        """All rounds so far."""

    def note(self, tokens: int, seconds: float, *, verifies: bool, is_masked: bool = False) -> None:
        """Take the time of a step that only decodes."""
        key = (verifies, is_masked, bucket_of(tokens))
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        self._verifying = self._verifying + 1 if verifies else 0
        before = self._times.get(key)
        if seen <= _FIRST:
            return
        if before is None or seen <= _UNSURE:
            self._times[key] = seconds if before is None else min(before, seconds)
        else:
            self._times[key] = before + _WEIGHT * (min(seconds, _OUTLIER * before) - before)

    @property
    def seconds(self) -> dict[str, float]:
        """The measured times, by kind and bucket, such as `"verify 8"` and `"decode 2, masked"`."""
        return {
            f"{'verify' if verifies else 'decode'} {size}{', masked' * is_masked}": seconds
            for (verifies, is_masked, size), seconds in sorted(self._times.items())
        }

    def seconds_of(self, rows: int, *, is_masked: bool = False) -> float | None:
        """Return the time of a step of so many single tokens; None until it is measured."""
        return self._times.get((False, is_masked, bucket_of(rows)))

    def needs_single(self, rows: int, *, is_masked: bool = False) -> bool:
        """Whether the time of single steps of so many tokens is to be measured before others are compared with it."""
        return self.seconds_of(rows, is_masked=is_masked) is None or self._verifying >= _MOST_VERIFYING

    def ratio(self, rows: int, tokens: int, *, is_masked: bool = False) -> float:
        """Estimate how many times as long as a step of so many rows one takes that verifies, with tokens in all."""
        plain = self.seconds_of(rows, is_masked=is_masked)
        verifying = self._times.get((True, is_masked, bucket_of(tokens)))
        if plain is None or verifying is None:
            return float((tokens / rows) ** _UNKNOWN)
        return verifying / plain

    def draft_ratio(self, rows: int, count: int, seconds: float | None, *, is_masked: bool = False) -> float:
        """Estimate how many times as long as a step of so many rows a draft model's proposals take.

        Args:
            rows: Rows of the step.
            count: Most tokens of a proposal.
            seconds: Their time; None if it is not known.
            is_masked: Whether the step has masks.
        """
        plain = self.seconds_of(rows, is_masked=is_masked)
        return count * _UNKNOWN_DRAFT if plain is None or seconds is None else seconds / plain


class StepClock:
    """Times the steps of a loop, by the time between the ends of its rounds."""

    def __init__(self, costs: StepCosts, *, is_late: bool) -> None:
        """Begin to measure.

        Args:
            costs: Takes the times.
            is_late: Whether a round ends with the step that the round before has begun.
        """
        self._costs = costs
        self._is_late = is_late
        self._before: Step | None = None
        self._rounds = 0  # in a row, of steps that only decode
        self._ended_s = self._filled_s = 0.0

    def end_round(self, step: Step | None, aside_s: float = 0.0, filled_s: float = 0.0) -> None:
        """Note the end of a round, and the step that it has begun; None for none.

        Args:
            step: The step.
            aside_s: The part of the round's time that its proposals took.
            filled_s: The part that the step's masks took: they are filled in the round that begins it.
        """
        now_s = time.perf_counter()
        if self._ended_s:
            self._costs.total_s += now_s - self._ended_s
        measured = self._before if self._is_late else step
        self._rounds = self._rounds + 1 if step is not None and not step.chunks else 0
        if measured is not None and self._rounds > 1 + self._is_late:
            seconds = now_s - self._ended_s - aside_s
            if self._is_late:
                seconds += self._filled_s - filled_s
            seconds = max(0.0, seconds)
            is_masked = any(sequence.mask is not None for sequence in measured.decoding)
            self._costs.note(measured.tokens, seconds, verifies=bool(measured.proposals), is_masked=is_masked)
        self._before, self._ended_s, self._filled_s = step, now_s, filled_s
