"""The continuous engine: all requests in one running batch over KV blocks, step by step.

Moves a request from the queue through scheduler and model runner back to its stream, and handles failures. The
scheduler knows no tensors and the runner no text; the engine joins them.
"""

from __future__ import annotations

import logging
from collections import abc, deque
from typing import Any

import torch

from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.build import EngineParts
from langchain_quantllm.engine.detokenizer import Completion, begin_completions
from langchain_quantllm.engine.fusion.fuse import Fusion
from langchain_quantllm.engine.generate import NAN_LOGITS, limits_of
from langchain_quantllm.engine.kv_cache import resident_bytes
from langchain_quantllm.engine.lora import NO_ADAPTER
from langchain_quantllm.engine.model_runner import PendingForward
from langchain_quantllm.engine.request import EngineInfo, Request, check_request
from langchain_quantllm.engine.sampler import NOTHING_ALLOWED, PendingTokens
from langchain_quantllm.engine.scheduler import Decode, Prefill, PrefillChunk, Scheduler, split_chunks
from langchain_quantllm.engine.sequence import SamplingInput, Sequence
from langchain_quantllm.engine.step_timing import time_step
from langchain_quantllm.engine.stream import ChunkStream, TokenLogprob, fail_streams
from langchain_quantllm.engine.worker import UNLOADED, Worker
from langchain_quantllm.errors import GenerationError, NotEnoughMemoryError
from langchain_quantllm.memory import check_cache_budget

_log = logging.getLogger(__name__)

_PREFILL_GPU, _PREFILL_CPU = (4096, 1024), (512, 128)
"""Most tokens of a prefill step: while no sequence decodes, and while others wait to decode."""

