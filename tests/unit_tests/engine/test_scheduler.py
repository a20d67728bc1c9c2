"""The scheduler on a simulated device: every sequence gets the tokens that it would get alone, and none starves."""

from __future__ import annotations

import random
from collections import abc
from typing import Any

import pytest

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.scheduler import PASSED_STEPS, Scheduler
from langchain_quantllm.engine.sequence import Recomputation, Sequence, bare_sequence
from langchain_quantllm.engine.step import PrefillChunk, Step
from tests.support.scenarios import expected_ids, ids_of, random_simulation
from tests.support.simulation import Simulated, Simulation


@pytest.mark.parametrize("is_tight", [False, True], ids=["roomy", "tight"])
@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
class TestScenarios:
    @pytest.mark.parametrize("seed", range(60))
    def test_every_sequence_gets_the_tokens_that_it_gets_alone(self, seed: int, is_late: bool, is_tight: bool) -> None:
        simulation = random_simulation(seed, is_late=is_late, is_tight=is_tight)
        simulation.finish()
        for row in simulation.all:
            assert row.state.ids == expected_ids(row)
            assert len(row.state.ids) == row.state.prompt_tokens + row.ends_after

    @pytest.mark.parametrize("seed", range(1000, 1040))
    def test_removing_sequences_leaves_nothing_behind(self, seed: int, is_late: bool, is_tight: bool) -> None:
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

    def test_the_scenarios_share_chunk_and_preempt(self, is_late: bool, is_tight: bool) -> None:
        """Else the tests above would show little: many sequences, shared prefixes, long prompts, preemptions."""
        simulations = [random_simulation(seed, is_late=is_late, is_tight=is_tight) for seed in range(25)]
        for simulation in simulations:
            simulation.finish()
        steps = [step for simulation in simulations for step in simulation.steps]
        assert max(simulation.most_running for simulation in simulations) >= (3 if is_tight else 6)
        assert sum(bool(row.state.cached_tokens) for simulation in simulations for row in simulation.all) > 10
        assert sum(not chunk.is_last for step in steps if step is not None for chunk in step.chunks) > 50
        assert sum(bool(step.decoding and step.chunks) for step in steps if step is not None) > 50
        if is_tight:
            assert sum(simulation.scheduler.preempted > 0 for simulation in simulations) >= 5
        if is_late:  # the last rows wait for tokens that are on their way
            assert None in steps[:-1]


def planned(simulation: Simulation) -> Step:
    """Take a step and return its plan."""
    simulation.step()
    step = simulation.steps[-1]
    assert step is not None
    return step


