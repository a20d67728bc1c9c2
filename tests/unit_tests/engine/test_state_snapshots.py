"""Which states are kept for which prefixes, and that every chunk of a plan goes on from the states of its own text."""

from __future__ import annotations

import random

import pytest

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.scheduler import Scheduler
from langchain_quantllm.engine.sequence import Sequence, bare_sequence
from langchain_quantllm.engine.state_snapshots import StateSnapshots
from langchain_quantllm.engine.step import PrefillChunk, Step, split_step

Text = tuple[int, ...]


class TestRows:
    def test_a_saved_row_is_found_by_its_prefix(self) -> None:
        snapshots = StateSnapshots(range(5, 7))
        assert snapshots.find(1) is None
        row = snapshots.save(1)
        assert row in (5, 6)
        assert snapshots.find(1) == row
        assert snapshots.save(1) is None  # it is kept already
        assert snapshots.save(2) == 11 - (row or 0)

    def test_the_row_that_was_used_least_recently_is_overwritten(self) -> None:
        snapshots = StateSnapshots(range(2))
        first, second = snapshots.save(1), snapshots.save(2)
        assert snapshots.find(1) == first
        assert snapshots.save(3) == second
        assert snapshots.find(2) is None

    def test_held_rows_are_not_overwritten(self) -> None:
        snapshots = StateSnapshots(range(1))
        row = snapshots.save(1)
        assert row is not None
        snapshots.hold(row)
        snapshots.hold(row)
        snapshots.release(row)
        assert snapshots.save(2) is None
        snapshots.release(row)
        assert snapshots.save(2) == row

    def test_a_forgotten_prefix_frees_its_row_once_nobody_holds_it(self) -> None:
        snapshots = StateSnapshots(range(1))
        row = snapshots.save(1)
        assert row is not None
        snapshots.hold(row)
        snapshots.forget(1)
        assert snapshots.find(1) is None
        assert snapshots.save(2) is None
        snapshots.release(row)
        assert snapshots.save(2) == row
        snapshots.forget(2)
        assert snapshots.save(3) == row

    def test_without_rows_nothing_is_kept(self) -> None:
        snapshots = StateSnapshots(range(3, 3))
        assert snapshots.save(1) is None
        assert snapshots.find(1) is None

    def test_a_forgotten_block_takes_its_snapshot_with_it(self) -> None:
        snapshots = StateSnapshots(range(3))
        blocks = BlockManager(4, snapshots)
        block = blocks.take()
        assert block is not None
        prefix = blocks.register(block, 0, range(BLOCK_TOKENS))
        snapshots.save(prefix)
        blocks.release([block])
        assert snapshots.find(prefix) is not None
        blocks.discard([block])
        assert snapshots.find(prefix) is None


def test_a_split_step_restores_first_and_saves_where_the_tokens_are() -> None:
    sequence = bare_sequence(range(90), 1)
    step = Step([], [], [PrefillChunk(sequence, 16, 74, True, 9, ((32, 7), (80, 8)))])
    before, after = split_step(step, 16)
    assert before.chunks == [PrefillChunk(sequence, 16, 16, False, 9, ((32, 7),))]
    assert after.chunks == [PrefillChunk(sequence, 32, 58, True, None, ((80, 8),))]


class Rows:
    """Stands for the state pool: each row holds the tokens that its state was computed from."""

    def __init__(self) -> None:
        self.texts: dict[int, Text] = {}
        self.restored = 0

    def run(self, step: Step) -> None:
        for sequence, position in zip(step.decoding, step.positions, strict=True):
            assert self.texts[sequence.slot] == tuple(sequence.ids[:position])
            self.texts[sequence.slot] = tuple(sequence.ids[: position + 1])
        for chunk in step.chunks:
            ids, slot = chunk.sequence.ids, chunk.sequence.slot
            source: Text = ()
            if chunk.restored is not None:
                source = self.texts[chunk.restored]
                self.restored += 1
            elif chunk.start:
                source = self.texts[slot]
            assert source == tuple(ids[: chunk.start])
            for position, row in chunk.saves:
                assert chunk.start < position <= chunk.start + chunk.count
                self.texts[row] = tuple(ids[:position])
            self.texts[slot] = tuple(ids[: chunk.start + chunk.count])


@pytest.mark.parametrize("seed", range(40))
def test_every_chunk_goes_on_from_the_states_of_its_own_text(seed: int) -> None:
    choice = random.Random(seed)
    slots, kept = choice.randint(2, 6), choice.randint(1, 6)
    snapshots = StateSnapshots(range(slots + 1, slots + 1 + kept))
    blocks = BlockManager(choice.randint(14, 60), snapshots)
    scheduler = Scheduler(
        blocks, slots=slots, step_tokens=choice.choice([20, 64, 200]), step_tokens_while_decoding=choice.choice([8, 50])
    )
    stems = [[choice.randrange(9) for _ in range(length)] for length in (20, 48, 100)]
    rows, waiting, prefix_id = Rows(), 30, blocks.new_prefix_id()
    running: list[Sequence] = []
    for _ in range(3000):
        if waiting and choice.random() < 0.4:
            waiting -= 1
            stem = choice.choice(stems)
            cut = choice.choice([len(stem), choice.randint(1, len(stem))])
            ids = [*stem[:cut], *(choice.randrange(9) for _ in range(choice.randint(0, 40)))]
            running.append(bare_sequence(ids, choice.randint(1, 40), prefix_id=prefix_id))
            scheduler.add(running[-1])
        step = scheduler.plan(mixes=choice.random() < 0.5)
        if step is None:
            if not waiting:
                break
            continue
        sampled = step.sampled
        for part in split_step(step, choice.randint(1, 40)) if step.chunks and choice.random() < 0.3 else (step,):
            rows.run(part)
        for sequence in sampled:
            scheduler.push(sequence, choice.randrange(9))
        for sequence in list(running):
            if (sequence.is_complete and sequence.is_known) or choice.random() < 0.005:
                running.remove(sequence)
                scheduler.remove(sequence)
        scheduler.check_integrity()
    assert not running
    assert not +snapshots._holders
    assert sorted([*snapshots._free, *snapshots._rows.values()]) == list(range(slots + 1, slots + 1 + kept))
    assert rows.restored > 0 or kept < 4 or blocks.total < 40  # in little memory nothing may be found in time
