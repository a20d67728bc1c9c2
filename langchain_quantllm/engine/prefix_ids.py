"""Who shares the KV cache blocks of prompts that begin alike.

Keys are rotated by the length of the text where a model's frequencies follow from it: prompts up to that length and
longer ones share nothing.
"""

from __future__ import annotations

from langchain_quantllm.engine.block_manager import BlockManager
from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.rotary_lengths import RotaryLengths
from langchain_quantllm.engine.sequence import Recomputation


class PrefixIds:
    """The prefix ids before the first blocks of prompts: one for each adapter, `cache_salt` and range."""

    def __init__(self, blocks: BlockManager, rotary: RotaryLengths | None = None) -> None:
        """Begin with none; blocks that were shared before are not found again.

        Args:
            blocks: The KV cache's blocks.
            rotary: The rotary positions that follow from a text's length; None if they do not.
        """
        self._blocks = blocks
        self._rotary = rotary
        self._shared: dict[tuple[int, str | None, bool], int] = {}
        self._of_samples: int | None = None

    def first(self, request: Request, adapter: int) -> int | None:
        """Choose who shares a prompt's blocks: all of its adapter and salt, the samples of its call, or None for none.

        Args:
            request: The request. Those of one call come one after another.
            adapter: Number of its adapter; keys and values of two adapters differ.
        """
        if request.shares_prefix:
            return self._shared_id(request, adapter, is_long=self._is_long(request))
        if request.options.n == 1:
            return None
        if request.sample_index == 0:
            self._of_samples = self._blocks.new_prefix_id()
        return self._of_samples

    def recomputation(self, request: Request, adapter: int) -> Recomputation | None:
        """Say where a sequence's keys and values become others while it grows, and who shares these; None for nowhere.

        Args:
            request: Its request.
            adapter: Number of its adapter.
        """
        if self._rotary is None or not self._rotary.recomputes or self._is_long(request):
            return None
        limit = self._rotary.limit
        if len(request.prompt_ids) + request.max_new_tokens <= limit:
            return None
        prefix_id = self._shared_id(request, adapter, is_long=True) if request.shares_prefix else None
        return Recomputation(tokens=limit, prefix_id=prefix_id)

    def _is_long(self, request: Request) -> bool:
        return self._rotary is not None and len(request.prompt_ids) > self._rotary.limit

    def _shared_id(self, request: Request, adapter: int, *, is_long: bool) -> int:
        key = (adapter, request.options.cache_salt, is_long)
        prefix_id = self._shared.pop(key, None) or self._blocks.new_prefix_id()
        self._shared[key] = prefix_id  # the last one is the latest
        if len(self._shared) > self._blocks.total:  # some have no block left
            del self._shared[next(iter(self._shared))]
        return prefix_id