@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
class TestOrder:
    def test_prompts_run_beside_decoding_sequences(self, is_late: bool) -> None:
        simulation = Simulation(step_tokens=16, step_tokens_while_decoding=9, is_late=is_late)
        first = simulation.add(ids_of(0, 16), 30).state
        simulation.step()
        for i in range(3):
            simulation.add(ids_of(i, 40), 30)
        steps = [planned(simulation) for _ in range(5)]
        assert all(step.decoding == [first] for step in steps)
        assert [sum(chunk.count for chunk in step.chunks) for step in steps] == [8] * 5
        simulation.finish()

    def test_prompts_get_a_quarter_of_a_step_however_many_sequences_decode(self, is_late: bool) -> None:
        simulation = Simulation(step_tokens=16, step_tokens_while_decoding=8, is_late=is_late)
        for i in range(7):
            simulation.add(ids_of(i, 2), 30)
        simulation.step()
        simulation.add(ids_of(9, 40), 2)
        step = planned(simulation)
        assert (len(step.decoding), sum(chunk.count for chunk in step.chunks)) == (7, 2)
        simulation.finish()

    def test_prompts_are_packed_up_to_the_budget(self, is_late: bool) -> None:
        simulation = Simulation(step_tokens=50, step_tokens_while_decoding=50, is_late=is_late)
        rows = [simulation.add(ids_of(i, 20), 2).state for i in range(4)]
        assert planned(simulation).chunks == [
            PrefillChunk(rows[0], 0, 20, True),
            PrefillChunk(rows[1], 0, 20, True),
            PrefillChunk(rows[2], 0, 10, False),
        ]
        assert planned(simulation) == Step(
            rows[:2], [20, 20], [PrefillChunk(rows[2], 10, 10, True), PrefillChunk(rows[3], 0, 20, True)]
        )
        simulation.finish()

    def test_a_short_prompt_passes_a_long_one(self, is_late: bool) -> None:
        simulation = Simulation(blocks=200, step_tokens=64, step_tokens_while_decoding=24, is_late=is_late)
        long = simulation.add(ids_of(0, 2000), 2)
        simulation.step()
        short = simulation.add(ids_of(1, 3), 2)
        step = planned(simulation)
        assert [(chunk.sequence, chunk.count) for chunk in step.chunks] == [(long.state, 61), (short.state, 3)]
        simulation.finish()

    def test_short_prompts_leave_the_oldest_half_of_every_step(self, is_late: bool) -> None:
        """However many come: it takes twice as long as alone, and not for ever."""
        simulation = Simulation(blocks=400, slots=8, step_tokens=32, step_tokens_while_decoding=32, is_late=is_late)
        long = simulation.add(ids_of(0, 320), 2)
        steps = 0
        while not long.state.decodes:
            for i in range(4):
                simulation.add(ids_of(steps * 10 + i, 15), 1)
            step = planned(simulation)
            steps += 1
            granted = sum(chunk.count for chunk in step.chunks if chunk.sequence is long.state)
            assert granted >= 16 or long.state.decodes
        assert steps <= 320 // 16
        simulation.finish()

    def test_prompts_of_one_length_run_one_after_another(self, is_late: bool) -> None:
        """Dividing a step among them would delay the first and help nobody."""
        simulation = Simulation(blocks=100, step_tokens=32, step_tokens_while_decoding=32, is_late=is_late)
        rows = [simulation.add(ids_of(i, 64), 1).state for i in range(3)]
        order = [[chunk.sequence for chunk in planned(simulation).chunks] for _ in range(6)]
        assert order == [[rows[0]], [rows[0]], [rows[1]], [rows[1]], [rows[2]], [rows[2]]]
        simulation.finish()

    def test_a_sequence_that_fits_goes_before_one_that_waits_for_room(self, is_late: bool) -> None:
        simulation = Simulation(blocks=11, slots=4, is_late=is_late)
        simulation.add(ids_of(0, 100), 10)
        simulation.step()
        large = simulation.add(ids_of(1, 100), 10)
        small = simulation.add(ids_of(2, 3), 2)
        simulation.step()
        assert (large.has_begun, small.has_begun) == (False, True)
        simulation.finish()

    def test_a_sequence_that_waits_for_room_is_passed_for_a_bounded_time(self, is_late: bool) -> None:
        """Else a stream of small requests would keep a large one waiting for ever."""
        simulation = Simulation(blocks=11, slots=4, is_late=is_late)
        simulation.add(ids_of(0, 3), 3)
        simulation.step()
        large = simulation.add(ids_of(1, 140), 10)
        passed = steps = 0
        while not large.has_begun:
            passed += simulation.add(ids_of(steps, 3), 8).has_begun
            assert simulation.step()
            steps += 1
            assert steps <= PASSED_STEPS + 20
        assert steps >= PASSED_STEPS
        simulation.finish()

    @pytest.mark.parametrize("max_rows", [1, 2, 3])
    def test_a_limit_of_rows_holds_up_its_own_owner_only(self, max_rows: int, is_late: bool) -> None:
        simulation = Simulation(blocks=100, is_late=is_late)
        limited = [simulation.add(ids_of(i, 10), 5 + i, max_rows=max_rows, owner=1) for i in range(5)]
        others = [simulation.add(ids_of(10 + i, 10), 5, max_rows=limit, owner=2) for i, limit in enumerate([None, 4])]
        step = planned(simulation)
        assert {chunk.sequence for chunk in step.chunks} == {row.state for row in (*limited[:max_rows], *others)}
        simulation.finish()

    def test_requests_of_a_lower_number_go_first(self, is_late: bool) -> None:
        simulation = Simulation(slots=1, is_late=is_late)
        simulation.add(ids_of(0, 10), 5)
        simulation.step()
        rows = [simulation.add(ids_of(i, 10), 2, priority=priority) for i, priority in enumerate([5, 0, -1, 0], 1)]
        begun: list[int] = []
        while simulation.step():
            begun += [row.number for row in rows if row.has_begun and row.number not in begun]
        assert begun == [3, 2, 4, 1]

    def test_a_preempted_sequence_is_of_the_highest_number(self, is_late: bool) -> None:
        simulation = Simulation(blocks=9, is_late=is_late)
        rows = [simulation.add(ids_of(i, 16), 60, priority=priority) for i, priority in enumerate([2, 0, 1])]
        simulation.finish()
        assert [row.was_preempted for row in rows[:2]] == [True, False]

    def test_no_more_sequences_run_than_there_are_slots(self, is_late: bool) -> None:
        simulation = Simulation(slots=3, is_late=is_late)
        for i in range(10):
            simulation.add(ids_of(i, 10), 5)
        simulation.finish()
        assert simulation.most_running == 3

    def test_a_sequence_of_one_new_token_never_decodes(self, is_late: bool) -> None:
        simulation = Simulation(is_late=is_late)
        row = simulation.add(ids_of(0, 10), 1)
        simulation.finish()
        assert [step for step in simulation.steps if step] == [Step([], [], [PrefillChunk(row.state, 0, 10, True)])]

    def test_an_empty_scheduler_plans_nothing(self, is_late: bool) -> None:
        scheduler = Simulation(is_late=is_late).scheduler
        assert scheduler.plan() is None
        assert not scheduler.sequences


