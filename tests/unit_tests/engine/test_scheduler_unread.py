"""Sequences whose text is not read: they rest, give way, and hold up no other sequence wherever they wait."""

from __future__ import annotations

import pytest

from langchain_quantllm.engine.scheduler import PASSED_STEPS
from tests.support.scenarios import ids_of
from tests.support.simulation import Simulated, Simulation

BLOCK = 16


def rest(row: Simulated, *, rests: bool = True) -> None:
    """Let a row's text be unread, or read again."""
    row.state.completion.stream.is_full = rests


def run_until_begun(simulation: Simulation, row: Simulated, most_steps: int = 10) -> None:
    for _ in range(most_steps):
        if row.has_begun:
            return
        simulation.step()
    assert row.has_begun, "it is held up"


@pytest.mark.parametrize("is_late", [False, True], ids=["early", "late"])
class TestHoldsUpNobody:
    def test_one_that_has_waited_for_room_and_is_then_not_read(self, is_late: bool) -> None:
        """As a sample does whose siblings fill their common stream."""
        simulation = Simulation(blocks=11, slots=4, is_late=is_late)
        simulation.add(ids_of(0, 3), 3)
        simulation.step()
        large = simulation.add(ids_of(1, 140), 10)
        for step in range(PASSED_STEPS + 30):
            simulation.add(ids_of(step + 10, 3), 8)
            simulation.step()
            if step == PASSED_STEPS - 20:
                assert not large.has_begun
                rest(large)
        for row in list(simulation.rows.values()):
            if row is not large:
                run_until_begun(simulation, row, 500)
        rest(large, rests=False)
        simulation.finish()

    def test_a_queue_of_many(self, is_late: bool) -> None:
        """More than a step looks at."""
        simulation = Simulation(blocks=40, slots=2, is_late=is_late)
        unread = [simulation.add(ids_of(i, 5), 3) for i in range(100)]
        for row in unread:
            rest(row)
        other = simulation.add(ids_of(200, 5), 3)
        run_until_begun(simulation, other)
        for row in unread:
            rest(row, rests=False)
        simulation.finish()

    def test_one_that_runs_under_its_owners_limit(self, is_late: bool) -> None:
        """A program that reads one stream, stops, and makes another call would wait for itself."""
        simulation = Simulation(is_late=is_late)
        first = simulation.add(ids_of(0, 20), 30, max_rows=1, owner=1)
        for _ in range(3):
            simulation.step()
        rest(first)
        second = simulation.add(ids_of(1, 20), 5, max_rows=1, owner=1)
        run_until_begun(simulation, second)
        assert first.was_preempted
        rest(first, rests=False)
        simulation.finish()

    def test_the_first_in_its_owners_queue(self, is_late: bool) -> None:
        simulation = Simulation(slots=1, is_late=is_late)
        first = simulation.add(ids_of(0, 20), 30, max_rows=1, owner=1)
        for _ in range(3):
            simulation.step()
        rest(first)
        run_until_begun(simulation, simulation.add(ids_of(1, 20), 5))  # takes its slot
        assert first.was_preempted
        run_until_begun(simulation, simulation.add(ids_of(2, 20), 5, max_rows=1, owner=1))
        rest(first, rests=False)
        simulation.finish()

    def test_one_in_the_middle_of_its_prompt(self, is_late: bool) -> None:
        """Blocks that it will need are not kept free for it."""
        simulation = Simulation(blocks=21, step_tokens=16, step_tokens_while_decoding=16, is_late=is_late)
        long = simulation.add(ids_of(0, 15 * BLOCK), 5)
        simulation.step()
        rest(long)
        other = simulation.add(ids_of(1, 10 * BLOCK), 5)
        run_until_begun(simulation, other, 3)
        assert not long.was_preempted
        rest(long, rests=False)
        simulation.finish()

    def test_of_two_that_rest_the_younger_gives_its_place_under_the_limit(self, is_late: bool) -> None:
        simulation = Simulation(is_late=is_late)
        rows = [simulation.add(ids_of(i, 20), 30, max_rows=2, owner=1) for i in range(2)]
        for _ in range(3):
            simulation.step()
        for row in rows:
            rest(row)
        run_until_begun(simulation, simulation.add(ids_of(2, 20), 5, max_rows=2, owner=1))
        assert [row.was_preempted for row in rows] == [False, True]
        for row in rows:
            rest(row, rests=False)
        simulation.finish()


def test_none_gives_way_if_that_makes_no_room() -> None:
    """Blocks that several sequences share count once, and those that a running one shares not at all."""
    simulation = Simulation(blocks=31, step_tokens=1000, step_tokens_while_decoding=1000)
    common = ids_of(0, 8 * BLOCK)
    rows = [simulation.add([*common, i], 200, prefix_id=7) for i in range(4)]
    simulation.step()
    simulation.step()
    for row in rows[1:]:
        rest(row)
    large = simulation.add(ids_of(9, 22 * BLOCK), 2)
    simulation.step()
    assert not large.has_begun
    assert not any(row.was_preempted for row in rows)
    for row in rows:
        rest(row, rests=False)
    simulation.finish()


def test_a_sequence_without_room_is_passed_by_others_of_its_owner() -> None:
    simulation = Simulation(blocks=11, slots=4)
    simulation.add(ids_of(0, 100), 10)
    simulation.step()
    large = simulation.add(ids_of(1, 100), 10, max_rows=1, owner=1)
    small = simulation.add(ids_of(2, 3), 2, max_rows=1, owner=1)
    simulation.step()
    assert (large.has_begun, small.has_begun) == (False, True)
    simulation.finish()


def test_it_does_not_count_as_waiting() -> None:
    """Else a bound of waiting requests would refuse calls although the model has nothing to do."""
    simulation = Simulation()
    rows = [simulation.add(ids_of(i, 5), 5) for i in range(3)]
    rest(rows[0])
    assert simulation.scheduler.waiting_count == 2
    rest(rows[0], rests=False)
    assert simulation.scheduler.waiting_count == 3


def test_a_plan_without_steps_says_that_texts_are_unread() -> None:
    """Also if they have been read since: else the engine would take it for sequences that can never run."""
    simulation = Simulation()
    row = simulation.add(ids_of(0, 5), 5)
    simulation.step()
    rest(row)
    assert simulation.scheduler.plan() is None
    rest(row, rests=False)
    assert simulation.scheduler.has_unread
    assert simulation.scheduler.plan() is not None
    assert not simulation.scheduler.has_unread
