"""One request on its way through the continuous engine: its place in the schedule, its KV blocks, its sampling.

The scheduler reads tokens and blocks only, the model runner slots and positions, the engine the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.detokenizer import Completion
from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.sampler import needs_of
from langchain_quantllm.options import GenerationOptions


@dataclass(frozen=True, kw_only=True)
class SamplingInput:
    """The inputs of one token's sampling beside the logits.

    Args:
        uniform: A number in [0, 1).
        may_end: Whether the request's end tokens may be sampled.
    """

    uniform: float = 0.0
    may_end: bool = True


@dataclass(frozen=True, kw_only=True)
class Recomputation:
    """The length at which a sequence's keys and values become others.

    Args:
        tokens: The most tokens with those before.
        prefix_id: The prefix id before its first block afterwards; None to share no blocks then.
    """

    tokens: int
    prefix_id: int | None


class Lane(NamedTuple):
    """Sequences of one owner, of which at most `most` run at once; None for no such limit."""

    owner: int | None = None
    most: int | None = None


class Sequence:
    """A request's tokens, and where they stand. Counts are in tokens.

    A sampled token is pending until the device has returned it: `sampled` counts it, `ids` does not hold it yet.
    """

    def __init__(
        self,
        completion: Completion,
        *,
        prefix_id: int | None = None,
        adapter: int = -1,
        recomputation: Recomputation | None = None,
    ) -> None:
        """Begin a sequence with the prompt of a request.

        Args:
            completion: The request's completion, which its tokens go to.
            prefix_id: The prefix id before its first block (see `BlockManager`); None to share no blocks.
            adapter: Number of the LoRA adapter that it runs with; -1 for none.
            recomputation: Where all its keys and values become others; None for nowhere.
        """
        request = completion.request
        self.completion = completion
        self.request = request
        self.ids = list(request.prompt_ids)
        self.prompt_tokens = self.rotary_tokens = len(self.ids)
        """`rotary_tokens`: the tokens whose rotary frequencies follow from their number together."""
        self.max_new_tokens = request.max_new_tokens
        self.lane = Lane() if request.max_rows is None else Lane(request.owner, request.max_rows)
        self.priority = request.options.priority
        self.arrival = 0
        """Its number in the order of arrival."""
        self.blocked_since: int | None = None
        """The scheduler's step in which it first found no room; None while it has not waited for any."""
        self.adapter = adapter
        self.sampled = 0
        self.written = 0
        """Tokens whose keys and values are in the blocks, or in a step that is planned."""
        self.blocks: list[int] = []
        self.slot = -1
        """Its index in the device's tables while it runs."""
        self.decodes = False
        """Whether its last token lies on the device, so that a decode step can go on from it."""
        self.cached_tokens: int | None = None
        """Tokens of the prompt that were found in shared blocks; None until the sequence has begun."""
        self.prefix_id = prefix_id
        self._last_prefix = prefix_id  # of the full blocks so far
        self._known_blocks = 0  # full blocks that others can find
        self._recomputation = recomputation
        self.has_ended = False
        self.sampling_needs = needs_of(request)
        """What its sampling needs at every step: flags of `sampler`."""
        self.mask = None if request.mask is None else request.mask()
        self._random = request.random_numbers()
        self._has_end_ids = bool(request.end_token_ids)

    # For the scheduler.

    @property
    def is_known(self) -> bool:
        """Whether no sampled token is pending."""
        return len(self.ids) == self.prompt_tokens + self.sampled

    @property
    def is_unread(self) -> bool:
        """Whether so much of its text is unread that no more is to be computed."""
        return self.completion.stream.is_full

    @property
    def is_complete(self) -> bool:
        """Whether no more tokens are to be sampled."""
        return self.sampled >= self.max_new_tokens

    @property
    def is_outgrown(self) -> bool:
        """Whether its keys and values must be computed anew before its next token is."""
        again = self._recomputation
        return again is not None and self.decodes and self.written >= again.tokens and not self.is_complete

    def begin_anew(self) -> None:
        """Become a text beyond the length of its recomputation, whose blocks are others."""
        assert self._recomputation is not None
        self.rotary_tokens = self.written + 1
        self.prefix_id = self._recomputation.prefix_id
        self._recomputation = None

    def find_shared(self, manager: BlockManager) -> tuple[int, int]:
        """Count the blocks that it could share from here on: all of them, and those held by running sequences."""
        found = held = 0
        prefix, at = self._last_prefix, self.written
        while prefix is not None and self._may_share(at):
            block = manager.find(prefix, self.ids[at : at + BLOCK_TOKENS])
            if block is None:
                break
            found, held, at = found + 1, held + manager.is_held(block), at + BLOCK_TOKENS
            prefix = manager.prefix_id_of(block)
        return found, held

    def share(self, manager: BlockManager) -> None:
        """Take over the shared blocks that hold its next tokens."""
        while self._last_prefix is not None and self._may_share(self.written):
            block = manager.find(self._last_prefix, self.ids[self.written : self.written + BLOCK_TOKENS])
            if block is None:
                break
            self._last_prefix = manager.share(block)
            self.blocks.append(block)
            self._known_blocks += 1
            self.written += BLOCK_TOKENS

    def _may_share(self, at: int) -> bool:
        # The last token must run through the model: the next one is sampled from its logits.
        return len(self.blocks) * BLOCK_TOKENS <= at and len(self.ids) - at > BLOCK_TOKENS

    def register(self, manager: BlockManager) -> None:
        """Let other sequences find its blocks that have become full of known tokens."""
        if self._last_prefix is None:
            return
        while (self._known_blocks + 1) * BLOCK_TOKENS <= min(self.written, len(self.ids)):
            at = self._known_blocks * BLOCK_TOKENS
            block = self.blocks[self._known_blocks]
            self._last_prefix = manager.register(block, self._last_prefix, self.ids[at : at + BLOCK_TOKENS])
            self._known_blocks += 1

    def stop_sharing(self) -> None:
        """Share no blocks any more, and offer none."""
        self.prefix_id = self._last_prefix = None
        if self._recomputation is not None:
            self._recomputation = replace(self._recomputation, prefix_id=None)

    def release(self, manager: BlockManager) -> None:
        """Give up slot and blocks; if it runs again, all its known tokens are computed again."""
        manager.release(self.blocks)
        self.blocks = []
        self.written = 0
        self.slot = -1
        self.decodes = False
        self._last_prefix = self.prefix_id
        self._known_blocks = 0

    # For the engine.

    def start(self) -> None:
        """Note in the usage that its prompt is being run, and how much of it was cached."""
        self.completion.start()
        self.completion.cached_tokens = self.cached_tokens or 0

    def next_sampling_input(self) -> SamplingInput:
        """Return the inputs for sampling its next token, which the scheduler has counted already."""
        options = self.request.options
        return SamplingInput(
            uniform=self._random.random() if options.do_sample else 0.0,
            may_end=not self._has_end_ids or (not options.ignore_eos and self.sampled > self.request.min_new_tokens),
        )


def bare_sequence(
    prompt_ids: Iterable[int],
    max_new_tokens: int,
    *,
    prefix_id: int | None = None,
    adapter: int = -1,
    max_rows: int | None = None,
    owner: int | None = None,
    priority: int = 0,
) -> Sequence:
    """Make a greedy sequence without text and end tokens, for checks and measurements."""
    request = Request(
        prompt_ids=tuple(prompt_ids),
        max_new_tokens=max_new_tokens,
        min_new_tokens=0,
        options=GenerationOptions(priority=priority),
        sample_index=0,
        seed=0,
        eos_token_ids=(),
        max_rows=max_rows,
        owner=owner,
    )
    return Sequence(Completion(request, lambda ids: ""), prefix_id=prefix_id, adapter=adapter)
