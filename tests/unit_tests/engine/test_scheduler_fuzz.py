"""Random loads of the scheduler against a plain model of its promises: sequences come, rest, are cancelled and end."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from tests.support.promises import Watch, longest_wait
from tests.support.scenarios import expected_ids, ids_of
from tests.support.simulation import Simulated, Simulation


@dataclass(frozen=True)
class Kind:
    """The odds of a load: per step of an arrival, of a change of resting, and of a cancellation.

    Where sequences share blocks or give them back, their values are checked, and the promises that depend on counted
    needs are not.
    """

    arrives: float
    rests: float
    cancels: float
    shares: bool = False
    windows: bool = False


KINDS = {
    "calm": Kind(0.15, 0.0, 0.0),
    "crowded": Kind(0.6, 0.0, 0.02),
    "unread": Kind(0.3, 0.2, 0.02),
    "mostly unread": Kind(0.5, 0.6, 0.0),
    "sharing": Kind(0.4, 0.3, 0.05, shares=True),
    "windows": Kind(0.4, 0.3, 0.05, windows=True),
    "sharing windows": Kind(0.4, 0.3, 0.05, shares=True, windows=True),
}


class Load:
    """A random load of a simulation, with the promises watched at every step."""

    def __init__(self, seed: int, kind: Kind) -> None:
        self._random = rng = random.Random(seed)
        self._seed = seed
        self._kind = kind
        self._longest = rng.choice([20, 60, 150])
        row_blocks = -(-(2 * self._longest) // BLOCK_TOKENS)
        slots = rng.choice([1, 2, 3, 4, 8])
        self.simulation = Simulation(
            blocks=1 + row_blocks + rng.choice([0, 1, 2, 5, 20, 60]),
            slots=slots,
            step_tokens=rng.choice([5, 16, 40, 128]),
            step_tokens_while_decoding=rng.choice([1, 7, 16, 32]),
            is_late=rng.random() < 0.5,
            mixes=rng.random() < 0.6,
            window=rng.choice([1, 16, 20, 50]) if kind.windows else 0,
        )
        self.simulation.steps_between = rng.choice([0, 1, 3])
        if not (kind.shares or kind.windows):
            self.simulation.watch = Watch(self.simulation.scheduler, slots)
        self._prefix_ids = (
            [None, *(self.simulation.blocks.new_prefix_id() for _ in range(2))] if kind.shares else [None]
        )
        self._beginning = ids_of(seed, self._longest)
        self._owners = rng.choice([0, 1, 3])

    def run(self, steps: int) -> None:
        """Run the load, then let all that is read end, then all the rest."""
        rng, kind, simulation = self._random, self._kind, self.simulation
        for _ in range(steps):
            if rng.random() < kind.arrives:
                self._add()
            rows = list(simulation.rows.values())
            if rows and rng.random() < kind.rests:
                row = rng.choice(rows)
                rest(row, not row.state.is_unread)
            if rows and rng.random() < kind.cancels:
                simulation.drop(rng.choice(rows), cancels=True)
            simulation.step()
        self._drain()
        for row in simulation.rows.values():
            rest(row, False)
        self._drain()
        simulation.finish()

    def _add(self) -> None:
        rng = self._random
        longest = rng.choice([4, self._longest, self._longest])
        number = len(self.simulation.all)
        new = rng.randrange(1, longest)
        ids = ids_of(self._seed * 1000 + number, rng.randrange(1, longest + 1))
        if self._kind.shares:
            ids = [*self._beginning[: rng.randrange(self._longest)], *ids][: self._longest]
        self.simulation.add(
            ids,
            new,
            prefix_id=rng.choice(self._prefix_ids),
            max_rows=rng.choice([1, 2, 3]) if self._owners and rng.random() < 0.5 else None,
            owner=rng.randrange(self._owners) if self._owners else None,
            priority=rng.choice([0] * 8 + [-1, 1]),
            ends_after=rng.randrange(1, new + 1),
        )

    def _drain(self) -> None:
        """Take steps until nothing runs any more: all sequences that are read must end, in time."""
        simulation = self.simulation
        work = [(len(row.state.ids), row.ends_after) for row in simulation.rows.values() if not row.state.is_unread]
        most = longest_wait(work, simulation.scheduler)
        steps = 0
        while simulation.step():
            steps += 1
            assert steps <= most, "a sequence starves"
        assert all(row.state.is_unread for row in simulation.rows.values()), "a sequence is left that cannot run"


def rest(row: Simulated, is_full: bool) -> None:
    """Let the row's text be unread, or read."""
    row.state.completion.stream.is_full = is_full


def run_load(seed: int, kind: str, steps: int = 60) -> Simulation:
    load = Load(seed, KINDS[kind])
    load.run(steps)
    for row in load.simulation.all:
        if not row.was_cancelled:
            assert row.state.ids == expected_ids(row)
    return load.simulation


def run_loads(kind: str, seeds: range) -> list[Simulation]:
    """Run a kind of load with each seed; an error names the seed."""
    simulations = []
    for seed in seeds:
        try:
            simulations.append(run_load(seed, kind))
        except AssertionError as error:
            msg = f"load {seed}: {error}"
            raise AssertionError(msg) from error
    return simulations


@pytest.mark.parametrize("kind", KINDS)
class TestPromises:
    def test_every_step_of_a_random_load_keeps_them(self, kind: str) -> None:
        simulations = run_loads(kind, range(25))
        # Else the loads would show little.
        assert sum(simulation.scheduler.preempted > 0 for simulation in simulations) >= (1 if kind == "calm" else 3)
        assert sum(not chunk.is_last for s in simulations for step in s.steps if step for chunk in step.chunks) > 100
        if "unread" in kind:
            assert sum(s.watch.joins_by_rest for s in simulations if s.watch is not None) > 10

    @pytest.mark.slow
    def test_every_step_of_many_loads_keeps_them(self, kind: str) -> None:
        run_loads(kind, range(1000, 2000))

    @pytest.mark.slow
    def test_every_step_of_long_loads_keeps_them(self, kind: str) -> None:
        """Long enough for sequences to be passed as long as they may."""
        for seed in range(5):
            run_load(seed, kind, steps=1500)