_LEAST_PREFILL = 16  # tokens of a prefill step on a device that is short of memory


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
    ) -> None:
        """Take a loaded text-generation pipeline, and check that its model can run this way.

        Args:
            pipeline: The transformers pipeline; nothing of it is changed.
            kv_cache_memory: Memory of the KV cache: a fraction of what is free, bytes, or a text such as `"4GiB"`.
            adapters: The adapters that requests name; None if the model runs as it is.
            fusion: The model's fused steps, which the caller closes; None if its modules run as they are.
            no_fusion_reason: Why there are none although they were asked for.
            batch_invariant: Give a request the same logits, bit for bit, whatever runs beside it.

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
        )
        self._runner = self._parts.runner
        self._prefill_tokens = _PREFILL_GPU if self._parts.is_gpu else _PREFILL_CPU
        self.limits = self._parts.limits
        self.peak_cache_tokens = 0
        self._prefix_ids: dict[int, int] = {}  # the first of each adapter's blocks
        self._samples_prefix_id: int | None = None
        self._reset_cache()
        self._worker = Worker(self._run, gathers=False)

    # The protocol.

    @property
    def info(self) -> EngineInfo:
        """The engine's name, and why it was chosen."""
        return self._parts.info

    @property
    def kv_resident_bytes(self) -> int | None:
        """Bytes of the KV cache that lie in main memory; see `kv_cache.resident_bytes`."""
        return resident_bytes(self._parts.pools)

    def submit(
        self, requests: abc.Sequence[Request], timeout_s: float | None = None, *, in_pieces: bool = True
    ) -> ChunkStream:
        """Queue requests and return the stream of their chunks; see `Engine.submit`.

        Raises:
            InvalidOptionError: If a request holds ids outside of the vocabulary, or options of `generate` only.
            PromptTooLongError: If a request is longer than the context or the KV cache.
        """
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise GenerationError(UNLOADED)
        parts = self._parts
        for request in requests:
            check_request(request, self.limits, logits_size=parts.probe.vocab_size, adapters=parts.adapter_names)
        stream, completions = begin_completions(requests, tokenizer, timeout_s, in_pieces=in_pieces)
        self._worker.submit(completions)
        return stream

    def time_step(self, rows: int, position: int, repeats: int) -> float:
        """Time the decode step by itself, without queue and text; only while nothing runs. See `step_timing`."""
        self._reset_cache()  # the blocks are overwritten
        return time_step(self._runner, rows, position, repeats)

    def close(self) -> None:
        """Cancel all requests and release the model and the KV cache."""
        self._worker.close("the model was unloaded while it was generating.")
        self._parts.close()
        self._tokenizer = None
        del self._runner, self._scheduler

    # The loop.

    def _run(self, waiting: deque[Completion]) -> None:
        """Run requests until there are none left; more may join all the while."""
        try:
            pending: list[PendingTokens] = []
            while True:
                # 1. Take new requests, and drop cancelled ones.
                self._take(waiting)
                # 2. Plan the next step: prefill or decode, over which sequences.
                plan = self._scheduler.plan()
                self.peak_cache_tokens = max(self.peak_cache_tokens, self._blocks.held * BLOCK_TOKENS)
                if plan is None and not pending:
                    break
                # 3. Enqueue its forward.
                forwards = [] if plan is None else self._launch(plan)
                if self._runner.is_asynchronous:
                    # 4. While the device runs it, turn the tokens of the step before into text.
                    self._deliver(pending)
                    # 5. Enqueue the sampling of the next tokens.
                    pending = self._sample(forwards)
                else:
                    self._deliver(self._sample(forwards))
            if self._scheduler.sequences:
                msg = "sequences are left that cannot run"
                raise RuntimeError(msg)
        except Exception as error:
            self._fail_all(error)

    def _take(self, waiting: deque[Completion]) -> None:
        for sequence in self._scheduler.sequences:
            if sequence.completion.stream.cancelled:
                self._drop(sequence)
        if waiting and self._parts.model_changed():
            self._rebuild()
        while waiting:
            completion = waiting.popleft()
            if completion.stream.cancelled:
                continue
            if self._parts.refusal is not None:
                completion.stream.fail(GenerationError(self._parts.refusal))
                continue
            try:
                adapter = self._adapter_number(completion.request)
                prefix_id = self._first_prefix_id(completion.request, adapter)
                sequence = Sequence(completion, prefix_id=prefix_id, adapter=adapter)
            except Exception as error:  # of the request's own mask
                completion.stream.fail(_failure(error))
                continue
            self._scheduler.add(sequence)

    def _adapter_number(self, request: Request) -> int:
        adapters = self._parts.adapters
        return NO_ADAPTER if adapters is None else adapters.number_of(request.options.adapter)

    def _first_prefix_id(self, request: Request, adapter: int) -> int | None:
        """Choose who shares a prompt's blocks: all requests of its adapter, the samples of its call, or none."""
        if request.shares_prefix:
            if adapter not in self._prefix_ids:  # keys and values of two adapters differ
                self._prefix_ids[adapter] = self._blocks.new_prefix_id()
            return self._prefix_ids[adapter]
        if request.options.n == 1:
            return None
        if request.sample_index == 0:  # the call's other samples follow it at once
            self._samples_prefix_id = self._blocks.new_prefix_id()
        return self._samples_prefix_id

    # Forwards.

    def _launch(self, plan: Prefill | Decode) -> list[PendingForward]:
        if isinstance(plan, Decode):
            sampling = [sequence.next_sampling_input() for sequence in plan.sequences]
            return [self._runner.decode(plan.sequences, plan.positions, sampling)]
        for chunk in plan.chunks:
            chunk.sequence.start()
        ready = [chunk.sequence for chunk in plan.chunks if chunk.is_last]
        return self._prefill(plan.chunks, {sequence: sequence.next_sampling_input() for sequence in ready})

    def _prefill(
        self, chunks: abc.Sequence[PrefillChunk], sampling: dict[Sequence, SamplingInput]
    ) -> list[PendingForward]:
        """Run chunks of prompts; in smaller steps if the device has no room for all."""
        tokens = sum(chunk.count for chunk in chunks)
        try:
            return [self._runner.prefill(chunks, [sampling[chunk.sequence] for chunk in chunks if chunk.is_last])]
        except torch.OutOfMemoryError:
            if tokens <= _LEAST_PREFILL:
                raise
        # Outside of the handler, whose error holds the tensors of the failed step.
        torch.cuda.empty_cache()
        half = max(_LEAST_PREFILL, tokens // 2)
        _log.warning("no memory for a prefill of %d tokens at once; going on with %d", tokens, half)
        self._prefill_tokens = (min(half, self._prefill_tokens[0]), min(half, self._prefill_tokens[1]))
        self._scheduler.prefill_tokens, self._scheduler.prefill_tokens_while_decoding = self._prefill_tokens
        return [forward for part in split_chunks(chunks, half) for forward in self._prefill(part, sampling)]

    # Sampling.

    def _sample(self, forwards: abc.Sequence[PendingForward]) -> list[PendingTokens]:
        return [self._sample_after(forward) for forward in forwards if forward.sequences]

    def _sample_after(self, forward: PendingForward) -> PendingTokens:
        sequences = forward.sequences
        mask = self._fill_masks(sequences) if any(s.mask is not None for s in sequences) else None
        wanted = [n for s in sequences if (n := s.request.options.logprobs) is not None]
        return self._runner.sample(forward, mask=mask, alternatives=max(wanted, default=None))

    def _fill_masks(self, sequences: abc.Sequence[Sequence]) -> torch.Tensor:
        bits = self._runner.blank_masks(len(sequences))
        for i, sequence in enumerate(sequences):
            if sequence.mask is None or sequence.has_ended:
                continue
            try:
                if not sequence.mask.fill(bits[i : i + 1]):
                    bits[i] = -1
                if sequence.mask.ended:
                    sequence.completion.stream.put(sequence.completion.finish("stop"))
                    self._drop(sequence)
            except Exception as error:
                bits[i] = -1
                self._fail(sequence, error)
        return bits

    # Tokens.

    def _deliver(self, pending: abc.Sequence[PendingTokens]) -> None:
        """Wait for the tokens of a step and append them to their sequences."""
        for tokens in pending:
            ids, logprobs = tokens.wait()
            for i, sequence in enumerate(tokens.sequences):
                if not sequence.has_ended:
                    self._push(sequence, ids[i], None if logprobs is None else logprobs[i])

    def _push(self, sequence: Sequence, token_id: int, logprob: tuple[float, list[int], list[float]] | None) -> None:
        if token_id == NOTHING_ALLOWED:
            self._fail(sequence, GenerationError("the request's mask allows no token."))
            return
        if token_id < 0:
            blocks = list(sequence.blocks)
            self._fail(sequence, GenerationError(NAN_LOGITS))
            # Zero NaN blocks: masked values are multiplied by 0, and 0 times NaN is NaN.
            self._runner.zero(self._blocks.discard(blocks))
            return
        self._scheduler.push(sequence, token_id)
        completion = sequence.completion
        try:
            if sequence.mask is not None:
                sequence.mask.accept(token_id)
            chunk = completion.push(token_id, _token_logprob(sequence.request, token_id, logprob))
        except Exception as error:  # of the request's own mask, or of its tokenizer
            self._fail(sequence, error)
            return
        if chunk is not None:
            completion.stream.put(chunk)
        if completion.finish_reason is not None:
            self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        sequence.has_ended = True
        self._scheduler.remove(sequence)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        sequence.completion.stream.fail(_failure(error))
        self._drop(sequence)

    # Failures and changes.

    def _fail_all(self, error: Exception) -> None:
        """Fail all sequences with the cause, and begin anew for later requests."""
        sequences = self._scheduler.sequences
        report: Exception = GenerationError(f"the model failed while generating: {error!r}")
        if isinstance(error, torch.OutOfMemoryError):
            report = NotEnoughMemoryError(
                f"the device ran out of memory with {len(sequences)} rows; lower batch_size or kv_cache_memory, or "
                "load the model in fewer bits."
            )
        fail_streams({sequence.completion.stream for sequence in sequences}, report, error)
        self._reset_cache()
        self._runner.drop_graphs()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _reset_cache(self) -> None:
        """Forget the content of all blocks."""
        alone, beside = self._prefill_tokens
        self._blocks = BlockManager((self.limits.cache_tokens or 0) // BLOCK_TOKENS + 1)
        self._prefix_ids = {}
        self._samples_prefix_id = None
        self._scheduler = Scheduler(
            self._blocks, slots=self._parts.slots, prefill_tokens=alone, prefill_tokens_while_decoding=beside
        )

    def _rebuild(self) -> None:
        """Stop sharing keys and values of a model that has changed, and rebuild the parts.

        Running sequences go on, with their blocks and the new weights.
        """
        self._prefix_ids = {}
        for sequence in self._scheduler.sequences:
            sequence.stop_sharing()
        self._parts.rebuild()
        if self._parts.refusal is not None:
            for sequence in self._scheduler.sequences:
                self._fail(sequence, GenerationError(self._parts.refusal))


def _failure(error: Exception) -> Exception:
    """Wrap an error of a request as one of this package's, with the error as its cause."""
    if isinstance(error, GenerationError):
        return error
    failure = GenerationError(f"this request failed while generating: {error!r}")
    failure.__cause__ = error
    return failure


def _token_logprob(
    request: Request, token_id: int, found: tuple[float, list[int], list[float]] | None
) -> TokenLogprob | None:
    wanted = request.options.logprobs
    if wanted is None or found is None:
        return None
    chosen, ids, logprobs = found
    return TokenLogprob(token_id=token_id, logprob=chosen, top=tuple(zip(ids, logprobs, strict=True))[:wanted])
