"""Who shares the KV cache blocks of prompts that begin alike."""

from __future__ import annotations

from langchain_quantllm.engine.block_manager import BlockManager
from langchain_quantllm.engine.request import Request


class PrefixIds:
    """The prefix ids before the first blocks of prompts: one for each adapter and `cache_salt`."""

    def __init__(self, blocks: BlockManager) -> None:
        """Begin with none; blocks that were shared before are not found again."""
        self._blocks = blocks
        self._shared: dict[tuple[int, str | None], int] = {}
        self._of_samples: int | None = None

    def first(self, request: Request, adapter: int) -> int | None:
        """Choose who shares a prompt's blocks: all of its adapter and salt, the samples of its call, or None for none.

        Args:
            request: The request. Those of one call come one after another.
            adapter: Number of its adapter; keys and values of two adapters differ.
        """
        if request.shares_prefix:
            key = (adapter, request.options.cache_salt)
            prefix_id = self._shared.pop(key, None) or self._blocks.new_prefix_id()
            self._shared[key] = prefix_id  # the last one is the latest
            if len(self._shared) > self._blocks.total:  # some have no block left
                del self._shared[next(iter(self._shared))]
            return prefix_id
        if request.options.n == 1:
            return None
        if request.sample_index == 0:
            self._of_samples = self._blocks.new_prefix_id()
        return self._of_samples
