"""The scheduler's promises in plain words: checks each step against them, without any of the scheduler's own code.

A `Watch` looks at the sequences before and after each plan of a simulation. It computes from their tokens, blocks,
order and limits alone which prompts could run, and compares. Slow; only for sequences that share no blocks, whose
needs can be counted beforehand.
"""

from __future__ import annotations

import itertools
from collections import Counter, abc
from dataclasses import dataclass, field

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.scheduler import PASSED_STEPS, Scheduler
from langchain_quantllm.engine.sequence import Lane, Sequence
from langchain_quantllm.engine.step import Step

LOOKED_AT, REFUSED = 64, 8
"""Waiting sequences that a step considers, and how many of these it may find no room for."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A sequence before a plan.

    Args:
        order: Its place: by priority, then by arrival.
        runs: Whether it holds a slot.
        rests: Whether its text is not read.
        decodes: Whether its next token can be decoded.
        is_prompt: Whether tokens of it are to be prefilled.
        left: Tokens of it that are not computed.
        held: Blocks that it holds.
        missing: Blocks that it lacks for all its tokens and the next one.
        lane: Its owner's limit.
    """

    order: tuple[int, int]
    runs: bool
    rests: bool
    decodes: bool
    is_prompt: bool
    left: int
    held: int
    missing: int
    lane: Lane


def facts_of(sequence: Sequence) -> Facts:
    """Note a sequence's facts."""
    return Facts(
        order=(sequence.priority, sequence.arrival),
        runs=sequence.slot >= 0,
        rests=sequence.completion.stream.is_full,
        decodes=sequence.decodes and sequence.sampled < sequence.max_new_tokens,
        is_prompt=not sequence.decodes and len(sequence.ids) == sequence.prompt_tokens + sequence.sampled,
        left=len(sequence.ids) - sequence.written,
        held=len(sequence.blocks),
        missing=len(sequence.ids) // BLOCK_TOKENS + 1 - len(sequence.blocks),
        lane=sequence.lane,
    )


