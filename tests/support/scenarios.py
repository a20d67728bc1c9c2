"""Sequences and scenarios for the simulated device, all from seeds."""

from __future__ import annotations

import random

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from tests.support.simulation import VOCAB, Simulated, Simulation


def ids_of(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(count)]


def expected_ids(row: Simulated) -> list[int]:
    """Compute the tokens of a sequence that runs alone."""
    alone = Simulated(row.number, row.state, row.start, row.salt, row.ends_after)
    for token_id in row.ids[: row.state.prompt_tokens]:
        alone.extend(token_id)
    for _ in range(row.ends_after):
        alone.extend(alone.next_id())
    return alone.ids


def random_simulation(seed: int, *, is_late: bool, is_tight: bool) -> Simulation:
    """Make a scenario: sequences that come over time, some with common prefixes; with few blocks if tight."""
    rng = random.Random(seed)
    longest = rng.choice([20, 60, 150])
    row_blocks = -(-(2 * longest) // BLOCK_TOKENS)
    simulation = Simulation(
        # A tight cache holds the longest possible sequence, and little more.
        blocks=1 + row_blocks + (rng.randrange(3) if is_tight else rng.randrange(4, 40)),
        slots=rng.choice([1, 2, 3, 8, 32]) if not is_tight else rng.choice([2, 4, 16]),
        step_tokens=rng.choice([5, 16, 40, 128]),
        step_tokens_while_decoding=rng.choice([1, 7, 16, 32]),
        is_late=is_late,
    )
    prefix_ids = [None, simulation.blocks.new_prefix_id(), simulation.blocks.new_prefix_id()]
    beginnings = [ids_of(seed * 10 + i, longest) for i in range(3)]
    for number in range(rng.randrange(1, 16)):
        ids = rng.choice(beginnings)[: rng.randrange(longest)] + ids_of(seed * 1000 + number, rng.randrange(1, 12))
        ids = ids[:longest]
        max_new_tokens = rng.randrange(1, longest)
        simulation.add(
            ids,
            max_new_tokens,
            prefix_id=rng.choice(prefix_ids),
            max_rows=rng.choice([None] * 10 + [1, 2, 5]),
            owner=rng.randrange(2),
            priority=rng.choice([0] * 8 + [-1, 1]),
            salt=rng.choice([0, 0, number]),
            ends_after=rng.choice([max_new_tokens, max_new_tokens, rng.randrange(1, max_new_tokens + 1)]),
        )
        for _ in range(rng.choice([0, 0, 0, 1, 10])):
            simulation.step()
    return simulation