@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
class TestTooFewBlocks:
    @pytest.mark.parametrize("rows", [2, 3, 8])
    def test_sequences_that_grow_beyond_the_cache_all_end(self, is_late: bool, rows: int) -> None:
        """Each fits alone and no two do: the youngest are preempted, and run again."""
        simulation = Simulation(blocks=9, is_late=is_late)  # 128 tokens
        for i in range(rows):
            simulation.add(ids_of(i, 16), 112)
        simulation.finish()
        assert simulation.scheduler.preempted >= rows - 1
        for row in simulation.all:
            assert len(row.state.ids) == 128
            assert row.state.ids == expected_ids(row)

    def test_the_oldest_sequence_is_never_preempted(self, is_late: bool) -> None:
        simulation = Simulation(blocks=9, is_late=is_late)
        for i in range(4):
            simulation.add(ids_of(i, 16), 112)
        simulation.finish()
        assert [row.was_preempted for row in simulation.all] == [False, True, True, True]

    def test_a_new_sequence_waits_if_it_would_be_preempted_at_once(self, is_late: bool) -> None:
        """Each running sequence soon needs another block, which is kept free for it."""
        simulation = Simulation(blocks=4, is_late=is_late)
        for i in range(6):
            simulation.add(ids_of(i, 10), 20)
        simulation.step()
        assert len(simulation.scheduler.running) == 2  # one block each, and one for the first of them to grow
        simulation.finish()

    def test_a_preempted_sequence_finds_its_own_blocks(self, is_late: bool) -> None:
        """As far as they were not taken: only the rest is computed again."""
        simulation = Simulation(blocks=10, is_late=is_late)
        prefix_id = simulation.blocks.new_prefix_id()
        first = simulation.add(ids_of(0, 16), 60, prefix_id=prefix_id)
        second = simulation.add(ids_of(1, 64), 40, prefix_id=prefix_id)
        while not second.was_preempted:
            assert simulation.step()
        begun = len(simulation.steps)
        simulation.finish()
        again = [
            chunk
            for step in simulation.steps[begun - 1 :]
            if step is not None
            for chunk in step.chunks
            if chunk.sequence is second.state
        ]
        assert again[0].start >= 16
        assert not first.was_preempted
        assert second.state.cached_tokens == 0  # it says what was there when it came


