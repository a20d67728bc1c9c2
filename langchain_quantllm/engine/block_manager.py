"""The KV cache's block allocator: which blocks are free, held, or kept for prompts that begin alike.

Blocks are numbers here; it knows no tensors. A full block is found again by its tokens and the prefix before it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

from langchain_quantllm.engine.state_snapshots import StateSnapshots

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

    def __init__(self, total: int, snapshots: StateSnapshots | None = None) -> None:
        """Begin with all blocks free.

        Args:
            total: Number of blocks, block 0 included.
            snapshots: Where the states at the ends of blocks are kept, for models whose layers keep one.
        """
        self.total = total
        self.snapshots = snapshots
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

    def discard(self, blocks: Sequence[int]) -> None:
        """Forget the content of blocks, so that no sequence finds them any more; those that hold them keep them."""
        for block in blocks:
            if block in self._kept:
                del self._kept[block]
                self._free.append(block)
            self._forget(block)

    def check_integrity(self) -> None:
        """Check that every block is free, kept or held, and found by its own content only; takes time, for tests.

        Raises:
            RuntimeError: If not; the message names a block.
        """
        for wrong in self._contradictions():
            msg = f"the KV cache's blocks contradict each other: {wrong}"
            raise RuntimeError(msg)

    def _contradictions(self) -> Iterator[str]:
        held = [block for block, holders in enumerate(self._holders) if holders > 0]
        places = Counter([*self._free, *self._kept, *held])
        yield from (f"block {i} is held {n} times" for i, n in enumerate(self._holders) if n < 0)
        yield from (f"there is no block {i}" for i in places if not 0 < i < self.total)
        for block in range(1, self.total):
            if places[block] != 1:
                found = {"free": self._free.count(block), "kept": block in self._kept, "held": block in held}
                words = [name for name, times in found.items() for _ in range(times)]
                yield f"block {block} is {' and '.join(words) or 'lost'}"
        yield from (f"block {i} is kept without content" for i in self._kept if self._keys[i] is None)
        yield from (f"block {i} is free with content" for i in self._free if self._keys[i] is not None)
        for key, block in self._by_key.items():
            if self._keys[block] != key:
                yield f"block {block} is found by the content of another"
        named = {block: key for block, key in enumerate(self._keys) if key is not None}
        yield from (
            f"block {i} cannot be found by its content" for i, key in named.items() if self._by_key.get(key) != i
        )
        ids = [self._prefix_ids[block] for block in named]
        if len(set(ids)) != len(ids) or not all(0 < i < self._next_prefix_id for i in ids):
            yield "prefix ids of blocks are equal, or were never given out"

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None
            if self.snapshots is not None:
                self.snapshots.forget(self._prefix_ids[block])