@dataclass
class Watch:
    """Checks every step of a scheduler."""

    scheduler: Scheduler
    slots: int
    steps: int = 0
    passed: Counter[Sequence] = field(default_factory=Counter)
    """Steps in which a sequence was the first in order, had no room, and others joined."""
    first_seen: dict[Sequence, int] = field(default_factory=dict)
    """The step in which a sequence was first seen waiting, since it last ran."""
    joins_by_rest: int = 0
    """Sequences that took the place of resting ones."""

    def look(self) -> None:
        """Note everything before a plan."""
        self._all = {s: facts_of(s) for s in (*self.scheduler.running, *self.scheduler.waiting)}
        self._available = self.scheduler.blocks.available
        self._preempted = self.scheduler.preempted

    def check(self, plan: Step | None, budget: int | None) -> None:
        """Compare the plan with what was promised.

        Args:
            plan: The plan.
            budget: Tokens that it had for prompts; None if it was to decode only.
        """
        self.steps += 1
        facts = self._all
        running = [s for s, f in facts.items() if f.runs]
        chunks = {} if plan is None else {chunk.sequence: chunk for chunk in plan.chunks}
        victims = [s for s in running if s.slot < 0]
        joined = [s for s, f in facts.items() if not f.runs and (s.slot >= 0 or s in chunks)]
        self._check_resting(plan, joined)
        self._check_victims(running, victims)
        self._check_lanes()
        resting_victims = [s for s in victims if facts[s].rests]
        self.joins_by_rest += bool(joined and resting_victims)
        # A preempted sequence makes room that nobody can count beforehand.
        if len(victims) > len(resting_victims):
            return
        prompts = [s for s in running if facts[s].is_prompt and not facts[s].rests]
        fitting, unfit = self._could_join(joined, prompts)
        if plan is None:
            assert not prompts, "a prompt stands still"
            assert not any(f.runs and f.decodes and not f.rests for f in facts.values()), "a sequence stands still"
            assert not fitting, "a sequence that has room waits although nothing runs"
        elif budget is not None:
            granted = {s: chunk.count for s, chunk in chunks.items()}
            assert sum(granted.values()) == budget or not fitting, "tokens were left, and a sequence with room waits"
            if self._joined_at_once and len(unfit) < REFUSED and not any(self._has_waited_long(s) for s in joined):
                in_turn = [s for s in fitting if self._has_turn(s, joined, fitting, unfit)]
                self._check_shares([*prompts, *joined, *in_turn], granted, budget)
            self._check_passing([*prompts, *joined, *fitting, *unfit], unfit, joined)
        for sequence, f in facts.items():
            if f.runs or sequence in joined:
                self.first_seen.pop(sequence, None)
                self.passed.pop(sequence, None)
            else:
                self.first_seen.setdefault(sequence, self.steps)

    def _has_waited_long(self, sequence: Sequence) -> bool:
        """Whether it may have been passed for so long that others had to wait for it."""
        return self.steps - self.first_seen.get(sequence, self.steps) >= PASSED_STEPS

    def _check_resting(self, plan: Step | None, joined: abc.Iterable[Sequence]) -> None:
        if plan is None:
            return
        for sequence in (*plan.decoding, *(chunk.sequence for chunk in plan.chunks), *joined):
            assert not self._all[sequence].rests, "a sequence runs although its text is not read"

    def _check_victims(self, running: abc.Sequence[Sequence], victims: abc.Sequence[Sequence]) -> None:
        """Check that resting sequences give way first, then the youngest."""
        facts = self._all
        stayed = [s for s in running if s.slot >= 0]
        for victim in victims:
            for other in stayed:
                ordered = not facts[victim].rests or (facts[other].rests and victim.lane == other.lane)
                if ordered:
                    assert facts[other].order < facts[victim].order, "an older sequence gave way to a younger one"
                assert facts[victim].rests or not facts[other].rests, "a sequence gave way before one that rests"

    def _check_lanes(self) -> None:
        for lane, count in Counter(s.lane for s in self.scheduler.running).items():
            assert lane.most is None or count <= lane.most, "an owner runs more sequences than its limit"

    def _could_join(
        self, joined: abc.Sequence[Sequence], prompts: abc.Sequence[Sequence]
    ) -> tuple[list[Sequence], list[Sequence]]:
        """Divide the waiting sequences that did not join by whether they had room for certain, whatever ran.

        Returns:
            Sequences that had room, and sequences of which none can say so, both in their order.
        """
        facts = self._all
        resting = [f for f in facts.values() if f.runs and f.rests]
        taken_by_decoding = sum(
            len(s.blocks) - f.held for s, f in facts.items() if f.runs and f.decodes and s.slot >= 0
        )
        free = self._available - taken_by_decoding + sum(f.held for f in resting)
        running = sum(f.runs for f in facts.values()) - len(resting) + len(joined)
        promised = sum(facts[s].missing for s in (*prompts, *joined))
        rows = Counter(f.lane for f in facts.values() if f.runs and not f.rests)
        # Else some found room only when a prompt had ended, for what was left of the tokens.
        self._joined_at_once = not joined or promised + running <= free
        fitting: list[Sequence] = []
        unfit: list[Sequence] = []
        for sequence in sorted(facts, key=lambda s: facts[s].order)[:LOOKED_AT]:
            f = facts[sequence]
            rows[f.lane] += sequence in joined  # those behind it in its lane had no place
            if f.runs or sequence in joined or f.rests or not f.is_prompt:
                continue
            if f.lane.most is not None and rows[f.lane] >= f.lane.most:
                continue
            if running == 0 or (running < self.slots and f.missing + promised + running <= free):
                fitting.append(sequence)
            else:
                unfit.append(sequence)
            if self._has_waited_long(sequence):  # none behind it joins before it has
                break
        return fitting if len(unfit) < REFUSED else [], unfit

    def _has_turn(self, sequence: Sequence, *groups: abc.Sequence[Sequence]) -> bool:
        """Whether an owner's limit leaves a place for a sequence, should all before it in its order get one."""
        facts, lane = self._all, sequence.lane
        if lane.most is None:
            return True
        active = [s for s, f in facts.items() if f.runs and not f.rests]
        before = [s for s in itertools.chain(*groups) if facts[s].order < facts[sequence].order]
        return sum(s.lane == lane for s in {*active, *before}) < lane.most

    def _check_shares(self, prompts: abc.Sequence[Sequence], granted: abc.Mapping[Sequence, int], budget: int) -> None:
        """Check half of the tokens for the oldest, and the shortest first for the rest; no token is wasted."""
        if not prompts:
            return
        facts = self._all
        spent = sum(granted.values())
        assert spent <= budget
        oldest = min(prompts, key=lambda s: facts[s].order)
        assert granted.get(oldest, 0) >= min(facts[oldest].left, -(-budget // 2)), "the oldest got less than half"
        short = [s for s in prompts if granted.get(s, 0) < facts[s].left]
        assert spent == budget or not short, "tokens were left over, and a prompt waits"
        served = [s for s in granted if s is not oldest]
        for waiting in short:
            for other in served if waiting is not oldest else ():
                first, second = ((facts[s].left, facts[s].order) for s in (other, waiting))
                assert first <= second, "a longer prompt went before a shorter one"
        longer = granted.get(oldest, 0) - -(-budget // 2)
        if longer > 0:  # more than half only for what no shorter prompt needs
            assert not any(facts[s].left < facts[oldest].left for s in short), "a shorter prompt waits for the oldest"

    def _check_passing(
        self, prompts: abc.Sequence[Sequence], unfit: abc.Sequence[Sequence], joined: abc.Sequence[Sequence]
    ) -> None:
        """Check that the first in order is not passed for too long while it has no room."""
        facts = self._all
        first = min(prompts, key=lambda s: facts[s].order, default=None)
        if first is not None and first in unfit and joined:
            self.passed[first] += 1
            assert self.passed[first] <= PASSED_STEPS, "a sequence without room was passed for too long"


def longest_wait(prompts: abc.Iterable[tuple[int, int]], scheduler: Scheduler) -> int:
    """Compute a bound of the steps in which all of these sequences end, if no others come and all text is read.

    In each step the first in order of those that run gets its token, or half of the prompts' tokens. It may have to
    compute all of its tokens again, once for each time that it is preempted by one before it.

    Args:
        prompts: Tokens of the prompt, and new tokens at most, of each sequence.
        scheduler: Its budgets count.
    """
    most = scheduler.step_tokens_while_decoding
    half = -(-max(1, most // 4) // 2)
    work = [-(-(prompt + new) // half) + new + 2 for prompt, new in prompts]
    return 2 * sum(work) + PASSED_STEPS
