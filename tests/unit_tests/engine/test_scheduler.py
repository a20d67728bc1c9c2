"""Pages and scheduler, without a model: a simulated device checks, step by step, that what it is told makes sense.

What the device stores for a token depends on all tokens before it, as keys and values do. So a
page that is shared where it should not be, or read before it is written, shows in what is read.
"""

from __future__ import annotations

import random
from collections import abc
from dataclasses import dataclass, field
from typing import Any

import pytest

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.scheduler import Decode, Prefill, PrefillChunk, Scheduler
from langchain_quantllm.engine.sequence import Sequence, bare_sequence

VOCAB = 50


class Device:
    """What a page holds at each place: a number that stands for the token there and all before it."""

    def __init__(self, pages: int) -> None:
        self.memory: list[list[int | None]] = [[None] * BLOCK_TOKENS for _ in range(pages)]

    def write(self, pages: abc.Sequence[int], position: int, value: int) -> None:
        self.memory[pages[position // BLOCK_TOKENS]][position % BLOCK_TOKENS] = value

    def holds(self, pages: abc.Sequence[int], values: abc.Sequence[int]) -> bool:
        """Whether a row that has these pages reads these values."""
        for i in range(0, len(values), BLOCK_TOKENS):
            expected = list(values[i : i + BLOCK_TOKENS])
            if self.memory[pages[i // BLOCK_TOKENS]][: len(expected)] != expected:
                return False
        return True


@dataclass(eq=False)
class Simulated:
    """A row with what the device knows of it."""

    number: int
    state: Sequence
    start: int
    """Stands for the prefix_id: rows of different ones hold different values for the same tokens."""
    salt: int
    """Rows of one salt write the same after the same tokens."""
    ends_after: int
    ids: list[int] = field(default_factory=list)
    """All tokens, those on their way to the host included."""
    values: list[int] = field(default_factory=list)
    computed: int = 0
    """Position that comes next, as far as the device has been told."""
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


class Simulation:
    """The loop of the engine over a simulated device, with all that must hold after every step."""

    def __init__(
        self,
        *,
        pages: int = 40,
        slots: int = 8,
        prefill_tokens: int = 64,
        prefill_tokens_beside: int = 24,
        is_late: bool = False,
    ) -> None:
        self.pages = BlockManager(pages)
        self.scheduler = Scheduler(
            self.pages, slots=slots, prefill_tokens=prefill_tokens, prefill_tokens_beside=prefill_tokens_beside
        )
        self.slots = slots
        self.device = Device(pages)
        self.is_late = is_late
        self.rows: dict[Sequence, Simulated] = {}
        self.all: list[Simulated] = []
        self.steps: list[Prefill | Decode | None] = []
        self.on_way: list[Simulated] = []
        self.most_running = 0

    def add(
        self,
        prompt_ids: abc.Sequence[int],
        max_new_tokens: int,
        *,
        prefix_id: int | None = None,
        max_rows: int | None = None,
        salt: int = 0,
        ends_after: int | None = None,
    ) -> Simulated:
        state = bare_sequence(prompt_ids, max_new_tokens, prefix_id=prefix_id, max_rows=max_rows)
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
            assert len(self.steps) < most_steps, "somebody starves"
        assert not self.scheduler.sequences, "rows are left that cannot run"
        assert not self.rows
        assert self.pages.held == 0
        assert self.pages.available == self.pages.total - 1

    # One turn of the engine's loop.

    def step(self) -> bool:
        before = self._snapshot()
        preempted = self.scheduler.preempted
        plan = self.scheduler.plan()
        self._note_preempted()
        self._check_plan(plan, before, self.scheduler.preempted - preempted)
        self.steps.append(plan)
        if plan is None and not self.on_way:
            return False
        drawing = [] if plan is None else self._run(plan)
        self.check()
        if self.is_late:
            self._deliver(self.on_way)
            self.on_way = drawing
        else:
            self._deliver(drawing)
        self.check()
        return True

    def _run(self, plan: Prefill | Decode) -> list[Simulated]:
        if isinstance(plan, Decode):
            assert plan.sequences
            assert len(set(plan.sequences)) == len(plan.sequences)
            drawing = [self.rows[state] for state in plan.sequences]
            for row, position in zip(drawing, plan.positions, strict=True):
                assert position == len(row.ids) - 1 == row.computed
                self._compute(row, position, 1)
        else:
            drawing = []
            for chunk in plan.chunks:
                row = self.rows[chunk.sequence]
                self._run_chunk(row, chunk)
                if chunk.is_last:
                    drawing.append(row)
            for chunk in plan.chunks:  # one forward has written all of it before any of it is read
                row = self.rows[chunk.sequence]
                assert self.device.holds(chunk.sequence.blocks, row.values[: chunk.start + chunk.count])
        for row in drawing:
            row.extend(row.next_id())
            assert len(row.ids) - row.state.prompt_tokens == row.state.sampled <= row.state.max_new_tokens
        return drawing

    def _run_chunk(self, row: Simulated, chunk: PrefillChunk) -> None:
        state = row.state
        assert chunk.count >= 1
        assert state.ids == row.ids  # nothing is on its way
        if chunk.start != row.computed:  # what lies between was found in pages of others
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
        self._compute(row, chunk.start, chunk.count)
        cached = state.cached_tokens
        assert cached is not None
        assert 0 <= cached < state.prompt_tokens
        assert cached % BLOCK_TOKENS == 0
        if chunk.is_last and not row.was_preempted:
            assert cached + row.prompt_tokens_run == state.prompt_tokens

    def _compute(self, row: Simulated, start: int, count: int) -> None:
        pages = row.state.blocks
        assert (start + count - 1) // BLOCK_TOKENS < len(pages), "a position outside of the row's pages"
        assert self.device.holds(pages, row.values[:start]), "what is read is not the row's own beginning"
        for position in range(start, start + count):
            self.device.write(pages, position, row.values[position])
        row.computed = start + count

    def _deliver(self, drawn: abc.Sequence[Simulated]) -> None:
        for row in drawn:
            if row.is_gone:
                continue
            self.scheduler.push(row.state, row.ids[len(row.state.ids)])
            if len(row.state.ids) - row.state.prompt_tokens >= row.ends_after:
                self.drop(row)

    # What must hold.

    def _snapshot(self) -> tuple[list[Sequence], list[Sequence], list[Sequence], bool]:
        running = list(self.scheduler.running)
        decoding = [row for row in running if row.decodes and not row.is_complete]
        prefilling = [row for row in running if not row.decodes]
        return running, decoding, prefilling, self._next_could_join()

    def _next_could_join(self) -> bool:
        """Whether the first that waits surely fits in, even if nothing of it were shared."""
        scheduler = self.scheduler
        if not scheduler.waiting:
            return False
        row, running = scheduler.waiting[0], scheduler.running
        return (
            row.is_known
            and len(running) < min([self.slots, *(r.max_rows for r in (*running, row) if r.max_rows is not None)])
            and len(row.ids) // BLOCK_TOKENS + 1 + len(running) <= self.pages.available
        )

    def _note_preempted(self) -> None:
        for state in self.scheduler.waiting:
            row = self.rows[state]
            if row.has_begun:
                row.was_preempted = True
                row.computed = 0
                assert (state.blocks, state.slot, state.written, state.decodes) == ([], -1, 0, False)

    def _check_plan(
        self,
        plan: Prefill | Decode | None,
        before: tuple[list[Sequence], list[Sequence], list[Sequence], bool],
        preempted: int,
    ) -> None:
        running, decoding, prefilling, could_join = before
        scheduler = self.scheduler
        just_prefilled = bool(self.steps) and isinstance(self.steps[-1], Prefill)
        if plan is None:
            assert not preempted or self.on_way
            assert preempted or not (decoding or prefilling or could_join)
        elif isinstance(plan, Decode):
            # Whoever can decode does, but for rows that gave their pages to older ones.
            assert [row for row in decoding if row.slot >= 0] == plan.sequences
            assert len(decoding) - len(plan.sequences) <= preempted
            if not just_prefilled:
                assert not prefilling or preempted
                assert not could_join
        else:
            assert not (just_prefilled and decoding), "decoding waits for a second prefill"
            budget = scheduler.prefill_tokens_beside if decoding else scheduler.prefill_tokens
            spent = sum(chunk.count for chunk in plan.chunks)
            assert 0 < spent <= budget
            numbers = [self.rows[chunk.sequence].number for chunk in plan.chunks]
            assert numbers == sorted(set(numbers))
            # An older row's prompt is run to its end before a younger one gets any.
            assert all(chunk.is_last for chunk in plan.chunks[:-1])
            if prefilling and prefilling[0].slot >= 0:
                assert plan.chunks[0].sequence is prefilling[0]
            if not plan.chunks[-1].is_last:
                assert spent == budget
        if not preempted:
            assert scheduler.running[: len(running)] == running

    def check(self) -> None:
        scheduler, pages = self.scheduler, self.pages
        running = list(scheduler.running)
        # First come, first served: whoever runs came before all that wait, and nobody is lost.
        order = [self.rows[state].number for state in (*running, *scheduler.waiting)]
        assert order == sorted(self.rows[state].number for state in self.rows)
        assert len(running) <= self.slots
        self.most_running = max(self.most_running, len(running))
        slots = [state.slot for state in running]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < self.slots for slot in slots)
        assert all(len(running) <= state.max_rows for state in running if state.max_rows is not None)
        holders: dict[int, list[tuple[Simulated, int]]] = {}
        for state in running:
            assert len(state.blocks) * BLOCK_TOKENS >= state.written
            assert len(set(state.blocks)) == len(state.blocks)
            for i, page in enumerate(state.blocks):
                holders.setdefault(page, []).append((self.rows[state], i))
        for state in scheduler.waiting:
            assert (state.blocks, state.slot) == ([], -1)
        assert 0 not in holders
        assert all(0 < page < pages.total and pages.is_held(page) for page in holders)
        assert pages.held == len(holders)
        assert pages.held + pages.available == pages.total - 1
        for held in holders.values():
            if len(held) > 1:
                # The last value of a page stands for all tokens up to it.
                assert len({(i, row.values[(i + 1) * BLOCK_TOKENS - 1]) for row, i in held}) == 1
                assert all(row.state.written >= (i + 1) * BLOCK_TOKENS for row, i in held)
                assert len({row.state.prefix_id for row, _ in held}) == 1
                assert held[0][0].state.prefix_id is not None


def ids_of(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(count)]


def expected_ids(row: Simulated) -> list[int]:
    """What a row writes that runs alone, all of it computed once."""
    alone = Simulated(row.number, row.state, row.start, row.salt, row.ends_after)
    for token_id in row.ids[: row.state.prompt_tokens]:
        alone.extend(token_id)
    for _ in range(row.ends_after):
        alone.extend(alone.next_id())
    return alone.ids


def random_simulation(seed: int, *, is_late: bool, is_tight: bool) -> Simulation:
    """Make a scenario: rows that come over time, some with common beginnings; with few pages if tight."""
    rng = random.Random(seed)
    longest = rng.choice([20, 60, 150])
    row_pages = -(-(2 * longest) // BLOCK_TOKENS)
    simulation = Simulation(
        # A tight pool holds the longest row there may be, and little more.
        pages=1 + row_pages + (rng.randrange(3) if is_tight else rng.randrange(4, 40)),
        slots=rng.choice([1, 2, 3, 8, 32]) if not is_tight else rng.choice([2, 4, 16]),
        prefill_tokens=rng.choice([5, 16, 40, 128]),
        prefill_tokens_beside=rng.choice([1, 7, 16, 32]),
        is_late=is_late,
    )
    prefix_ids = [None, simulation.pages.new_prefix_id(), simulation.pages.new_prefix_id()]
    beginnings = [ids_of(seed * 10 + i, longest) for i in range(3)]
    for number in range(rng.randrange(1, 16)):
        ids = rng.choice(beginnings)[: rng.randrange(longest)] + ids_of(seed * 1000 + number, rng.randrange(1, 12))
        ids = ids[:longest]
        max_new_tokens = rng.randrange(1, longest)
        simulation.add(
            ids,
            max_new_tokens,
            prefix_id=rng.choice(prefix_ids),
            max_rows=rng.choice([None] * 30 + [1, 2, 5]),
            salt=rng.choice([0, 0, number]),
            ends_after=rng.choice([max_new_tokens, max_new_tokens, rng.randrange(1, max_new_tokens + 1)]),
        )
        for _ in range(rng.choice([0, 0, 0, 1, 10])):
            simulation.step()
    return simulation


@pytest.mark.parametrize("is_tight", [False, True], ids=["roomy", "tight"])
@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
class TestScenarios:
    @pytest.mark.parametrize("seed", range(60))
    def test_every_row_writes_what_it_would_alone(self, seed: int, is_late: bool, is_tight: bool) -> None:
        simulation = random_simulation(seed, is_late=is_late, is_tight=is_tight)
        simulation.finish()
        for row in simulation.all:
            assert row.state.ids == expected_ids(row)
            assert len(row.state.ids) == row.state.prompt_tokens + row.ends_after

    @pytest.mark.parametrize("seed", range(1000, 1040))
    def test_removing_rows_leaves_nothing_behind(self, seed: int, is_late: bool, is_tight: bool) -> None:
        simulation = random_simulation(seed, is_late=is_late, is_tight=is_tight)
        rng = random.Random(seed)
        simulation.add(ids_of(seed, 5), 2)
        while True:
            if simulation.rows and (rng.random() < 0.2 or not any(row.was_cancelled for row in simulation.all)):
                simulation.drop(rng.choice(list(simulation.rows.values())), cancels=True)
                simulation.check()
            if not simulation.step():
                break
        simulation.finish()
        for row in simulation.all:
            if not row.was_cancelled:
                assert row.state.ids == expected_ids(row)

    def test_scenarios_are_such_as_to_show_something(self, is_late: bool, is_tight: bool) -> None:
        """Many rows beside each other, shared beginnings, long prompts in chunks; rows put back where it is tight."""
        simulations = [random_simulation(seed, is_late=is_late, is_tight=is_tight) for seed in range(25)]
        for simulation in simulations:
            simulation.finish()
        steps = [step for simulation in simulations for step in simulation.steps]
        assert max(simulation.most_running for simulation in simulations) >= (3 if is_tight else 6)
        assert sum(bool(row.state.cached_tokens) for simulation in simulations for row in simulation.all) > 10
        assert sum(not chunk.is_last for step in steps if isinstance(step, Prefill) for chunk in step.chunks) > 50
        if is_tight:
            assert sum(simulation.scheduler.preempted > 0 for simulation in simulations) >= 5
        if is_late:  # the last rows wait for tokens that are on their way
            assert None in steps[:-1]


class TestOrder:
    @pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
    def test_prefill_and_decode_take_turns(self, is_late: bool) -> None:
        simulation = Simulation(prefill_tokens=16, prefill_tokens_beside=8, is_late=is_late)
        simulation.add(ids_of(0, 16), 30)
        simulation.step()
        for i in range(3):
            simulation.add(ids_of(i, 40), 30)
        for _ in range(30):
            simulation.step()
        kinds = [type(step) for step in simulation.steps]
        assert kinds == [Prefill, *[Decode, Prefill] * 15]
        counts = [sum(chunk.count for chunk in step.chunks) for step in simulation.steps if isinstance(step, Prefill)]
        assert counts == [16] + [8] * 15
        simulation.finish()

    def test_prompts_are_packed_up_to_the_budget(self) -> None:
        simulation = Simulation(prefill_tokens=50)
        rows = [simulation.add(ids_of(i, 20), 2).state for i in range(4)]
        simulation.step()
        first = simulation.steps[0]
        assert isinstance(first, Prefill)
        assert first.chunks == [
            PrefillChunk(rows[0], 0, 20, True),
            PrefillChunk(rows[1], 0, 20, True),
            PrefillChunk(rows[2], 0, 10, False),
        ]
        simulation.step()  # those two decode before the others go on
        assert isinstance(simulation.steps[1], Decode)
        assert simulation.steps[1].sequences == rows[:2]
        simulation.finish()

    def test_a_small_row_does_not_overtake_a_large_one(self) -> None:
        """Else a stream of small requests would keep a large one waiting for ever."""
        simulation = Simulation(pages=11, slots=4)
        simulation.add(ids_of(0, 100), 10)
        simulation.step()
        large = simulation.add(ids_of(1, 100), 10)
        small = simulation.add(ids_of(2, 3), 10)
        while not large.has_begun:
            assert not small.has_begun
            assert simulation.step()
        simulation.finish()

    @pytest.mark.parametrize("max_rows", [1, 2, 3])
    def test_no_more_rows_than_one_of_them_allows(self, max_rows: int) -> None:
        """Whoever comes later does not break what an earlier one was promised, and the other way round."""
        for limits in ([max_rows] * 6, [None, None, None, None, max_rows, None], [max_rows, *[None] * 5]):
            simulation = Simulation()
            for i, limit in enumerate(limits):
                simulation.add(ids_of(i, 10), 5 + i, max_rows=limit)
            simulation.finish()
            assert simulation.most_running == max_rows if limits[-1] == max_rows else simulation.most_running >= 1

    def test_slots_bound_the_rows(self) -> None:
        simulation = Simulation(slots=3)
        for i in range(10):
            simulation.add(ids_of(i, 10), 5)
        simulation.finish()
        assert simulation.most_running == 3

    def test_a_row_that_wants_one_token_never_decodes(self) -> None:
        simulation = Simulation()
        simulation.add(ids_of(0, 10), 1)
        simulation.finish()
        assert [type(step) for step in simulation.steps] == [Prefill, type(None)]

    def test_an_empty_scheduler_plans_nothing(self) -> None:
        scheduler = Simulation().scheduler
        assert scheduler.plan() is None
        assert not scheduler.sequences


@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
class TestTooFewPages:
    @pytest.mark.parametrize("rows", [2, 3, 8])
    def test_rows_that_grow_beyond_the_pool_all_end(self, is_late: bool, rows: int) -> None:
        """Each fits alone and no two of them do: the youngest give way, and come again."""
        simulation = Simulation(pages=9, is_late=is_late)  # 128 tokens
        for i in range(rows):
            simulation.add(ids_of(i, 16), 112)
        simulation.finish()
        assert simulation.scheduler.preempted >= rows - 1
        for row in simulation.all:
            assert len(row.state.ids) == 128
            assert row.state.ids == expected_ids(row)

    def test_the_oldest_is_never_preempted(self, is_late: bool) -> None:
        simulation = Simulation(pages=9, is_late=is_late)
        for i in range(4):
            simulation.add(ids_of(i, 16), 112)
        simulation.finish()
        assert [row.was_preempted for row in simulation.all] == [False, True, True, True]

    def test_a_newcomer_waits_rather_than_be_preempted_at_once(self, is_late: bool) -> None:
        """Each row that runs is about to need one page more, and has it before anybody new begins."""
        simulation = Simulation(pages=4, is_late=is_late)
        for i in range(6):
            simulation.add(ids_of(i, 10), 20)
        simulation.step()
        assert len(simulation.scheduler.running) == 2  # one page each, and one for the first of them to grow
        simulation.finish()

    def test_a_row_that_was_preempted_finds_its_own_pages(self, is_late: bool) -> None:
        """As far as nobody else has needed them: only the rest is computed again."""
        simulation = Simulation(pages=10, is_late=is_late)
        prefix_id = simulation.pages.new_prefix_id()
        first = simulation.add(ids_of(0, 16), 60, prefix_id=prefix_id)
        second = simulation.add(ids_of(1, 64), 40, prefix_id=prefix_id)
        while not second.was_preempted:
            assert simulation.step()
        begun = len(simulation.steps)
        simulation.finish()
        again = [
            chunk
            for step in simulation.steps[begun - 1 :]
            if isinstance(step, Prefill)
            for chunk in step.chunks
            if chunk.sequence is second.state
        ]
        assert again[0].start >= 16
        assert not first.was_preempted
        assert second.state.cached_tokens == 0  # it says what was there when it came


class TestSharing:
    def share(self, *lengths: int, prefix_ids: abc.Sequence[int | None] = (7, 7), common: int = 64) -> list[Simulated]:
        """Run rows at once whose prompts agree in their first tokens."""
        simulation = Simulation(prefill_tokens=10_000)
        rows = []
        for i, length in enumerate(lengths):
            ids = ids_of(99, min(common, length)) + ids_of(i, max(0, length - common))
            rows.append(simulation.add(ids, 3, prefix_id=prefix_ids[i % len(prefix_ids)]))
        simulation.step()
        simulation.finish()
        return rows

    def cached(self, *lengths: int, **options: Any) -> list[int | None]:
        return [row.state.cached_tokens for row in self.share(*lengths, **options)]

    def test_within_one_step(self) -> None:
        assert self.cached(70, 80, 100) == [0, 64, 64]

    def test_only_full_pages(self) -> None:
        assert self.cached(70, 70, common=47) == [0, 32]
        assert self.cached(70, 70, common=15) == [0, 0]

    @pytest.mark.parametrize(("length", "expected"), [(1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (64, 48)])
    def test_the_last_token_is_always_computed(self, length: int, expected: int) -> None:
        """Of two equal prompts: the next token is drawn from what the last one gives."""
        assert self.cached(length, length) == [0, expected]

    def test_prefix_ids_share_with_their_like_only(self) -> None:
        assert self.cached(70, 70, 70, 70, prefix_ids=(7, 8)) == [0, 0, 64, 64]

    def test_without_a_prefix_id_nothing_is_shared(self) -> None:
        assert self.cached(70, 70, 70, prefix_ids=(None,)) == [0, 0, 0]
        assert self.cached(70, 70, 70, prefix_ids=(7, None, 7)) == [0, 0, 64]

    def test_the_same_tokens_elsewhere_are_something_else(self) -> None:
        """What a page holds depends on all that comes before it."""
        simulation = Simulation(prefill_tokens=1000)
        page = ids_of(5, BLOCK_TOKENS)
        simulation.add(page * 4, 2, prefix_id=7)
        other = simulation.add(ids_of(6, BLOCK_TOKENS) + page * 3, 2, prefix_id=7)
        simulation.finish()
        assert other.state.cached_tokens == 0

    def test_over_time(self) -> None:
        """A page stays known after its row has ended, with the tokens that were written."""
        simulation = Simulation()
        first = simulation.add(ids_of(0, 40), 30, prefix_id=7)
        simulation.finish()
        again = simulation.add(ids_of(0, 40), 3, prefix_id=7)
        simulation.finish()
        # As the next turn of a chat: what was asked, what was answered, and something more.
        next_turn = simulation.add([*first.state.ids, *ids_of(1, 10)], 3, prefix_id=7)
        simulation.finish()
        assert again.state.cached_tokens == 32
        assert next_turn.state.cached_tokens == 64  # 69 of its 70 tokens are in the pages, 64 in full ones

    @pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
    def test_with_a_row_that_is_still_at_work(self, is_late: bool) -> None:
        """In the middle of its prompt: full pages are shared as soon as they are planned."""
        simulation = Simulation(prefill_tokens=20, prefill_tokens_beside=20, is_late=is_late)
        simulation.add(ids_of(0, 60), 50, prefix_id=7)
        simulation.step()
        second = simulation.add(ids_of(0, 60), 50, prefix_id=7)
        simulation.finish()
        assert second.state.cached_tokens == 48

    def test_shared_pages_count_once(self) -> None:
        """Ten rows of 100 common tokens fit where three would alone."""
        simulation = Simulation(pages=26, slots=10, prefill_tokens=10_000)
        for i in range(10):
            simulation.add([*ids_of(0, 100), i], 8, prefix_id=7)
        simulation.step()
        assert len(simulation.scheduler.running) == 10
        assert simulation.pages.held == 6 + 10
        simulation.finish()
        assert simulation.scheduler.preempted == 0


def fill(pages: BlockManager, prefix_id: int, *tokens: int) -> list[int]:
    """Take and register a page for each number, which stands for its content, and let go of them."""
    taken = []
    for token in tokens:
        page = pages.take()
        assert page is not None
        prefix_id = pages.register(page, prefix_id, [token] * BLOCK_TOKENS)
        taken.append(page)
    pages.release(taken)
    return taken


class TestPages:
    def test_each_page_is_given_out_once_and_page_0_never(self) -> None:
        pages = BlockManager(9)
        taken = [pages.take() for _ in range(8)]
        assert taken == list(range(1, 9))  # from the lowest: memory is touched as late as possible
        assert pages.take() is None
        assert (pages.held, pages.available) == (8, 0)

    def test_kept_pages_are_given_out_last_and_the_longest_unused_first(self) -> None:
        pages = BlockManager(7)
        prefix_id = pages.new_prefix_id()
        (a,), (b,), (c,) = fill(pages, prefix_id, 1), fill(pages, prefix_id, 2), fill(pages, prefix_id, 3)
        assert (pages.held, pages.available) == (0, 6)
        free = [pages.take() for _ in range(3)]
        assert not {a, b, c} & set(free)
        pages.share(a)  # used again
        pages.release([a])
        assert [pages.take() for _ in range(3)] == [b, c, a]
        assert pages.take() is None
        assert all(pages.find(prefix_id, [token] * BLOCK_TOKENS) is None for token in (1, 2, 3))

    def test_of_one_row_the_end_goes_before_the_beginning(self) -> None:
        """A chain that has lost its first page is lost as a whole."""
        pages = BlockManager(4)
        first, second, third = fill(pages, pages.new_prefix_id(), 1, 2, 3)
        assert [pages.take() for _ in range(3)] == [third, second, first]

    def test_a_held_page_is_not_given_out(self) -> None:
        pages = BlockManager(3)
        prefix_id = pages.new_prefix_id()
        (a,), (b,) = fill(pages, prefix_id, 1), fill(pages, prefix_id, 2)
        pages.share(a)
        pages.share(a)
        assert pages.take() == b
        assert pages.take() is None
        pages.release([a])
        assert pages.is_held(a)
        assert pages.take() is None
        pages.release([a])
        assert not pages.is_held(a)
        assert pages.find(prefix_id, [1] * BLOCK_TOKENS) == a
        assert pages.take() == a

    def test_what_a_page_held_before_is_not_found(self) -> None:
        """Neither it nor what came after it, once its place holds something else."""
        pages = BlockManager(3)
        prefix_id = pages.new_prefix_id()
        a, b = fill(pages, prefix_id, 1, 2)
        chain = pages.prefix_id_of(a)
        taken = [page for page in (pages.take(), pages.take()) if page is not None]
        assert taken == [b, a]
        pages.register(a, prefix_id, [9] * BLOCK_TOKENS)
        assert pages.find(prefix_id, [1] * BLOCK_TOKENS) is None
        assert pages.find(pages.prefix_id_of(a), [2] * BLOCK_TOKENS) is None
        assert pages.prefix_id_of(a) != chain

    def test_of_two_equal_pages_one_is_kept(self) -> None:
        """Rows that computed the same beside each other go on as one chain."""
        pages = BlockManager(5)
        prefix_id = pages.new_prefix_id()
        a, b = pages.take(), pages.take()
        assert a is not None
        assert b is not None
        assert pages.register(a, prefix_id, [1] * BLOCK_TOKENS) == pages.register(b, prefix_id, [1] * BLOCK_TOKENS)
        assert pages.find(prefix_id, [1] * BLOCK_TOKENS) == a
        pages.release([a])
        pages.release([b])
        assert (pages.held, pages.available) == (0, 4)
        assert pages.find(prefix_id, [1] * BLOCK_TOKENS) == a

    def test_prefix_ids_are_numbers_of_nobody_else(self) -> None:
        pages = BlockManager(20)
        numbers = []
        for i in range(6):
            numbers.append(pages.new_prefix_id())
            page = pages.take()
            assert page is not None
            numbers.append(pages.register(page, numbers[-1], [i] * BLOCK_TOKENS))
        assert len(set(numbers)) == 12

    @pytest.mark.parametrize("seed", range(20))
    def test_against_a_plain_model(self, seed: int) -> None:
        """Random takes, shares, registers and releases beside a pool that remembers everything in lists."""
        rng = random.Random(seed)
        pages, prefix_id = BlockManager(12), 5
        rows: list[list[int]] = []
        content: dict[int, int] = {}  # what is known of a page; a token stands for its content
        unused: list[int] = []  # known pages that nobody holds, the longest unused first
        for _ in range(400):
            action = rng.random()
            held = {page for row in rows for page in row}
            if action < 0.4:
                page = pages.take()
                free = set(range(1, 12)) - held - set(unused)
                if free:
                    assert page in free
                elif unused:
                    assert page == unused.pop(0)
                    del content[page]
                else:
                    assert page is None
                if page is not None:
                    rows.append([page])
            elif action < 0.6 and rows:
                row = rng.choice(rows)
                if row[0] not in content and sum(row[0] in other for other in rows) == 1:
                    token = rng.randrange(8)
                    pages.register(row[0], prefix_id, [token] * BLOCK_TOKENS)
                    if token not in content.values():
                        content[row[0]] = token
            elif action < 0.75:
                token = rng.randrange(8)
                found = pages.find(prefix_id, [token] * BLOCK_TOKENS)
                assert found == next((page for page, held_token in content.items() if held_token == token), None)
                if found is not None:
                    pages.share(found)
                    rows.append([found])
                    if found in unused:
                        unused.remove(found)
            elif rows:
                row = rows.pop(rng.randrange(len(rows)))
                pages.release(row)
                if row[0] in content and all(row[0] not in other for other in rows):
                    unused.append(row[0])
            held = {page for row in rows for page in row}
            assert pages.held == len(held)
            assert pages.available == 11 - len(held)
            assert all(pages.is_held(page) == (page in held) for page in range(1, 12))
