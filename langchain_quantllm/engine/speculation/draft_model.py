"""Proposals by a small model of the same vocabulary, which reads each text beside the model that writes it.

It has blocks, slots and graphs of its own. Of each sequence it reads the tokens that have come since its last proposal,
and goes on from them alone, with all sequences that get proposals in one batch. A token is drawn by the sequence's own
options, random number and mask: where both models agree on the probabilities, they draw the same token.

What it has read is only an aid: it is dropped where room is short, and read again. Nothing here changes a text.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.build import EngineParts
from langchain_quantllm.engine.detokenizer import Completion
from langchain_quantllm.engine.fusion.fuse import Fusion
from langchain_quantllm.engine.generate import limits_of
from langchain_quantllm.engine.lora import NO_ADAPTER
from langchain_quantllm.engine.prefix_ids import PrefixIds
from langchain_quantllm.engine.sampler import MASKS, PendingTokens
from langchain_quantllm.engine.sequence import Recomputation
from langchain_quantllm.engine.sequence import Sequence as Row
from langchain_quantllm.engine.speculation.costs import StepCosts
from langchain_quantllm.engine.speculation.draft_tokens import DraftTokens
from langchain_quantllm.engine.speculation.proposal import MOST_TOKENS
from langchain_quantllm.engine.staging import PendingForward
from langchain_quantllm.engine.step import PrefillChunk, Step
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.memory import weights_by_kind
from langchain_quantllm.options import NO_SPECULATION

_log = logging.getLogger(__name__)

_READ_GPU, _READ_CPU = 1024, 128
"""Most tokens of texts that it reads before proposals; longer ones it reads in several rounds."""

_FEW = 2  # tokens of each text that are read at about the price of one
_WEIGHT = 0.2  # of a new time


@dataclass
class _Text:
    """A sequence as the draft model has read it.

    Args:
        own: Its tokens, which are the sequence's own list, with the blocks and the slot that it has here.
        recomputation: Where its keys would become others; None for nowhere.
        fed: Proposed tokens that were read behind its known ones, at the last proposal.
    """

    own: Row
    recomputation: Recomputation | None
    fed: Sequence[int] = ()

    def sync(self) -> None:
        """Count what was read of the tokens that are known now, but for the last one, which is read again."""
        own = self.own
        for token in self.fed:
            if own.written >= len(own.ids) or own.ids[own.written] != token:
                break
            own.written += 1
        self.fed = ()
        own.written = min(own.written, len(own.ids) - 1)


class DraftModel:
    """A loaded model that proposes tokens to the sequences of one engine. Used by that engine's thread.

    Attributes:
        name: Folder or repository, for reports.
        failure: Why it proposes no more; None while it can.
    """

    def __init__(
        self,
        pipeline: Any,
        name: str,
        *,
        most_tokens: int,
        vocab_size: int,
        fusion: Fusion | None = None,
        no_fusion_reason: str | None = None,
        source: Any = None,
    ) -> None:
        """Allocate its KV cache, and check that its model can run over it.

        Args:
            pipeline: Its transformers pipeline; nothing of it is changed.
            name: Its name in reports.
            most_tokens: Tokens of the KV cache of the model that it proposes to: its own holds about as many.
            vocab_size: Token ids of that model lie below this.
            fusion: Its fused steps, which are closed with it; None if its modules run as they are.
            no_fusion_reason: Why there are none although they were asked for.
            source: What is to be kept alive with it.

        Raises:
            UnsupportedError: If its model cannot run this way; the message is the reason.
            NotEnoughMemoryError: If there is no room for its KV cache.
        """
        self.name = name
        self.failure: str | None = None
        self._source = source
        parts = EngineParts(
            pipeline.model,
            limits_of(pipeline.model, pipeline.tokenizer),
            cache_budget=None,
            switch=None,
            fusion=fusion,
            no_fusion_reason=no_fusion_reason,
            most_tokens=most_tokens + MOST_TOKENS,
        )
        self._parts: EngineParts | None = parts
        self._close_parts = weakref.finalize(self, _close, parts, fusion)
        self._close_parts.atexit = False
        if parts.states is not None or not parts.probe.continues:
            self.close()
            msg = "its layers keep a state, which cannot be taken back behind a wrong token"
            raise UnsupportedError(msg)
        self.weights_bytes = weights_by_kind(pipeline.model).total_bytes
        self.kv_cache_bytes = parts.info.kv_cache_bytes or 0
        self._vocab_size = vocab_size
        self._own_vocab_size = min(parts.probe.vocab_size, parts.limits.vocab_size)
        self._most_read = _READ_GPU if parts.is_gpu else _READ_CPU
        limits = (parts.limits.context_tokens, parts.limits.cache_tokens)
        self._most_tokens = min(limit for limit in limits if limit is not None)
        self._costs = StepCosts()
        self._token_s = 0.0  # of reading one token of a long text
        self._lock = threading.RLock()
        self._forget_all()

    def _forget_all(self) -> None:
        parts = self._parts
        assert parts is not None
        self._blocks = BlockManager((parts.limits.cache_tokens or 0) // BLOCK_TOKENS + 1)
        self._prefix_ids = PrefixIds(self._blocks, parts.rotary)
        self._slots = list(range(parts.slots - 1, -1, -1))
        self._texts: OrderedDict[Row, _Text] = OrderedDict()  # the last one was used last

    # For the choice of proposals.

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, with its weights."""
        return self._parts is None

    @property
    def held_blocks(self) -> int:
        """Blocks of its KV cache that texts hold."""
        return self._blocks.held

    def unread(self, row: Row) -> int | None:
        """Count the tokens that it would read before it proposes to a sequence; None if it cannot propose to it."""
        if self._parts is None or self.failure is not None or row.images is not None:
            return None
        text = self._texts.get(row)
        again = None if text is None else text.recomputation
        most = self._most_tokens if again is None else min(self._most_tokens, again.tokens)
        read = 0 if text is None else text.own.written
        if len(row.ids) + MOST_TOKENS > most:
            return None
        return max(1, len(row.ids) - read - (0 if text is None else len(text.fed)))

    def seconds(self, rows: int, count: int, unread: float) -> float | None:
        """Estimate the time of proposals; None if nothing is known.

        Args:
            rows: Sequences that get some.
            count: Most tokens of one of them.
            unread: Tokens to be read before, but for a few of each sequence.
        """
        step_s = self._costs.seconds_of(rows)
        return None if step_s is None else count * step_s + unread * (self._token_s or step_s / 8)

    # Proposals.

    def propose(self, counts: Mapping[Row, int]) -> dict[Row, tuple[int, ...]]:
        """Propose tokens behind the known ones of sequences, all of which are known.

        Args:
            counts: How many to each.

        Returns:
            The tokens of each sequence, up to so many: none while it reads a long text, or has no room. A failure is
            logged, and is the last call's end.
        """
        with self._lock:
            if self._parts is None or self.failure is not None:
                return {}
            try:
                return self._propose(counts)
            except Exception as error:  # torch.OutOfMemoryError, say: the texts go on without proposals
                self.failure = f"its forward failed: {error!r}"
                _log.warning("the draft model %s proposes no more: %s", self.name, self.failure)
                self._texts.clear()
                return {}

    def _propose(self, counts: Mapping[Row, int]) -> dict[Row, tuple[int, ...]]:
        began_s = time.perf_counter()
        chunks, reads = self._plan_reading(counts)
        if not chunks:
            return {}
        rows = [row for row in counts if row in reads and reads[row].is_last]
        inputs = {row: row.sampling_inputs(len(row.ids) - row.prompt_tokens, counts[row]) for row in rows}
        drawn = DraftTokens(rows, self._vocab_size, self._own_vocab_size)
        runner = self._parts.runner  # type: ignore[union-attr]
        forward = runner.run(Step([], [], chunks), [inputs[row][0] for row in rows])
        longest = max((counts[row] for row in rows), default=0)
        fed: dict[Row, int] = {}
        if rows:
            drawn.add(rows, self._sample(forward, rows, drawn))
        for i in range(1, longest):
            going = [row for row in rows if counts[row] > i and drawn.goes_on(row)]
            if not going:
                break
            fed.update(dict.fromkeys(going, i))
            owns = [self._texts[row].own for row in going]
            step = Step(owns, [len(row.ids) + i - 1 for row in going], [])
            forward = runner.run(step, [inputs[row][i] for row in going])
            drawn.add(going, self._sample(forward, going, drawn))
        found = drawn.tokens()
        for row in rows:
            self._texts[row].fed = found[row][: fed.get(row, 0)]
        steps = 1 + max(fed.values(), default=0)
        self._note(time.perf_counter() - began_s, len(rows), steps, sum(chunk.count for chunk in chunks))
        return {row: tokens for row, tokens in found.items() if tokens}

    def _note(self, seconds: float, rows: int, steps: int, read: int) -> None:
        long = max(0, read - _FEW * rows)
        if not long:
            self._costs.note(rows, seconds / steps, verifies=False)
            return
        step_s = self._costs.seconds_of(max(1, rows)) or 0.0
        token_s = max(0.0, seconds - steps * step_s) / long
        self._token_s += (_WEIGHT if self._token_s else 1.0) * (token_s - self._token_s)

    def _plan_reading(self, counts: Mapping[Row, int]) -> tuple[list[PrefillChunk], dict[Row, PrefillChunk]]:
        """Plan the tokens that are read of each sequence, within those of one round."""
        left = self._most_read
        reads: dict[Row, PrefillChunk] = {}
        for row, count in counts.items():
            text = self._text_of(row, keep=counts)
            if text is None or left <= 0:
                continue
            text.sync()
            text.own.register(self._blocks)
            text.own.share(self._blocks)
            start, end = text.own.written, len(row.ids)
            stop = min(end, start + left)
            if any(not 0 <= token < self._own_vocab_size for token in row.ids[start:stop]):
                continue
            if not self._reserve(text.own, stop if stop < end else end + count, keep=counts):
                continue
            reads[row] = PrefillChunk(text.own, start, stop - start, is_last=stop == end)
            left -= stop - start
            text.own.written = stop
        return list(reads.values()), reads

    def _sample(self, forward: PendingForward, rows: Sequence[Row], drawn: DraftTokens) -> PendingTokens:
        runner = self._parts.runner  # type: ignore[union-attr]
        mask = drawn.fill(rows, runner.blank_masks) if drawn.has_masks else None
        return runner.sample(forward, mask=mask)

    # Texts, slots and blocks.

    def _text_of(self, row: Row, keep: Mapping[Row, int]) -> _Text | None:
        """Return what was read of a sequence; None if there is no slot for it."""
        if row in self._texts:
            self._texts.move_to_end(row)
            return self._texts[row]
        parts = self._parts
        assert parts is not None
        if not self._texts and parts.model_changed():
            parts.rebuild()
            self._forget_all()
        while not self._slots:
            if not self._drop_oldest(keep):
                return None
        options = replace(row.request.options, speculation=NO_SPECULATION, draft=None)
        request = replace(row.request, options=options, mask=None)
        recomputation = self._prefix_ids.recomputation(request, NO_ADAPTER)
        own = Row(
            Completion(request, lambda ids: ""),
            prefix_id=self._prefix_ids.first(request, NO_ADAPTER) if request.shares_prefix else None,
            recomputation=recomputation,
        )
        own.ids = row.ids
        own.sampling_needs |= MASKS * (row.mask is not None)
        own.slot = self._slots.pop()
        self._texts[row] = _Text(own, recomputation)
        return self._texts[row]

    def _reserve(self, own: Row, tokens: int, keep: Mapping[Row, int]) -> bool:
        """Take blocks for so many tokens, from the sequences that were left out for the longest time if need be."""
        while len(own.blocks) * BLOCK_TOKENS < tokens:
            block = self._blocks.take()
            if block is not None:
                own.blocks.append(block)
            elif not self._drop_oldest(keep):
                return False
        return True

    def _drop_oldest(self, keep: Mapping[Row, int]) -> bool:
        """Drop what was read of the sequence that was used least recently; false if all are in use."""
        oldest = next((row for row in self._texts if row not in keep), None)
        if oldest is not None:
            self.forget(oldest)
        return oldest is not None

    def forget(self, row: Row) -> None:
        """Drop what was read of a sequence. Full blocks of known tokens stay for others that begin alike."""
        with self._lock:
            text = self._texts.pop(row, None)
            if text is not None and self._parts is not None:
                self._slots.append(text.own.slot)
                text.own.release(self._blocks)

    def close(self) -> None:
        """Release its model and its KV cache; waits for proposals under way."""
        with getattr(self, "_lock", threading.RLock()):
            self._parts = self._source = None
            self._close_parts()


def _close(parts: EngineParts, fusion: Fusion | None) -> None:
    with ExitStack() as stack:
        if fusion is not None:
            stack.callback(fusion.close)
        stack.callback(parts.close)
