"""A simulated device for the scheduler, without a model: checks after every step that the plan makes sense.

The value that the device stores for a token depends on all tokens before it, as keys and values do. So a block that is
shared wrongly, or read before it is written, shows in the values that are read.
"""

from __future__ import annotations

from collections import Counter, abc
from dataclasses import dataclass, field

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.scheduler import Scheduler, age
from langchain_quantllm.engine.sequence import Sequence, bare_sequence
from langchain_quantllm.engine.step import PrefillChunk, Step
from tests.support.promises import Watch

VOCAB = 50


class Device:
    """The memory of the blocks: at each place a number for the token there and all before it."""

    def __init__(self, blocks: int) -> None:
        self.memory: list[list[int | None]] = [[None] * BLOCK_TOKENS for _ in range(blocks)]

    def write(self, blocks: abc.Sequence[int], position: int, value: int) -> None:
        self.memory[blocks[position // BLOCK_TOKENS]][position % BLOCK_TOKENS] = value

    def holds(self, blocks: abc.Sequence[int], values: abc.Sequence[int], first: int = 0) -> bool:
        """Whether a sequence with these blocks reads these values, from the block of the first position on."""
        for i in range(max(0, first) // BLOCK_TOKENS * BLOCK_TOKENS, len(values), BLOCK_TOKENS):
            expected = list(values[i : i + BLOCK_TOKENS])
            if self.memory[blocks[i // BLOCK_TOKENS]][: len(expected)] != expected:
                return False
        return True


@dataclass(eq=False)
class Simulated:
    """A sequence, and the device's view of it."""

    number: int
    state: Sequence
    start: int
    """Stands for the prefix id: sequences of different ones have different values for the same tokens."""
    salt: int
    """Sequences of one salt get the same token after the same tokens."""
    ends_after: int
    ids: list[int] = field(default_factory=list)
    """All tokens, pending ones included."""
    values: list[int] = field(default_factory=list)
    computed: int = 0
    """The next position, as far as the device has run."""
    prompt_tokens_run: int = 0
    was_preempted: bool = False
    has_begun: bool = False
    is_gone: bool = False
    was_cancelled: bool = False

    def extend(self, token_id: int) -> None:
        self.ids.append(token_id)
        self.values.append(hash((self.values[-1] if self.values else self.start, token_id)))

    def next_id(self) -> int:
        return hash((self.salt, self.values[-1])) % VOCAB


@dataclass(frozen=True, kw_only=True)
class Before:
    """The scheduler before a step.

    `decoding` can decode, `left` has the tokens left of the prompts that can run, and `could_join` is the oldest
    waiting sequence if it has room.
    """

    running: list[Sequence]
    decoding: list[Sequence]
    left: dict[Sequence, int]
    could_join: Sequence | None


class Simulation:
    """The engine's loop over a simulated device, with checks after every step."""

    def __init__(
        self,
        *,
        blocks: int = 40,
        slots: int = 8,
        step_tokens: int = 64,
        step_tokens_while_decoding: int = 24,
        is_late: bool = False,
        mixes: bool = True,
        window: int = 0,
    ) -> None:
        self.window = window
        self.blocks = BlockManager(blocks)
        self.scheduler = Scheduler(
            self.blocks,
            slots=slots,
            step_tokens=step_tokens,
            step_tokens_while_decoding=step_tokens_while_decoding,
            window=window,
        )
        self.slots = slots
        self.device = Device(blocks)
        self.is_late = is_late
        self.mixes = mixes
        self.decodes_first = False
        """Whether the next step is to decode, of those that do not mix."""
        self.steps_between = 0
        """Decode steps that run in the middle of each step of prompts, of those that do not mix."""
        self.rows: dict[Sequence, Simulated] = {}
        self.all: list[Simulated] = []
        self.steps: list[Step | None] = []
        self.on_way: list[Simulated] = []
        self.most_running = 0
        self.watch: Watch | None = None
        """Checks the scheduler's promises at every step; only where sequences share no blocks."""

    def add(
        self,
        prompt_ids: abc.Sequence[int],
        max_new_tokens: int,
        *,
        prefix_id: int | None = None,
        max_rows: int | None = None,
        owner: int | None = None,
        priority: int = 0,
        salt: int = 0,
        ends_after: int | None = None,
    ) -> Simulated:
        state = bare_sequence(
            prompt_ids, max_new_tokens, prefix_id=prefix_id, max_rows=max_rows, owner=owner, priority=priority
        )
        number = len(self.all)
        start = hash((0, number) if prefix_id is None else (1, prefix_id))
        row = Simulated(number, state, start, salt, max_new_tokens if ends_after is None else ends_after)
        for token_id in prompt_ids:
            row.extend(token_id)
        self.rows[state] = row
        self.all.append(row)
        self.scheduler.add(state)
        return row

    def drop(self, row: Simulated, *, cancels: bool = False) -> None:
        row.is_gone, row.was_cancelled = True, cancels
        del self.rows[row.state]
        self.scheduler.remove(row.state)
        assert row.state.blocks == []

    def finish(self, most_steps: int = 20_000) -> None:
        while self.step():
            assert len(self.steps) < most_steps, "a sequence starves"
        assert not self.scheduler.sequences, "sequences are left that cannot run"
        assert not self.rows
        assert self.blocks.held == 0
        assert self.blocks.available == self.blocks.total - 1

    # One turn of the engine's loop.

    def step(self) -> bool:
        before = self._snapshot()
        preempted = self.scheduler.preempted
        if self.watch is not None:
            self.watch.look()
        plan = self.scheduler.plan(mixes=self.mixes, decodes_first=self.decodes_first)
        budget = self._budget(plan, before)
        if self.watch is not None:
            self.watch.check(plan, budget)
        self._note_preempted()
        self._check_plan(plan, before, budget, self.scheduler.preempted - preempted)
        self.steps.append(plan)
        if plan is None and not self.on_way:
            return False
        self._run_between(plan)
        sampling = [] if plan is None else self._run(plan)
        self.check()
        self._deliver(self.on_way)
        self.on_way = sampling
        if not self.is_late:
            self._deliver(self.on_way)
            self.on_way = []
        self.check()
        return True

    def _budget(self, plan: Step | None, before: Before) -> int | None:
        """Compute the tokens that a plan has for prompts, which get a quarter in any case; None if it only decodes."""
        scheduler = self.scheduler
        if not self.mixes and plan is not None and not plan.chunks:
            assert self.decodes_first or not any(s in before.left and s.slot >= 0 for s in before.running)
            return None
        if before.decoding and self.mixes:
            most = scheduler.step_tokens_while_decoding
            return max(most - len(before.decoding), most // 4, 1)
        return scheduler.step_tokens

    def _run_between(self, plan: Step | None) -> None:
        """Run decode steps in the middle of a step of prompts, as far as there are any."""
        self.decodes_first = plan is not None and bool(plan.chunks)
        if self.mixes or plan is None or not plan.chunks:
            return
        for _ in range(self.steps_between):
            self._deliver(self.on_way)
            self.on_way = []
            between = self.scheduler.plan_beside(plan)
            if self.watch is not None:
                self.watch.steps += 1
            self._note_preempted()
            if between is not None:
                assert not between.chunks
                self.on_way = self._run(between)
                self.decodes_first = False

    def _run(self, plan: Step) -> list[Simulated]:
        for state, position in zip(plan.decoding, plan.positions, strict=True):
            row = self.rows[state]
            assert position == len(row.ids) - 1 == row.computed
            self._compute(row, position, 1)
        # One forward writes all of it before any of it is read.
        for chunk in plan.chunks:
            self._run_chunk(self.rows[chunk.sequence], chunk)
        for chunk in plan.chunks:
            row = self.rows[chunk.sequence]
            values = row.values[: chunk.start + chunk.count]
            assert self.device.holds(chunk.sequence.blocks, values, self._first_seen(chunk.start))
        sampling = [self.rows[state] for state in plan.sampled]
        for row in sampling:
            row.extend(row.next_id())
            assert len(row.ids) - row.state.prompt_tokens == row.state.sampled <= row.state.max_new_tokens
        return sampling

    def _run_chunk(self, row: Simulated, chunk: PrefillChunk) -> None:
        state = row.state
        assert chunk.count >= 1
        assert state.ids == row.ids  # nothing is on its way
        if chunk.start != row.computed:  # the tokens between were found in shared blocks
            assert chunk.start > row.computed
            assert chunk.start % BLOCK_TOKENS == row.computed % BLOCK_TOKENS == 0
            assert state.prefix_id is not None
            if not row.has_begun:
                assert state.cached_tokens == chunk.start
        row.has_begun = True
        assert chunk.is_last == (chunk.start + chunk.count == len(row.ids))
        if state.sampled - chunk.is_last == 0:
            row.prompt_tokens_run += chunk.count
        row.computed = chunk.start
        self._compute(row, chunk.start, chunk.count, reads=False)
        cached = state.cached_tokens
        assert cached is not None
        assert 0 <= cached < state.prompt_tokens
        assert cached % BLOCK_TOKENS == 0
        if chunk.is_last and not row.was_preempted:
            assert cached + row.prompt_tokens_run == state.prompt_tokens

    def _compute(self, row: Simulated, start: int, count: int, *, reads: bool = True) -> None:
        blocks = row.state.blocks
        assert (start + count - 1) // BLOCK_TOKENS < len(blocks), "a position outside of the sequence's blocks"
        if reads:
            seen = self._first_seen(start)
            assert self.device.holds(blocks, row.values[:start], seen), "the values read are not its own prefix"
        for position in range(start, start + count):
            assert blocks[position // BLOCK_TOKENS], "a position in a block that was given back"
            self.device.write(blocks, position, row.values[position])
        row.computed = start + count

    def _first_seen(self, position: int) -> int:
        """Return the first position that a token sees."""
        return position + 1 - self.window if self.window else 0

    def _deliver(self, drawn: abc.Sequence[Simulated]) -> None:
        for row in drawn:
            if row.is_gone:
                continue
            self.scheduler.push(row.state, row.ids[len(row.state.ids)])
            if len(row.state.ids) - row.state.prompt_tokens >= row.ends_after:
                self.drop(row)

    # What must hold: a plain model of the scheduler's promises.

    def _snapshot(self) -> Before:
        scheduler = self.scheduler
        running = list(scheduler.running)
        active = [state for state in running if not state.is_unread]
        return Before(
            running=running,
            decoding=[state for state in active if state.decodes and not state.is_complete],
            left={
                state: len(state.ids) - state.written
                for state in (*active, *scheduler.waiting)
                if not state.decodes and state.is_known and not state.is_unread
            },
            could_join=self._oldest_could_join(),
        )

    def _oldest_could_join(self) -> Sequence | None:
        """Find the oldest waiting sequence if it fits in, even if it shares nothing."""
        scheduler = self.scheduler
        if not scheduler.waiting:
            return None
        oldest, running = scheduler.waiting[0], scheduler.running
        promised = sum(-(-(len(r.ids) + 1) // BLOCK_TOKENS) - len(r.blocks) for r in running if not r.decodes)
        limit = self.slots if oldest.lane.most is None else oldest.lane.most
        fits = (
            oldest.is_known
            and not oldest.is_unread
            and len(running) < self.slots
            and sum(state.lane == oldest.lane for state in running) < limit
            and len(oldest.ids) // BLOCK_TOKENS + 1 + promised + len(running) <= self.blocks.available
        )
        return oldest if fits else None

    def _note_preempted(self) -> None:
        for state in self.scheduler.waiting:
            row = self.rows[state]
            if row.has_begun:
                row.was_preempted = True
                row.computed = 0
                assert (state.blocks, state.slot, state.written, state.decodes) == ([], -1, 0, False)

    def _check_plan(self, plan: Step | None, before: Before, budget: int | None, preempted: int) -> None:
        scheduler = self.scheduler
        if plan is None:
            assert not preempted or self.on_way
            prefilling = [state for state in before.running if state in before.left]
            assert preempted or not (before.decoding or prefilling or before.could_join)
            return
        # All that can decode do, but for those that were preempted for older ones.
        assert plan.decoding == [state for state in before.decoding if state in plan.decoding]
        if self.mixes or budget is None:
            left_out = [state for state in before.decoding if state not in plan.decoding]
            assert all(state.slot < 0 for state in left_out)
            assert len(left_out) <= preempted
        else:
            assert not plan.decoding
        spent = sum(chunk.count for chunk in plan.chunks)
        assert spent <= (budget or 0)
        assert plan.decoding or spent
        states = [chunk.sequence for chunk in plan.chunks]
        assert len(set(states)) == len(states)
        assert not set(states) & set(plan.decoding)
        assert not any(state.is_unread for state in (*states, *plan.decoding))
        if budget is None:
            return
        # A prompt goes on later only if the step is full, with the tokens that were found in shared blocks.
        if any(not chunk.is_last for chunk in plan.chunks) and not preempted:
            found = sum(before.left[c.sequence] - len(c.sequence.ids) + c.start for c in plan.chunks)
            assert spent + found >= budget or scheduler.blocks.available == 0
        self._check_oldest(before, plan, budget, preempted)
        if before.could_join is not None and not preempted:
            passed = any(state in before.left and state not in before.running for state in states)
            assert before.could_join.slot >= 0 or spent == budget or passed
        assert preempted or all(state in scheduler.running for state in before.running)

    def _check_oldest(self, before: Before, plan: Step, budget: int, preempted: int) -> None:
        """Check that the oldest prompt that runs gets half of the budget, as far as it needs it."""
        oldest = min(before.left, key=age, default=None)
        if oldest not in before.running or preempted:
            return
        chunk = next((chunk for chunk in plan.chunks if chunk.sequence is oldest), None)
        assert chunk is not None
        assert chunk.is_last or chunk.count >= -(-budget // 2)

    def check(self) -> None:
        scheduler, blocks = self.scheduler, self.blocks
        scheduler.check_integrity()
        running = list(scheduler.running)
        assert set(running) | set(scheduler.waiting) == set(self.rows)
        assert len(running) + len(scheduler.waiting) == len(self.rows)
        assert scheduler.waiting == sorted(scheduler.waiting, key=age)
        assert len(running) <= self.slots
        self.most_running = max(self.most_running, len(running))
        assert all(0 <= state.slot < self.slots for state in running)
        for lane, count in Counter(state.lane for state in running).items():
            assert lane.most is None or count <= lane.most
        holders: dict[int, list[tuple[Simulated, int]]] = {}
        for state in running:
            assert len(state.blocks) * BLOCK_TOKENS >= state.written
            own = [(i, block) for i, block in enumerate(state.blocks) if block]
            assert len({block for _, block in own}) == len(own)
            assert len(own) == len(state.blocks) or self.window
            for i, block in own:
                holders.setdefault(block, []).append((self.rows[state], i))
        assert 0 not in holders
        assert all(0 < block < blocks.total and blocks.is_held(block) for block in holders)
        assert blocks.held + blocks.available == blocks.total - 1
        for held in holders.values():
            if len(held) > 1:
                # The last value of a block stands for all tokens up to its end.
                assert len({(i, row.values[(i + 1) * BLOCK_TOKENS - 1]) for row, i in held}) == 1
                assert all(row.state.written >= (i + 1) * BLOCK_TOKENS for row, i in held)
                assert len({row.state.prefix_id for row, _ in held}) == 1
                assert held[0][0].state.prefix_id is not None
