"""The continuous engine: all requests in one running batch over KV blocks, step by step.

Moves a request from the queue through scheduler and model runner back to its stream, and handles failures. The
scheduler knows no tensors and the runner no text; the engine joins them.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter, abc, deque
from dataclasses import replace
from typing import Any

import torch

from langchain_quantllm.engine import speculation
from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.build import EngineParts
from langchain_quantllm.engine.clean_thread import in_clean_thread
from langchain_quantllm.engine.delivery import Forward, TokenDelivery
from langchain_quantllm.engine.detokenizer import Completion, begin_completions
from langchain_quantllm.engine.failures import request_failure, run_failure
from langchain_quantllm.engine.fusion.fuse import Fusion
from langchain_quantllm.engine.generate import limits_of
from langchain_quantllm.engine.kv_cache import resident_bytes
from langchain_quantllm.engine.lora import NO_ADAPTER
from langchain_quantllm.engine.prefix_ids import PrefixIds
from langchain_quantllm.engine.prompt_images import PromptImages, read_prompt
from langchain_quantllm.engine.request import EngineInfo, EngineLoad, Request
from langchain_quantllm.engine.request_checks import check_queue, check_request
from langchain_quantllm.engine.sampler import PendingTokens
from langchain_quantllm.engine.scheduler import Scheduler, age
from langchain_quantllm.engine.sequence import Lane, SamplingInput, Sequence
from langchain_quantllm.engine.speculation.costs import StepClock
from langchain_quantllm.engine.speculation.draft_model import DraftModel
from langchain_quantllm.engine.speculation.speculator import Speculator
from langchain_quantllm.engine.stages import Stages
from langchain_quantllm.engine.step import Step, split_step
from langchain_quantllm.engine.step_timing import time_step
from langchain_quantllm.engine.stream import ChunkStream
from langchain_quantllm.engine.worker import UNLOADED, Worker
from langchain_quantllm.errors import GenerationError, InvalidOptionError, NotEnoughMemoryError, UnsupportedError
from langchain_quantllm.memory import check_cache_budget, check_cache_dtype

_log = logging.getLogger(__name__)

_STEP_TOKENS_GPU, _STEP_TOKENS_CPU = (4096, 256), (512, 128)
"""Most tokens of a step: while no sequence decodes, and while some do."""

CHECKS_INTEGRITY = False
"""Check slots, blocks and sequences whenever the engine is idle; switched on by tests."""

_OFTEN = 64  # waiting requests that are looked at in every step, and steps after which more of them are
_SEEN_AHEAD = 4  # waiting requests of an owner, whose images have been read
_LEAST_CHUNK = 16  # tokens of prompts in a step on a device that is short of memory


class ContinuousEngine:
    """Runs the requests of any number of callers in one batch, which sequences join and leave at every step."""

    def __init__(
        self,
        pipeline: Any,
        *,
        kv_cache_memory: Any = None,
        adapters: AdapterSwitch | None = None,
        fusion: Fusion | None = None,
        no_fusion_reason: str | None = None,
        batch_invariant: bool = False,
        stages: Stages | None = None,
        no_stages_reason: str | None = None,
        kv_cache_dtype: str = "auto",
    ) -> None:
        """Take a loaded text-generation pipeline, and check that its model can run this way.

        Args:
            pipeline: The transformers pipeline; nothing of it is changed.
            kv_cache_memory: Memory of the KV cache: a fraction of what is free, bytes, or a text such as `"4GiB"`.
            adapters: The adapters that requests name; None if the model runs as it is.
            fusion: The model's fused steps, which the caller closes; None if its modules run as they are.
            no_fusion_reason: Why there are none although they were asked for.
            batch_invariant: Give a request the same logits, bit for bit, whatever runs beside it.
            stages: The stages of a model on several devices, which the caller closes; None to run it by its own hooks.
            no_stages_reason: Why there are none although it lies on several GPUs.
            kv_cache_dtype: Dtype of the KV cache: `"auto"` for that of the model, `"fp8"` or `"int8"`.

        Raises:
            UnsupportedError: If the model cannot run this way; the message is the reason.
            NotEnoughMemoryError: If there is no room for a KV cache.
        """
        budget = check_cache_budget(kv_cache_memory)
        self._tokenizer = pipeline.tokenizer
        self._parts = EngineParts(
            pipeline.model,
            limits_of(pipeline.model, pipeline.tokenizer),
            cache_budget=budget,
            switch=adapters,
            fusion=fusion,
            no_fusion_reason=no_fusion_reason,
            batch_invariant=batch_invariant,
            stages=stages,
            no_stages_reason=no_stages_reason,
            cache_dtype=check_cache_dtype(kv_cache_dtype),
        )
        self._runner = self._parts.runner
        self._step_tokens = _STEP_TOKENS_GPU if self._parts.is_gpu else _STEP_TOKENS_CPU
        self.limits = self._parts.limits
        self.peak_cache_tokens = 0
        self._pending: list[PendingTokens] = []
        """Tokens in flight; on a CPU there are none between two steps."""
        self._with_images: list[Sequence] = []
        """Waiting sequences with images, read or not."""
        self._looks = 0
        self._decodes_first = False
        """Whether sequences have waited for a step of prompts, and decode before the next one."""
        self._speculator = Speculator()
        self._speculator.most_masked = speculation.MOST_MASKED_ON_GPUS if self._parts.is_gpu else None
        self._drafts: dict[str, DraftModel] = {}
        self._no_draft_reasons: dict[str, str] = {}
        self._draft_lock = threading.Lock()
        self._reset_cache()
        self._worker = Worker(self._run, self._recover, gathers=False)

    # The protocol.

    @property
    def info(self) -> EngineInfo:
        """The engine's name, and why it was chosen."""
        speculator = self._speculator
        failed = [f"{draft.name}: {draft.failure}" for draft in self._drafts.values() if draft.failure is not None]
        return replace(
            self._parts.info,
            no_speculation_reason=self._parts.no_speculation_reason,
            draft_models=tuple(draft.name for draft in self._drafts.values() if draft.failure is None),
            no_draft_reason="; ".join([*self._no_draft_reasons.values(), *failed]) or None,
            proposed_tokens=speculator.proposed,
            accepted_tokens=speculator.accepted,
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in the KV cache."""
        return self._parts.token_bytes

    @property
    def kv_resident_bytes(self) -> int | None:
        """Bytes of the KV cache and states that lie in main memory; see `kv_cache.resident_bytes`."""
        states = self._parts.states
        return resident_bytes(self._parts.pools, () if states is None else states.tensors.values())

    @property
    def load(self) -> EngineLoad:
        """Its sequences at this moment. Any thread may ask."""
        scheduler = self._scheduler
        return EngineLoad(
            running=len(scheduler.running),
            waiting=self._worker.queued + scheduler.waiting_count,
            cache_tokens=self._blocks.held * BLOCK_TOKENS,
        )

    def read_images(self, processor: Any) -> str | None:
        """Let requests hold images from now on; returns the reason why they cannot, None if they can.

        The first call runs a prompt with a small image, beside the requests in flight.
        """
        if self._parts.images is not None:
            return None
        return in_clean_thread(self._parts.read_images)(processor)

    @property
    def drafts(self) -> list[DraftModel]:
        """The draft models that propose to its sequences."""
        return [draft for draft in self._drafts.values() if not draft.is_closed]

    def add_draft(self, key: str, make: abc.Callable[[int, int], DraftModel]) -> None:
        """Let a draft model propose to the sequences whose options name it, if it does not already.

        Where no step can verify several tokens, or the draft model cannot run so, there is none; `info` says why.

        Args:
            key: The `draft` of options.
            make: Makes it, from the tokens of the KV cache and the size of the vocabulary here.

        Raises:
            GenerationError: If the engine was closed, or is while the draft model is made.
        """
        with self._draft_lock:
            if self._tokenizer is None:
                raise GenerationError(UNLOADED)
            draft = self._drafts.get(key)
            if key in self._no_draft_reasons or (draft is not None and not draft.is_closed):
                return
            if self._parts.no_speculation_reason is not None:
                return
            try:
                if self._parts.is_gpu and not speculation.DRAFTS_ON_GPUS:
                    raise UnsupportedError("draft models are switched off on GPUs until their speed is measured there")
                draft = make(self.limits.cache_tokens or 0, self._parts.probe.vocab_size)
            except UnsupportedError as error:
                _log.warning("the draft model is not used: %s", error)
                self._no_draft_reasons[key] = str(error)
                return
            # A new table: the engine's thread may be looking through the one before.
            self._drafts = {**self._drafts, key: draft}
            self._speculator.drafters = {**self._speculator.drafters, key: draft}
            if self._tokenizer is None:  # `close` may have come too early to see it
                draft.close()
                raise GenerationError(UNLOADED)

    def submit(
        self,
        requests: abc.Sequence[Request],
        timeout_s: float | None = None,
        *,
        in_pieces: bool = True,
        max_waiting: int | None = None,
    ) -> ChunkStream:
        """Queue requests and return the stream of their chunks; see `Engine.submit`.

        Raises:
            InvalidOptionError: If a request holds ids outside of the vocabulary, or options of `generate` only.
            PromptTooLongError: If a request is longer than the context or the KV cache.
            QueueFullError: If more requests wait than `max_waiting` allows.
        """
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise GenerationError(UNLOADED)
        parts = self._parts
        for request in requests:
            check_request(request, self.limits, logits_size=parts.probe.vocab_size, adapters=parts.adapter_names)
        requests = self._find_images(requests)
        scheduler = self._scheduler
        arriving = max(0, self._worker.queued - scheduler.free_slots)
        check_queue(scheduler.waiting_count + arriving, max_waiting)
        stream, completions = begin_completions(requests, tokenizer, timeout_s, in_pieces=in_pieces)
        stream.wake = self._worker.wake
        self._worker.submit(completions)
        return stream

    def _find_images(self, requests: abc.Sequence[Request]) -> abc.Sequence[Request]:
        """Find the images of requests; samples of one call share theirs."""
        found: dict[int, PromptImages] = {}
        for request in requests:
            if request.media is not None and id(request.media) not in found:
                if self._parts.images is None:
                    msg = "images and sounds of this model are read by the pipeline engine only; use engine='auto'."
                    raise InvalidOptionError(msg)
                read = in_clean_thread(read_prompt)
                found[id(request.media)] = read(self._parts.model, request.prompt_ids, request.media)
        return [r if r.media is None else replace(r, media=None, images=found[id(r.media)]) for r in requests]

    def products(self) -> contextlib.AbstractContextManager[None]:
        """Let calls of the model itself in this thread, padded or not, multiply by the kernels of this engine.

        For log probabilities of whole texts, which requests do not report.
        """
        return self._parts.products()

    def time_step(self, rows: int, position: int, repeats: int) -> float | None:
        """Time the decode step by itself, without queue and text; only while nothing runs. See `step_timing`.

        Returns:
            Seconds; None if fewer sequences than these run at once.
        """
        if rows > self._parts.slots:
            return None
        self._reset_cache()  # the blocks are overwritten
        return in_clean_thread(time_step)(self._runner, rows, position, repeats)

    def close(self) -> None:
        """Cancel all requests and release the model and the KV cache."""
        self._tokenizer = None
        self._worker.close("the model was unloaded while it was generating.")
        for draft in self._drafts.values():
            draft.close()
        self._drafts, self._speculator.drafters = {}, {}
        self._parts.close()
        for name in ("_runner", "_scheduler", "_delivery"):
            vars(self).pop(name, None)

    # The loop.

    def _run(self, waiting: deque[Completion]) -> None:
        """Run requests until there are none left; more may join all the while. For what is raised, see `Worker`."""
        self._pending = []
        self._decodes_first = False
        clock = StepClock(self._speculator.costs, is_late=self._runner.is_asynchronous)
        while True:
            # 1. Take new requests, and drop cancelled ones.
            self._take(waiting)
            has_read = self._read_next_images()
            # 2. Plan the next step: which sequences decode, and which tokens of prompts run.
            drafting_s, filling_s = self._speculator.drafting_s, self._delivery.filling_s
            self._speculator.follows = self._runner.follows
            self._speculator.no_reason = self._parts.no_speculation_reason
            plan = self._scheduler.plan(
                mixes=not self._runner.captures, decodes_first=self._decodes_first, parts=self._runner.steps_at_once
            )
            self.peak_cache_tokens = max(self.peak_cache_tokens, self._blocks.held * BLOCK_TOKENS)
            if plan is None and not self._pending:
                if not has_read and not self._rests():
                    break
                continue
            # 3. Enqueue its forward; a long one of prompts with decode steps of other sequences between its layers.
            forwards = [] if plan is None else self._launch(plan)
            if self._runner.is_asynchronous:
                # 4. While the device runs it, turn the tokens of the step before into text.
                in_flight = self._deliver_before(forwards)
                # 5. Enqueue the sampling of the next tokens.
                self._pending = [*in_flight, *self._delivery.sample(forwards)]
            else:
                self._delivery.deliver(self._delivery.sample(forwards))
            clock.end_round(plan, self._speculator.drafting_s - drafting_s, self._delivery.filling_s - filling_s)
        self._check_idle()

    def _drop_stopped(self, beside: Step | None = None) -> None:
        """Drop sequences whose stream was closed or whose time is over, but none that `beside` runs."""
        runs = () if beside is None else {chunk.sequence for chunk in beside.chunks}
        running, sequences = list(self._scheduler.running), self._scheduler.sequences
        self._looks += 1
        # A long queue, which holds no blocks, is looked through now and then.
        is_due = not running or len(sequences) - len(running) <= _OFTEN or self._looks % _OFTEN == 0
        for sequence in sequences if is_due else running:
            if sequence.completion.stream.should_stop() and sequence not in runs:
                self._delivery.drop(sequence)

    def _take(self, waiting: deque[Completion]) -> None:
        self._drop_stopped()
        # Taken off the queue first: all that had changed when they were submitted is seen now.
        arrived = [waiting.popleft() for _ in range(len(waiting))]
        if arrived and self._parts.model_changed():
            self._rebuild()
        for completion in arrived:
            if completion.stream.should_stop():
                continue
            if self._parts.refusal is not None:
                completion.stream.fail(GenerationError(self._parts.refusal))
                continue
            try:
                adapter = self._adapter_number(completion.request)
                prefix_id = self._prefix_ids.first(completion.request, adapter)
                again = self._prefix_ids.recomputation(completion.request, adapter)
                sequence = Sequence(completion, prefix_id=prefix_id, adapter=adapter, recomputation=again)
            except BaseException as error:  # of the request's own mask
                completion.stream.fail(request_failure(error))
                continue
            self._scheduler.add(sequence)
            if sequence.images is not None:
                self._with_images.append(sequence)

    def _read_next_images(self) -> bool:
        """Run the vision tower for one request, the oldest first; a failure is that request's alone.

        Before its sequence may join, so that no other one shares blocks of a prompt that fails. Between two requests
        the others go on; of one owner, only so many are read ahead, as the features are to be kept until they are used.

        Returns:
            False if there was none.
        """
        self._with_images = [s for s in self._with_images if not s.has_ended and s.slot < 0]
        ahead: Counter[Lane] = Counter()  # read ones that are older
        for sequence in sorted(self._with_images, key=age):
            if sequence.has_seen_images:
                ahead[sequence.lane] += not sequence.is_unread
            elif ahead[sequence.lane] < _SEEN_AHEAD:
                self._read_images(sequence)
                return True
        return False

    def _read_images(self, sequence: Sequence) -> None:
        assert sequence.images is not None
        assert self._parts.images is not None
        try:
            self._parts.images.read(sequence.images)
        except torch.OutOfMemoryError as error:
            failure = GenerationError("the device ran out of memory for the request's images; give fewer or smaller.")
            failure.__cause__ = error
            self._delivery.fail(sequence, failure)
        except BaseException as error:
            self._delivery.fail(sequence, error)

    def _rests(self) -> bool:
        """Wait if all sequences rest because their text is not read; False if there is none left."""
        if not self._scheduler.sequences:
            return False
        if not self._scheduler.has_unread:
            msg = "sequences are left that cannot run"
            raise RuntimeError(msg)
        self._worker.wait_for_change()
        return True

    def _check_idle(self) -> None:
        if CHECKS_INTEGRITY:
            try:
                self._scheduler.check_integrity()
            except RuntimeError as error:
                _log.critical("the KV cache's books are wrong: %s", error)
                raise

    def _adapter_number(self, request: Request) -> int:
        adapters = self._parts.adapters
        return NO_ADAPTER if adapters is None else adapters.number_of(request.options.adapter)

    # Forwards.

    def _launch(self, step: Step) -> list[Forward]:
        for chunk in step.chunks:
            chunk.sequence.start()
        if step.proposals:  # sampled by what is known then
            return [self._runner.verify(step)]
        return self._run_step(step, {sequence: sequence.next_sampling_input() for sequence in step.sampled})

    def _run_step(
        self, step: Step, sampling: dict[Sequence, SamplingInput], whole: Step | None = None
    ) -> list[Forward]:
        """Run a step, or a part of a `whole` one; in smaller ones if the device has no room for all of its prompts."""
        tokens = sum(chunk.count for chunk in step.chunks)
        whole = whole or step
        between = self._decode_between(whole, tokens)
        self._decodes_first = bool(tokens) and between is None
        try:
            return [self._runner.run(step, [sampling[sequence] for sequence in step.sampled], between)]
        except torch.OutOfMemoryError:
            if tokens <= _LEAST_CHUNK or not split_step(step, max(_LEAST_CHUNK, tokens // 2))[1].chunks:
                raise
        # Outside of the handler, whose error holds the tensors of the failed step.
        torch.cuda.empty_cache()
        half = max(_LEAST_CHUNK, tokens // 2)
        _log.warning("no memory for %d tokens of prompts at once; going on with %d", tokens, half)
        alone, beside = self._step_tokens
        self._step_tokens = (min(half, alone), min(half, beside))
        self._scheduler.step_tokens, self._scheduler.step_tokens_while_decoding = self._step_tokens
        return [forward for part in split_step(step, half) for forward in self._run_step(part, sampling, whole)]

    def _decode_between(self, step: Step, tokens: int) -> abc.Callable[[int], None] | None:
        """Return the hook that decodes between the layers of so many tokens of a step's prompts; None for none.

        The sequences of all of its prompts are left alone: some may not have run yet, and no token is sampled. Between
        two decode steps lies the work of some `step_tokens_while_decoding` tokens of prompts.
        """
        parts = tokens / self._step_tokens[1]
        if parts <= 1.5:
            return None
        reads = {chunk.sequence for chunk in step.chunks}
        rows = [s for s in self._scheduler.running if s.decodes and not s.is_complete and s not in reads]
        if not rows or not self._runner.can_replay(len(rows)):
            return None
        layers_apart = max(1, round(self._parts.probe.layer_count / parts))

        def decode(layer: int) -> None:
            if layer % layers_apart == 0:
                self._decode_beside(step)

        return decode

    def _decode_beside(self, running: Step) -> None:
        """Run a decode step in the middle of a step of prompts, whose sequences stay as they are."""
        self._drop_stopped(beside=running)
        self._delivery.deliver(self._pending)
        self._pending = []
        if (step := self._scheduler.plan_beside(running)) is not None:
            sampling = [sequence.next_sampling_input() for sequence in step.sampled]
            self._pending = self._delivery.sample([self._runner.run(step, sampling)])

    def _deliver_before(self, forwards: abc.Sequence[Forward]) -> list[PendingTokens]:
        """Deliver pending tokens before those after some forwards are sampled.

        Returns:
            Tokens of other sequences that stay in flight, where several steps run at the same time.
        """
        kept = len(self._pending)
        others = self._runner.steps_at_once - 1 if forwards else 0
        runs = {sequence for forward in forwards for sequence in forward.sequences} if others else set()
        while others > 0 and kept > 0 and runs.isdisjoint(self._pending[kept - 1].sequences):
            kept, others = kept - 1, others - 1
        in_flight = self._pending[kept:]
        self._delivery.deliver(self._pending[:kept])
        return in_flight

    # Failures and changes.

    def _recover(self, error: BaseException) -> Exception:
        """Drop all sequences and begin anew after a failure; returns the error for the sequences' requests."""
        rows = len(self._scheduler.sequences)
        for sequence in self._scheduler.sequences:
            self._speculator.end(sequence)
        self._pending = []
        self._reset_cache()
        self._runner.drop_graphs()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not isinstance(error, torch.OutOfMemoryError):
            return run_failure(error)
        return NotEnoughMemoryError(
            f"the device ran out of memory with {rows} rows; lower batch_size or kv_cache_memory, or load the model in "
            "fewer bits."
        )

    def _reset_cache(self) -> None:
        """Forget the content of all blocks."""
        alone, beside = self._step_tokens
        self._with_images = []
        self._blocks = BlockManager((self.limits.cache_tokens or 0) // BLOCK_TOKENS + 1, self._parts.new_snapshots())
        self._prefix_ids = PrefixIds(self._blocks, self._parts.rotary)
        self._scheduler = Scheduler(
            self._blocks,
            slots=self._parts.slots,
            step_tokens=alone,
            step_tokens_while_decoding=beside,
            cuts_prompts=self._parts.probe.continues,
            window=0 if self._parts.states else self._parts.probe.reach,
            speculator=self._speculator,
        )
        self._delivery = TokenDelivery(self._parts, self._scheduler, self._speculator)

    def _rebuild(self) -> None:
        """Stop sharing keys and values of a model that has changed, and rebuild the parts.

        Running sequences go on, with their blocks and the new weights.
        """
        self._prefix_ids = PrefixIds(self._blocks, self._parts.rotary)
        for sequence in self._scheduler.sequences:
            sequence.stop_sharing()
        self._parts.rebuild()
        if self._parts.refusal is not None:
            for sequence in self._scheduler.sequences:
                self._delivery.fail(sequence, GenerationError(self._parts.refusal))
