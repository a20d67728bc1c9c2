"""One request on its way through the continuous engine: its place in the schedule, its KV blocks, its sampling.

The scheduler reads tokens and blocks only, the model runner slots and positions, the engine the rest.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.detokenizer import Completion
from langchain_quantllm.engine.prompt_images import PromptImages
from langchain_quantllm.engine.request import ForeseeingMask, Request
from langchain_quantllm.engine.sampler import needs_of
from langchain_quantllm.engine.speculation.proposal import FORCED
from langchain_quantllm.engine.speculation.sequence_speculation import SequenceSpeculation
from langchain_quantllm.options import NO_SPECULATION, GenerationOptions

_LEAST_SAVED = 2 * BLOCK_TOKENS
"""Tokens of the shortest prefix whose states are kept."""


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

    A sampled token is pending until the device has returned it: `sampled` counts it, `ids` does not hold it yet. While
    proposals are in flight, `sampled` and `written` are the least that they can be, and `in_flight` more the most.
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
        self.images: PromptImages | None = request.images
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
        self.in_flight = 0
        """Proposals in steps whose result is not known yet."""
        self.blocks: list[int] = []
        """Blocks of its tokens; 0 for those that it has given back."""
        self.given_back: list[int] = []
        """Its first blocks, which lie before the window of all layers; others may hold them now."""
        self.slot = -1
        """Its index in the device's tables while it runs."""
        self.decodes = False
        """Whether its last token lies on the device, so that a decode step can go on from it."""
        self.cached_tokens: int | None = None
        """Tokens of the prompt that were found in shared blocks; None until the sequence has begun."""
        self.prefix_id = prefix_id
        self._last_prefix = prefix_id  # of the full blocks so far
        self._known_blocks = 0  # full blocks that others can find
        self._restored: int | None = None  # row of the states that its next chunk goes on from
        self._saved_borders: set[int] = set()  # ends of blocks at which its states are to be kept
        self._saves: list[tuple[int, int]] = []  # positions in its next chunk, and the rows that keep the states there
        self._recomputation = recomputation
        self.has_ended = False
        self.sampling_needs = needs_of(request)
        """What its sampling needs at every step: flags of `sampler`."""
        self.mask = None if request.mask is None else request.mask()
        self.speculation = self._begin_speculation()
        """Its proposals; None if it gets none."""
        self._random = request.random_numbers()
        self._uniforms: list[float] = []  # of its next tokens, drawn ahead
        self._uniforms_from = 0
        self._has_end_ids = bool(request.end_token_ids)

    def _begin_speculation(self) -> SequenceSpeculation | None:
        source = self.request.options.speculation
        if source == NO_SPECULATION or (self.mask is None and source == FORCED):
            return None
        if self.mask is not None and not isinstance(self.mask, ForeseeingMask):
            return None
        return SequenceSpeculation(self.ids, source)

    # For the scheduler.

    @property
    def is_known(self) -> bool:
        """Whether all tokens are known: none that was sampled is pending, and its images are read."""
        return self.has_seen_images and len(self.ids) == self.prompt_tokens + self.sampled

    @property
    def has_seen_images(self) -> bool:
        """Whether the vision tower has run over its images, if it has any."""
        return self.images is None or self.images.are_read

    @property
    def position_delta(self) -> int:
        """The number to be added to the positions of its tokens behind the last image."""
        return 0 if self.images is None else self.images.position_delta

    @property
    def is_unread(self) -> bool:
        """Whether so much of its text is unread that no more is to be computed."""
        return self.completion.stream.is_full

    @property
    def is_complete(self) -> bool:
        """Whether no more tokens are to be sampled."""
        return self.sampled >= self.max_new_tokens

    @property
    def most_proposed(self) -> int:
        """How many tokens may be proposed to it now; below 0 if none may be sampled before those in flight are known.

        Counted from the most tokens that it may have: within `max_new_tokens`, and within the length at which its keys
        and values become others.
        """
        most = self.max_new_tokens - self.sampled - self.in_flight - 1
        if self._recomputation is not None:
            most = min(most, self._recomputation.tokens - self.written - self.in_flight - 1)
        return most if self.in_flight else max(0, most)

    def rope_positions(self, start: int, count: int) -> torch.Tensor:
        """Return the positions of tokens in three dimensions, of shape `(3, count)`, int32."""
        if self.images is not None:
            return self.images.positions_of(start, count)
        return torch.arange(start, start + count, dtype=torch.int32).expand(3, -1)

    def chunk_end(self, start: int, end: int) -> int:
        """Return where a chunk of its tokens may end, at `end` or near it: some images must not be cut."""
        return end if self.images is None else self.images.chunk_end(start, end)

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
        blocks, _ = self._shareable(manager)
        return len(blocks), sum(map(manager.is_held, blocks))

    def share(self, manager: BlockManager) -> None:
        """Take over the shared blocks that hold its next tokens."""
        blocks, row = self._shareable(manager)
        for block in blocks:
            self._last_prefix = manager.share(block)
            self.blocks.append(block)
            self._known_blocks += 1
            self.written += BLOCK_TOKENS
        if row is not None and manager.snapshots is not None:
            manager.snapshots.hold(row)
            self._let_go(manager)
            self._restored = row

    def _shareable(self, manager: BlockManager) -> tuple[list[int], int | None]:
        """Find the shared blocks that hold its next tokens.

        For a model whose layers keep a state these end with the last block whose state is kept, in the row that is
        returned as well. Where others have gone on from the same tokens before, its own state is to be kept.
        """
        found: list[int] = []
        prefix, at, snapshots = self._last_prefix, self.written, manager.snapshots
        usable, row = 0, None
        while prefix is not None and self._may_share(at):
            block = manager.find(prefix, self._content(at))
            if block is None:
                break
            found.append(block)
            prefix, at = manager.prefix_id_of(block), at + BLOCK_TOKENS
            if snapshots is not None and (saved := snapshots.find(prefix)) is not None:
                usable, row = len(found), saved
        if snapshots is None:
            return found, None
        if not self.written:
            self._saved_borders = {at, (len(self.ids) - 1) // BLOCK_TOKENS * BLOCK_TOKENS}
        return found[:usable], row

    def _let_go(self, manager: BlockManager) -> int | None:
        """Hold the row of states that it goes on from no more, and return it; None if it goes on from its own."""
        row, self._restored = self._restored, None
        if row is not None and manager.snapshots is not None:
            manager.snapshots.release(row)
        return row

    def take_states(self, manager: BlockManager) -> tuple[int | None, tuple[tuple[int, int], ...]]:
        """Return what its next chunk does with states, once: the row to go on from, and positions and rows to save."""
        saves, self._saves = tuple(self._saves), []
        return self._let_go(manager), saves

    def _content(self, at: int) -> abc.Sequence[int]:
        """Return the tokens of a full block as the block manager knows them: those of images by their content."""
        ids = self.ids[at : at + BLOCK_TOKENS]
        return ids if self.images is None else self.images.content(at, ids)

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
            self._last_prefix = manager.register(block, self._last_prefix, self._content(at))
            self._known_blocks += 1
            end = at + BLOCK_TOKENS
            if manager.snapshots is not None and end in self._saved_borders and end >= _LEAST_SAVED:
                self._saved_borders.discard(end)
                if (row := manager.snapshots.save(self._last_prefix)) is not None:
                    self._saves.append((end, row))

    def stop_sharing(self) -> None:
        """Share no blocks any more, and offer none."""
        self.prefix_id = self._last_prefix = None
        if self._recomputation is not None:
            self._recomputation = replace(self._recomputation, prefix_id=None)

    def give_back(self, manager: BlockManager, window: int) -> None:
        """Give back the blocks before the window of its next token, as far as others can find them."""
        passed = max(0, self.written + 1 - window) // BLOCK_TOKENS
        if self._last_prefix is not None:
            passed = min(passed, self._known_blocks)
        before = len(self.given_back)
        if passed > before:
            manager.release(self.blocks[before:passed])
            self.given_back += self.blocks[before:passed]
            self.blocks[before:passed] = [0] * (passed - before)

    def release(self, manager: BlockManager) -> None:
        """Give up slot and blocks; if it runs again, all its known tokens are computed again."""
        manager.release(self.blocks[len(self.given_back) :])
        self._let_go(manager)
        self._saves, self._saved_borders = [], set()
        self.blocks, self.given_back = [], []
        self.written = self.in_flight = 0
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
        return self.sampling_inputs(self.sampled - 1, 1)[0]

    def sampling_inputs(self, first: int, count: int) -> list[SamplingInput]:
        """Return the inputs for sampling some tokens, counted from the first one of the text as 0.

        Each token has its own random number, however often it is asked for: none before `first` is asked for again.
        """
        options, least = self.request.options, self.request.min_new_tokens
        del self._uniforms[: first - self._uniforms_from]
        self._uniforms_from = first
        while options.do_sample and len(self._uniforms) < count:
            self._uniforms.append(self._random.random())
        return [
            SamplingInput(
                uniform=self._uniforms[i] if options.do_sample else 0.0,
                may_end=not self._has_end_ids or (not options.ignore_eos and first + i >= least),
            )
            for i in range(count)
        ]


def bare_sequence(
    prompt_ids: abc.Iterable[int],
    max_new_tokens: int,
    *,
    prefix_id: int | None = None,
    adapter: int = -1,
    max_rows: int | None = None,
    owner: int | None = None,
    priority: int = 0,
    images: PromptImages | None = None,
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
        images=images,
    )
    return Sequence(Completion(request, lambda ids: ""), prefix_id=prefix_id, adapter=adapter)
