"""The block allocator: every block is free, held or kept, and found by its content."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager


def fill(blocks: BlockManager, prefix_id: int, *tokens: int) -> list[int]:
    """Take, register and release a block for each number, which is its content."""
    taken = []
    for token in tokens:
        block = blocks.take()
        assert block is not None
        prefix_id = blocks.register(block, prefix_id, [token] * BLOCK_TOKENS)
        taken.append(block)
    blocks.release(taken)
    return taken


class TestBlockManager:
    def test_each_block_is_given_out_once_and_block_0_never(self) -> None:
        blocks = BlockManager(9)
        taken = [blocks.take() for _ in range(8)]
        assert taken == list(range(1, 9))  # from the lowest: memory is touched as late as possible
        assert blocks.take() is None
        assert (blocks.held, blocks.available) == (8, 0)

    def test_kept_blocks_are_given_out_last_and_the_longest_unused_first(self) -> None:
        blocks = BlockManager(7)
        prefix_id = blocks.new_prefix_id()
        (a,), (b,), (c,) = fill(blocks, prefix_id, 1), fill(blocks, prefix_id, 2), fill(blocks, prefix_id, 3)
        assert (blocks.held, blocks.available) == (0, 6)
        free = [blocks.take() for _ in range(3)]
        assert not {a, b, c} & set(free)
        blocks.share(a)  # used again
        blocks.release([a])
        assert [blocks.take() for _ in range(3)] == [b, c, a]
        assert blocks.take() is None
        assert all(blocks.find(prefix_id, [token] * BLOCK_TOKENS) is None for token in (1, 2, 3))

    def test_the_last_blocks_of_a_sequence_are_given_out_before_its_first(self) -> None:
        """Without its first block, the others cannot be found."""
        blocks = BlockManager(4)
        first, second, third = fill(blocks, blocks.new_prefix_id(), 1, 2, 3)
        assert [blocks.take() for _ in range(3)] == [third, second, first]

    def test_a_held_block_is_not_given_out(self) -> None:
        blocks = BlockManager(3)
        prefix_id = blocks.new_prefix_id()
        (a,), (b,) = fill(blocks, prefix_id, 1), fill(blocks, prefix_id, 2)
        blocks.share(a)
        blocks.share(a)
        assert blocks.take() == b
        assert blocks.take() is None
        blocks.release([a])
        assert blocks.is_held(a)
        assert blocks.take() is None
        blocks.release([a])
        assert not blocks.is_held(a)
        assert blocks.find(prefix_id, [1] * BLOCK_TOKENS) == a
        assert blocks.take() == a

    def test_the_former_content_of_a_block_is_not_found(self) -> None:
        """Neither it nor the blocks after it, once the block holds something else."""
        blocks = BlockManager(3)
        prefix_id = blocks.new_prefix_id()
        a, b = fill(blocks, prefix_id, 1, 2)
        chain = blocks.prefix_id_of(a)
        taken = [block for block in (blocks.take(), blocks.take()) if block is not None]
        assert taken == [b, a]
        blocks.register(a, prefix_id, [9] * BLOCK_TOKENS)
        assert blocks.find(prefix_id, [1] * BLOCK_TOKENS) is None
        assert blocks.find(blocks.prefix_id_of(a), [2] * BLOCK_TOKENS) is None
        assert blocks.prefix_id_of(a) != chain

    def test_of_two_equal_blocks_one_is_kept(self) -> None:
        """Sequences that computed the same at the same time go on under one prefix id."""
        blocks = BlockManager(5)
        prefix_id = blocks.new_prefix_id()
        a, b = blocks.take(), blocks.take()
        assert a is not None
        assert b is not None
        assert blocks.register(a, prefix_id, [1] * BLOCK_TOKENS) == blocks.register(b, prefix_id, [1] * BLOCK_TOKENS)
        assert blocks.find(prefix_id, [1] * BLOCK_TOKENS) == a
        blocks.release([a])
        blocks.release([b])
        assert (blocks.held, blocks.available) == (0, 4)
        assert blocks.find(prefix_id, [1] * BLOCK_TOKENS) == a

    def test_every_prefix_id_is_new(self) -> None:
        blocks = BlockManager(20)
        numbers = []
        for i in range(6):
            numbers.append(blocks.new_prefix_id())
            block = blocks.take()
            assert block is not None
            numbers.append(blocks.register(block, numbers[-1], [i] * BLOCK_TOKENS))
        assert len(set(numbers)) == 12

    @pytest.mark.parametrize("seed", range(20))
    def test_random_use_agrees_with_a_manager_of_plain_lists(self, seed: int) -> None:
        """Random takes, shares, registrations and releases."""
        rng = random.Random(seed)
        blocks, prefix_id = BlockManager(12), 5
        rows: list[list[int]] = []
        content: dict[int, int] = {}  # what is known of a block; a token stands for its content
        unused: list[int] = []  # known blocks that nobody holds, the longest unused first
        for _ in range(400):
            action = rng.random()
            held = {block for row in rows for block in row}
            if action < 0.4:
                block = blocks.take()
                free = set(range(1, 12)) - held - set(unused)
                if free:
                    assert block in free
                elif unused:
                    assert block == unused.pop(0)
                    del content[block]
                else:
                    assert block is None
                if block is not None:
                    rows.append([block])
            elif action < 0.6 and rows:
                row = rng.choice(rows)
                if row[0] not in content and sum(row[0] in other for other in rows) == 1:
                    token = rng.randrange(8)
                    blocks.register(row[0], prefix_id, [token] * BLOCK_TOKENS)
                    if token not in content.values():
                        content[row[0]] = token
            elif action < 0.75:
                token = rng.randrange(8)
                found = blocks.find(prefix_id, [token] * BLOCK_TOKENS)
                assert found == next((block for block, held_token in content.items() if held_token == token), None)
                if found is not None:
                    blocks.share(found)
                    rows.append([found])
                    if found in unused:
                        unused.remove(found)
            elif rows:
                row = rows.pop(rng.randrange(len(rows)))
                blocks.release(row)
                if row[0] in content and all(row[0] not in other for other in rows):
                    unused.append(row[0])
            held = {block for row in rows for block in row}
            assert blocks.held == len(held)
            assert blocks.available == 11 - len(held)
            assert all(blocks.is_held(block) == (block in held) for block in range(1, 12))
            blocks.check_integrity()

    def test_discarded_blocks_are_not_found_by_anyone(self) -> None:
        """Kept ones become free; held ones stay with their sequences until these let go."""
        blocks = BlockManager(6)
        prefix_id = blocks.new_prefix_id()
        (kept,), (held,), (other,) = (fill(blocks, prefix_id, token) for token in (1, 2, 3))
        blocks.share(held)
        blocks.discard([kept, held])
        assert [blocks.find(prefix_id, [token] * BLOCK_TOKENS) for token in (1, 2, 3)] == [None, None, other]
        assert (blocks.held, blocks.available) == (1, 4)
        blocks.check_integrity()
        blocks.release([held])
        blocks.check_integrity()
        assert [blocks.take() for _ in range(5)][-1] == other, "it is the only one with content"


class TestIntegrity:
    """Each kind of wrong books, made by hand, is found."""

    def make(self) -> BlockManager:
        """Two blocks kept, two held, three free."""
        blocks = BlockManager(8)
        fill(blocks, blocks.new_prefix_id(), 1, 2)
        assert blocks.take() is not None
        assert blocks.take() is not None
        blocks.check_integrity()
        return blocks

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda b: b._free.pop(), "is lost"),
            (lambda b: b._kept.popitem(), "is lost"),
            (lambda b: b._free.append(b._free[0]), "is free and free"),
            (lambda b: b._free.append(next(iter(b._kept))), "is free and kept"),
            (lambda b: b._free.append(b._holders.index(1)), "is free and held"),
            (lambda b: b._holders.__setitem__(b._free[0], -1), "is held -1 times"),
            (lambda b: b._free.append(0), "no block 0"),
            (lambda b: b._free.append(8), "no block 8"),
            (lambda b: b._keys.__setitem__(next(iter(b._kept)), None), "kept without content"),
            (lambda b: b._by_key.popitem(), "cannot be found"),
            (lambda b: b._by_key.__setitem__((9, (9,)), 1), "the content of another"),
            (lambda b: b._prefix_ids.__setitem__(slice(1, 3), [2, 2]), "prefix ids"),
            (lambda b: b._prefix_ids.__setitem__(1, 99), "prefix ids"),
        ],
    )
    def test_wrong_books_are_an_error(self, spoil: Callable[[BlockManager], Any], words: str) -> None:
        blocks = self.make()
        spoil(blocks)
        with pytest.raises(RuntimeError, match=words):
            blocks.check_integrity()