@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("prefix_id", [None, 1])
class TestWindows:
    def test_a_sequence_holds_the_blocks_that_its_next_tokens_see(self, is_late: bool, prefix_id: int | None) -> None:
        simulation = Simulation(blocks=60, step_tokens=32, window=40, is_late=is_late)
        row = simulation.add(ids_of(1, 300), 200, prefix_id=prefix_id)
        most = -(-(40 + 32) // BLOCK_TOKENS) + 1 + is_late * 2  # unknown tokens are not found by others yet
        while simulation.step():
            assert simulation.blocks.held <= most
        assert row.state.ids == expected_ids(row)

    def test_what_it_gives_back_lets_others_run(self, is_late: bool, prefix_id: int | None) -> None:
        preempted = []
        for window in (0, 40):
            simulation = Simulation(blocks=20, step_tokens=32, window=window, is_late=is_late)
            rows = [simulation.add(ids_of(i, 50), 180, prefix_id=prefix_id) for i in range(4)]
            simulation.finish()
            assert all(row.state.ids == expected_ids(row) for row in rows)
            preempted.append(simulation.scheduler.preempted)
        assert preempted[0] > 0
        assert preempted[1] == 0

    def test_others_find_what_it_has_given_back(self, is_late: bool, prefix_id: int | None) -> None:
        simulation = Simulation(blocks=60, step_tokens=32, window=40, is_late=is_late)
        first = simulation.add(ids_of(1, 200), 100, prefix_id=prefix_id)
        for _ in range(20):
            simulation.step()
        assert first.state.given_back
        second = simulation.add([*ids_of(1, 200)[:150], *ids_of(2, 9)], 4, prefix_id=prefix_id)
        simulation.finish()
        assert second.state.cached_tokens == (0 if prefix_id is None else 144)


class TestSharing:
    def share(self, *lengths: int, prefix_ids: abc.Sequence[int | None] = (7, 7), common: int = 64) -> list[Simulated]:
        """Run sequences at once whose prompts agree in their first tokens."""
        simulation = Simulation(step_tokens=10_000)
        rows = []
        for i, length in enumerate(lengths):
            ids = ids_of(99, min(common, length)) + ids_of(i, max(0, length - common))
            rows.append(simulation.add(ids, 3, prefix_id=prefix_ids[i % len(prefix_ids)]))
        simulation.step()
        simulation.finish()
        return rows

    def cached(self, *lengths: int, **options: Any) -> list[int | None]:
        return [row.state.cached_tokens for row in self.share(*lengths, **options)]

    def test_prompts_of_one_step_share(self) -> None:
        assert self.cached(70, 80, 100) == [0, 64, 64]

    def test_only_full_blocks_are_shared(self) -> None:
        assert self.cached(70, 70, common=47) == [0, 32]
        assert self.cached(70, 70, common=15) == [0, 0]

    @pytest.mark.parametrize(("length", "expected"), [(1, 0), (16, 0), (17, 16), (32, 16), (33, 32), (64, 48)])
    def test_the_last_token_is_always_computed(self, length: int, expected: int) -> None:
        """Of two equal prompts too: the next token is sampled from its logits."""
        assert self.cached(length, length) == [0, expected]

    def test_sequences_share_only_under_one_prefix_id(self) -> None:
        assert self.cached(70, 70, 70, 70, prefix_ids=(7, 8)) == [0, 0, 64, 64]

    def test_without_a_prefix_id_nothing_is_shared(self) -> None:
        assert self.cached(70, 70, 70, prefix_ids=(None,)) == [0, 0, 0]
        assert self.cached(70, 70, 70, prefix_ids=(7, None, 7)) == [0, 0, 64]

    def test_the_same_tokens_after_others_are_not_shared(self) -> None:
        """Keys and values depend on all tokens before."""
        simulation = Simulation(step_tokens=1000)
        block = ids_of(5, BLOCK_TOKENS)
        simulation.add(block * 4, 2, prefix_id=7)
        other = simulation.add(ids_of(6, BLOCK_TOKENS) + block * 3, 2, prefix_id=7)
        simulation.finish()
        assert other.state.cached_tokens == 0

    def test_the_next_turn_of_a_chat_shares_the_turns_before(self) -> None:
        """A block can be found after its sequence has ended, with the tokens that were sampled."""
        simulation = Simulation()
        first = simulation.add(ids_of(0, 40), 30, prefix_id=7)
        simulation.finish()
        again = simulation.add(ids_of(0, 40), 3, prefix_id=7)
        simulation.finish()
        # As the next turn of a chat: what was asked, what was answered, and something more.
        next_turn = simulation.add([*first.state.ids, *ids_of(1, 10)], 3, prefix_id=7)
        simulation.finish()
        assert again.state.cached_tokens == 32
        assert next_turn.state.cached_tokens == 64  # 69 of its 70 tokens are in the blocks, 64 in full ones

    @pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
    def test_blocks_of_a_running_sequence_are_shared(self, is_late: bool) -> None:
        """In the middle of its prompt, too: full blocks are shared as soon as they are planned."""
        simulation = Simulation(step_tokens=20, step_tokens_while_decoding=20, is_late=is_late)
        simulation.add(ids_of(0, 60), 50, prefix_id=7)
        simulation.step()
        second = simulation.add(ids_of(0, 60), 50, prefix_id=7)
        simulation.finish()
        assert second.state.cached_tokens == 48

    def test_shared_blocks_count_once(self) -> None:
        """Ten sequences with 100 common tokens fit where three without would."""
        simulation = Simulation(blocks=26, slots=10, step_tokens=10_000)
        for i in range(10):
            simulation.add([*ids_of(0, 100), i], 8, prefix_id=7)
        simulation.step()
        assert len(simulation.scheduler.running) == 10
        assert simulation.blocks.held == 6 + 10
        simulation.finish()
        assert simulation.scheduler.preempted == 0


def test_prompts_that_may_not_be_cut_run_in_one_step_each() -> None:
    scheduler = Scheduler(BlockManager(80), slots=4, step_tokens=32, step_tokens_while_decoding=16, cuts_prompts=False)
    lengths = [300, 5, 90, 17]
    for seed, length in enumerate(lengths):
        scheduler.add(bare_sequence(ids_of(seed, length), 40))
    chunks = []
    while len(chunks) < len(lengths):
        step = scheduler.plan()
        assert step is not None
        chunks += step.chunks
        for sequence in step.sampled:
            scheduler.push(sequence, 0)
    assert sorted(chunk.count for chunk in chunks) == sorted(lengths)
    assert all(chunk.is_last and not chunk.start for chunk in chunks)


def test_a_text_that_gives_way_at_the_length_of_its_recomputation_is_computed_as_the_longer_text() -> None:
    blocks = BlockManager(9)
    scheduler = Scheduler(blocks, slots=3, step_tokens=128, step_tokens_while_decoding=128)
    old, urgent = bare_sequence(range(47), 40), bare_sequence(range(8), 40, priority=-1)
    recomputation = Recomputation(tokens=32, prefix_id=None)
    grown = Sequence(bare_sequence(range(31), 40).completion, recomputation=recomputation)
    for sequence in (old, grown):
        scheduler.add(sequence)
    assert scheduler.plan(mixes=False) is not None
    for sequence in (old, grown):
        scheduler.push(sequence, 7)
    scheduler.add(urgent)
    prompts = scheduler.plan(mixes=False)
    assert prompts is not None
    assert [chunk.sequence for chunk in prompts.chunks] == [urgent]
    beside = scheduler.plan_beside(prompts)
    assert beside is not None
    assert beside.decoding == [old, grown]
    for sequence in (old, grown):
        scheduler.push(sequence, 7)
    while blocks.take() is not None:
        pass
    beside = scheduler.plan_beside(prompts)
    assert beside is not None
    assert beside.decoding == [old]
    assert scheduler.waiting == [grown]
    assert grown.rotary_tokens == len(grown.ids) == 33
