"""The KV cache's block allocator: which blocks are free, held, or kept for prompts that begin alike.

Blocks are numbers here; it knows no tensors. A full block is found again by its tokens and the prefix before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

BLOCK_TOKENS = 16
"""Tokens of one block."""

Key = tuple[int, tuple[int, ...]]
"""The content of a full block: the prefix id of all tokens before it, and its own tokens."""


class BlockManager:
    """Blocks from 1 on, each free, held by sequences, or kept for sequences with the same tokens.

    Block 0 is never given out: padding of a batch is written there. A kept block is given out again when no free one
    is left, the least recently used first. A prefix id stands for all tokens up to the end of a full block; chains
    that begin with different ids of `new_prefix_id` share nothing.
    """

    def __init__(self, total: int) -> None:
        """Begin with all blocks free; `total` counts block 0 as well."""
        self.total = total
        self._free = list(range(total - 1, 0, -1))  # the lowest comes first: memory is touched as late as possible
        self._holders = [0] * total
        self._keys: list[Key | None] = [None] * total
        self._prefix_ids = [0] * total
        self._by_key: dict[Key, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._next_prefix_id = 1

    @property
    def available(self) -> int:
        """Blocks that can be taken: the free and the kept ones."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """Blocks that sequences hold."""
        return self.total - 1 - self.available

    def new_prefix_id(self) -> int:
        """Return a prefix id that was never used."""
        self._next_prefix_id += 1
        return self._next_prefix_id - 1

    def take(self) -> int | None:
        """Take a block of unknown content; None if sequences hold them all."""
        if self._free:
            block = self._free.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        else:
            return None
        self._holders[block] = 1
        return block

    def find(self, prefix_id: int, tokens: Sequence[int]) -> int | None:
        """Find the block that holds these tokens after this prefix."""
        return self._by_key.get((prefix_id, tuple(tokens)))

    def prefix_id_of(self, block: int) -> int:
        """Return the prefix id of all tokens up to the end of a registered block."""
        return self._prefix_ids[block]

    def is_held(self, block: int) -> bool:
        """Whether a sequence holds the block, so that sharing it takes none of the available ones."""
        return self._holders[block] > 0

    def share(self, block: int) -> int:
        """Hold a found block once more, and return the prefix id at its end."""
        if not self._holders[block]:
            del self._kept[block]
        self._holders[block] += 1
        return self._prefix_ids[block]

    def register(self, block: int, prefix_id: int, tokens: Sequence[int]) -> int:
        """Record the content of a full block, so that it can be found.

        Returns:
            The prefix id at its end: that of another block if one holds the same already.
        """
        key = (prefix_id, tuple(tokens))
        same = self._by_key.get(key)
        if same is not None:
            return self._prefix_ids[same]
        self._by_key[key] = block
        self._keys[block] = key
        self._prefix_ids[block] = self.new_prefix_id()
        return self._prefix_ids[block]

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks; its last ones are given out again before its first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._kept[block] = None

    def discard(self, blocks: Sequence[int]) -> list[int]:
        """Forget the content of released blocks; those that other sequences still hold stay as they are.

        Returns:
            The blocks that nothing holds.
        """
        discarded = [block for block in dict.fromkeys(blocks) if not self._holders[block]]
        for block in discarded:
            if block in self._kept:
                del self._kept[block]
                self._forget(block)
                self._free.append(block)
        return discarded

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None

    def check_integrity(self) -> None:
        """Check that every block is free, kept or held."""
        if sorted([*self._free, *self._kept, *(b for b in range(self.total) if self._holders[b])]) != list(
            range(1, self.total)
        ):
            msg = "a block is lost"
            raise RuntimeError(msg)
