"""The fast engine: every request in one running batch, over pages, step by step.

Owns how rows get from the queue through scheduler and runner back to their streams, and what
happens when something fails. The scheduler knows no tensors, the runner no text; here they meet.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from langchain_quantllm.compat.transformers_attention import attention_name
from langchain_quantllm.engine.adapter_switch import AdapterSwitch, changed_by_hand
from langchain_quantllm.engine.attention import Attention, GatherAttention, TritonAttention
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.cuda_graphs import no_graph_reason
from langchain_quantllm.engine.detokenizer import Row
from langchain_quantllm.engine.fusion.fuse import Fusion
from langchain_quantllm.engine.generate import NO_NUMBERS, decoder_of, limits_of
from langchain_quantllm.engine.kv_cache import allocate_pools, count_pages, resident_bytes
from langchain_quantllm.engine.lora import NO_ADAPTER, LoraStack
from langchain_quantllm.engine.model_check import fingerprint, probe, unsupported_reason
from langchain_quantllm.engine.model_runner import Chance, Drawn, Launched, Runner
from langchain_quantllm.engine.request import EngineInfo, ModelLimits, Request, TokenLogprob
from langchain_quantllm.engine.sampler import BLOCKS, MASKS, NOTHING_ALLOWED, needs_of
from langchain_quantllm.engine.scheduler import Decode, Piece, Prefill, RowState, Scheduler
from langchain_quantllm.engine.stream import ChunkStream
from langchain_quantllm.engine.verify_engine import try_out
from langchain_quantllm.engine.worker import UNLOADED, Worker
from langchain_quantllm.errors import (
    GenerationError,
    InvalidOptionError,
    NotEnoughMemoryError,
    PromptTooLongError,
    UnsupportedError,
)
from langchain_quantllm.memory import check_cache_budget, release_heap
from langchain_quantllm.options import BASE_ADAPTER, needs_generate

_log = logging.getLogger(__name__)

SLOTS_GPU, SLOTS_CPU = 128, 32
"""Most rows at once."""

_PREFILL_GPU, _PREFILL_CPU = (4096, 1024), (512, 128)
"""Most tokens of a prefill step: with no other rows, and while others wait to decode on."""

_LEAST_PREFILL = 16
_FEWEST_PAGES = 64  # a pool that nobody has sized is made no smaller than half of it
_TRIED_PAGES = 64  # several programs share a row of so many


class _Job:
    """A row on its way: its text, its place in the schedule, its numbers and its mask."""

    def __init__(self, row: Row, stream: ChunkStream, root: int | None, adapter: int) -> None:
        request = row.request
        self.row = row
        self.stream = stream
        self.request = request
        self.state = RowState(
            request.prompt_ids, request.max_new_tokens, root=root, max_rows=request.max_rows, adapter=adapter
        )
        self.need = needs_of(request)
        self.is_gone = False
        self._has_begun = False
        self.mask = None if request.mask is None else request.mask()
        self._random = random.Random(f"{request.seed}:{request.sample_index}")  # noqa: S311  (no secrets here)

    def begin(self) -> None:
        """Note that its prompt is being run, and how much of it was there already."""
        if not self._has_begun:
            self._has_begun = True
            self.row.start()
        self.row.cached_tokens = self.state.cached_tokens or 0

    def next_chance(self) -> Chance:
        """Give what the drawing of the next token takes; the scheduler has counted it already."""
        request = self.request
        has_ends = bool(request.eos_token_ids or request.stop_token_ids)
        return Chance(
            uniform=self._random.random() if request.options.do_sample else 0.0,
            may_end=not has_ends or (not request.options.ignore_eos and self.state.drawn > request.min_new_tokens),
        )


class ContinuousEngine:
    """Runs requests of any number of callers in one batch that rows join and leave at every step."""

    def __init__(
        self,
        pipeline: Any,
        *,
        kv_cache_memory: Any = None,
        adapters: AdapterSwitch | None = None,
        fusion: Fusion | None = None,
        why_not_fused: str | None = None,
    ) -> None:
        """Take a loaded text-generation pipeline, and check that its model can be driven.

        Args:
            pipeline: The transformers pipeline; nothing of it is changed.
            kv_cache_memory: Memory of the KV cache: a fraction of what is free, bytes, or a text such as `"4GiB"`.
            adapters: The adapters that requests name; None where the model runs as it is.
            fusion: The model's fused steps, which stay the caller's to close; None where its modules run as they are.
            why_not_fused: Why there are none although they were asked for.

        Raises:
            UnsupportedError: If the model cannot be driven; the message is the reason.
            NotEnoughMemoryError: If there is no room for a KV cache.
        """
        budget = check_cache_budget(kv_cache_memory)
        model = self._model = pipeline.model
        self._tokenizer = pipeline.tokenizer
        if (reason := unsupported_reason(model)) is not None:
            raise UnsupportedError(reason)
        is_gpu = model.get_input_embeddings().weight.device.type != "cpu"
        self._slots = SLOTS_GPU if is_gpu else SLOTS_CPU
        self._prefill_tokens = _PREFILL_GPU if is_gpu else _PREFILL_CPU
        self._notes = [] if why_not_fused is None else [f"no fused steps: {why_not_fused}"]
        self._limits = limits_of(model, self._tokenizer)
        self._switch = adapters
        self._fusion = fusion
        self._stack: LoraStack | None = None
        self._why_no_rows: str | None = None
        try:
            self._make_ready(budget)
        except BaseException:
            if self._stack is not None:
                self._stack.close()
            raise
        self._jobs: dict[RowState, _Job] = {}
        self._peak_pages = 0
        self._put_back_before = 0
        self._group_root: int | None = None
        self._forget_pages()
        self._worker = Worker(self._run, gathers=False)

    def _make_ready(self, budget: float | int | None) -> None:
        """Allocate what the engine needs, and check that it gives what the model gives."""
        model = self._model
        try:
            if self._switch is not None:
                self._stack = LoraStack(model, self._switch.names)
            self._probe = probe(model)
            attention, uses_triton = self._choose_attention()
            self._runner = self._make_runner(attention, budget, can_capture=uses_triton)
            release_heap()  # the first forward repacks weights on some CPUs, by way of four times their size
        except torch.OutOfMemoryError as error:
            msg = "the device has no memory left for the engine; free some, or load the model in fewer bits."
            raise NotEnoughMemoryError(msg) from error
        self._fingerprint = fingerprint(model, names_adapters=self._stack is not None)

    def _make_runner(self, attention: Attention, budget: float | int | None, *, can_capture: bool) -> Runner:
        """Allocate the pool and find the runner that drives the model; with half the pool where memory is short."""
        shapes = self._probe.shapes
        pages = count_pages(shapes, budget, rows=self._slots, context=self._limits.context_tokens)
        while True:
            self._limits = replace(self._limits, cache_tokens=(pages - 1) * BLOCK_TOKENS)
            try:
                self._pools = allocate_pools(shapes, pages)
                return self._verified_runner(attention, can_capture=can_capture)
            except (NotEnoughMemoryError, torch.OutOfMemoryError):
                # What is measured as free may be in pieces, or not for this process.
                if budget is not None or pages < _FEWEST_PAGES:
                    raise
            self._pools = []
            torch.cuda.empty_cache()
            pages //= 2

    def _choose_attention(self) -> tuple[Attention, bool]:
        devices = {shape.device for shape in self._probe.shapes}
        if any(device.type != "cuda" for device in devices):
            return GatherAttention(), False
        if any(max(shape.key_dim, shape.value_dim) > 256 for shape in self._probe.shapes):
            self._notes.append("attention by gathering pages: heads are larger than 256")
            return GatherAttention(), False
        try:
            from langchain_quantllm.kernels import attention as paged_attention

            attention = TritonAttention(paged_attention, sorted(devices, key=str))
            attention.try_out(allocate_pools(self._probe.shapes[:1], _TRIED_PAGES)[0])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # not installed, or nothing here to compile with
            self._notes.append(f"attention by gathering pages: Triton cannot be used ({error!r})")
            return GatherAttention(), False
        return attention, True

    def _verified_runner(self, attention: Attention, *, can_capture: bool) -> Runner:
        """Make the runner that gives the model's own logits: by registered attention, or by catching PyTorch's."""
        context = self._limits.context_tokens
        cached = (self._limits.cache_tokens or 0) // BLOCK_TOKENS
        pages_per_row = cached if context is None else min(cached, -(-context // BLOCK_TOKENS))
        failure: UnsupportedError | None = None
        for by_sdpa in (False, True):
            if by_sdpa and attention_name(self._model.config) != "sdpa":
                break
            runner = Runner(
                self._model,
                self._pools,
                attention,
                slots=self._slots,
                pages_per_row=max(2, pages_per_row),
                vocab_size=self._probe.vocab_size,
                by_sdpa=by_sdpa,
                can_capture=can_capture,
                why_no_graphs=no_graph_reason(self._model, self._whole) if can_capture else None,
                adapters=self._stack,
                fusion=self._fusion,
            )
            try:
                try_out(runner, self._model, self._probe, self._switch, self._fusion)
            except UnsupportedError as error:
                failure = failure or error
                continue
            return runner
        raise failure or UnsupportedError("its attention cannot be reached")

    @property
    def _whole(self) -> frozenset[int]:
        return frozenset() if self._fusion is None else self._fusion.whole

    # The protocol.

    @property
    def info(self) -> EngineInfo:
        """Which engine this is."""
        token_bytes = sum(shape.token_bytes for shape in self._probe.shapes)
        why_not = self._runner.why_no_graphs
        fused = {} if self._fusion is None else {kind.kind: kind.fused for kind in self._fusion.summary}
        if self._runner.sampler.draws_at_once:
            fused["drawing"] = 1
        notes = [*self._notes, *([f"decode steps are no CUDA graphs: {why_not}"] if why_not else [])]
        if self._fusion is not None:
            kinds = [kind for kind in self._fusion.summary if kind.left and not kind.fused]
            notes += [f"no {kind.kind} steps are fused: {max(kind.left, key=kind.left.__getitem__)}" for kind in kinds]
        return EngineInfo(
            name="fast",
            reason="; ".join(["one running batch over pages", *notes]),
            graphs=self._runner.captures,
            kv_cache_tokens=self._limits.cache_tokens,
            kv_cache_bytes=self._pages.pages * BLOCK_TOKENS * token_bytes,
            fused=fused,
        )

    @property
    def limits(self) -> ModelLimits:
        """What the model can be asked for."""
        return self._limits

    @property
    def peak_cache_tokens(self) -> int:
        """Most tokens that rows have held in the KV cache at once."""
        return self._peak_pages * BLOCK_TOKENS

    @property
    def kv_resident_bytes(self) -> int | None:
        """Bytes of the KV cache that lie in main memory; see `kv_pool.resident_bytes`."""
        return resident_bytes(getattr(self, "_pools", ()))  # another thread may have closed it

    @property
    def put_back(self) -> int:
        """Times that a row was put back for want of pages."""
        scheduler: Scheduler | None = getattr(self, "_scheduler", None)
        return self._put_back_before + (scheduler.preempted if scheduler is not None else 0)

    def submit(
        self, requests: Sequence[Request], timeout_s: float | None = None, *, in_pieces: bool = True
    ) -> ChunkStream:
        """Queue rows and return the stream of their chunks; see `Engine.submit`.

        Raises:
            InvalidOptionError: If a request holds ids that the model has not, or options of `generate` only.
            PromptTooLongError: If a request is longer than the context or the KV cache.
        """
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise GenerationError(UNLOADED)
        for request in requests:
            self._check_request(request)
        stream = ChunkStream(len(requests), timeout_s)
        rows = [
            Row(request, i, decoder_of(tokenizer, request), in_pieces=in_pieces) for i, request in enumerate(requests)
        ]
        self._worker.submit(rows, stream)
        return stream

    def _check_request(self, request: Request) -> None:
        """Refuse what would fail on the device, where it would take the others with it."""
        ids, limits = request.prompt_ids, self._limits
        if not ids or min(ids) < 0 or max(ids) >= limits.vocab_size:
            msg = f"prompt_ids must be token ids from 0 to {limits.vocab_size - 1}, and at least one."
            raise InvalidOptionError(msg)
        if any(not 0 <= i < self._probe.vocab_size for i in request.eos_token_ids + request.stop_token_ids):
            msg = f"the tokens that end a text must lie below {self._probe.vocab_size}."
            raise InvalidOptionError(msg)
        adapter = request.options.adapter
        if self._switch is not None and adapter not in (None, BASE_ADAPTER, *self._switch.names):
            msg = f"adapter={adapter!r} is none of the model's: {', '.join((*self._switch.names, BASE_ADAPTER))}."
            raise InvalidOptionError(msg)
        if (option := needs_generate(request.options)) is not None:
            msg = f"{option} is carried out by the pipeline engine only; use engine='auto' or 'pipeline'."
            raise InvalidOptionError(msg)
        tokens = len(ids) + request.max_new_tokens
        most = min(n for n in (limits.context_tokens, limits.cache_tokens) if n is not None)
        if tokens > most:
            msg = f"prompt and completion may have {most} tokens together, not {tokens}; see kv_cache_memory."
            raise PromptTooLongError(msg)

    def time_step(self, rows: int, position: int, repeats: int) -> float:
        """Time the decode step by itself, without queue and text; only while nothing runs. See `Runner.time_step`."""
        self._forget_pages()  # what they hold is overwritten
        return self._runner.time_step(rows, position, repeats)

    def close(self) -> None:
        """Cancel what runs and let go of the model and the KV cache."""
        self._worker.close("the model was unloaded while it was generating.")
        if self._stack is not None:
            self._stack.close()
        self._model = self._tokenizer = self._stack = self._switch = self._fusion = None
        self._jobs.clear()
        del self._runner, self._pools, self._scheduler

    # The loop.

    def _run(self, waiting: deque[tuple[Row, ChunkStream]]) -> None:
        """Run rows until there are none left; more may join all the while."""
        try:
            on_way: list[tuple[list[_Job], Drawn]] = []
            while True:
                self._take(waiting)
                plan = self._scheduler.plan()
                self._peak_pages = max(self._peak_pages, self._pages.held)
                if plan is None and not on_way:
                    break
                launched = [] if plan is None else self._launch(plan)
                if self._runner.is_asynchronous:
                    # The device runs this step while the host works on what the one before has drawn.
                    self._deliver(on_way)
                    on_way = self._draw(launched)
                else:
                    self._deliver(self._draw(launched))
            if self._scheduler.has_work:
                msg = "rows are left that cannot run"
                raise RuntimeError(msg)
        except Exception as error:
            self._fail(error)

    def _take(self, waiting: deque[tuple[Row, ChunkStream]]) -> None:
        for job in [job for job in self._jobs.values() if job.stream.cancelled]:
            self._drop(job)
        if waiting:
            self._notice_changes()
        while waiting:
            row, stream = waiting.popleft()
            if stream.cancelled:
                continue
            if self._why_no_rows is not None:
                stream.fail(GenerationError(self._why_no_rows))
                continue
            try:
                job = _Job(row, stream, self._root_of(row.request), self._number_of(row.request))
            except Exception as error:  # the request's own mask
                stream.fail(_failure(error))
                continue
            self._jobs[job.state] = job
            self._scheduler.add(job.state)

    def _root_of(self, request: Request) -> int | None:
        """Choose with whom a row shares its prompt's pages: everybody, the samples of its own call, or nobody."""
        if request.shares_prefix:
            # Keys and values of one adapter are none of another's: their chains have nothing in common.
            adapter = self._number_of(request)
            if adapter not in self._shared_roots:
                self._shared_roots[adapter] = self._pages.new_root()
            return self._shared_roots[adapter]
        if request.options.n == 1:
            return None
        if request.sample_index == 0:  # its siblings come right behind it
            self._group_root = self._pages.new_root()
        return self._group_root

    def _number_of(self, request: Request) -> int:
        return NO_ADAPTER if self._stack is None else self._stack.number_of(request.options.adapter)

    def _launch(self, plan: Prefill | Decode) -> list[_Step]:
        if isinstance(plan, Decode):
            jobs = [self._jobs[row] for row in plan.rows]
            chances = [job.next_chance() for job in jobs]
            return [_Step(jobs, chances, self._runner.decode(plan.rows, plan.positions, chances))]
        for piece in plan.pieces:
            self._jobs[piece.row].begin()
        return self._prefill(plan.pieces, {p.row: self._jobs[p.row].next_chance() for p in plan.pieces if p.is_last})

    def _prefill(self, pieces: Sequence[Piece], chances: dict[RowState, Chance]) -> list[_Step]:
        """Run pieces of prompts; in smaller steps where the device has no room for the whole."""
        drawing = [piece.row for piece in pieces if piece.is_last]
        tokens = sum(piece.count for piece in pieces)
        try:
            launched = self._runner.prefill(pieces, [chances[row] for row in drawing])
        except torch.OutOfMemoryError:
            if tokens <= _LEAST_PREFILL:
                raise
        else:
            return [_Step([self._jobs[row] for row in drawing], [chances[row] for row in drawing], launched)]
        # Outside of the handler, whose error holds on to the tensors of the failed step.
        torch.cuda.empty_cache()
        half = max(_LEAST_PREFILL, tokens // 2)
        _log.warning("no memory for a prefill of %d tokens at once; going on with %d", tokens, half)
        self._prefill_tokens = (min(half, self._prefill_tokens[0]), min(half, self._prefill_tokens[1]))
        self._scheduler.prefill_tokens, self._scheduler.prefill_tokens_beside = self._prefill_tokens
        first, second = _halves(pieces, half)
        return [*self._prefill(first, chances), *self._prefill(second, chances)]

    def _draw(self, steps: Sequence[_Step]) -> list[tuple[list[_Job], Drawn]]:
        return [(step.jobs, self._draw_step(step)) for step in steps if step.jobs]

    def _draw_step(self, step: _Step) -> Drawn:
        jobs = step.jobs
        need = BLOCKS * any(not chance.may_end for chance in step.chances)
        for job in jobs:
            need |= job.need
        if step.launched.is_prefill:  # these rows draw their first token since they got their slots
            here = [job for job in jobs if job.state.slot >= 0]
            states = [job.state for job in here]
            if here:
                self._runner.sampler.set(
                    [s.slot for s in states], [job.request for job in here], [s.ids for s in states]
                )
        mask = self._fill_masks(jobs) if need & MASKS else None
        wanted = [job.request.options.logprobs for job in jobs if job.request.options.logprobs is not None]
        return self._runner.draw(step.launched, need, mask=mask, alternatives=max(wanted, default=None))

    def _fill_masks(self, jobs: Sequence[_Job]) -> torch.Tensor:
        bits = self._runner.blank_masks(len(jobs))
        for i, job in enumerate(jobs):
            if job.mask is None or job.is_gone:
                continue
            try:
                if not job.mask.fill(bits[i : i + 1]):
                    bits[i] = -1
                if job.mask.ended:
                    job.stream.put(job.row.finish("stop"))
                    self._drop(job)
            except Exception as error:
                bits[i] = -1
                self._fail_job(job, error)
        return bits

    def _deliver(self, on_way: Sequence[tuple[list[_Job], Drawn]]) -> None:
        """Wait for the tokens of a step and hand them to their rows."""
        for jobs, drawn in on_way:
            ids, logprobs = drawn.wait()
            for i, job in enumerate(jobs):
                if not job.is_gone:
                    self._push(job, ids[i], None if logprobs is None else logprobs[i])

    def _push(self, job: _Job, token_id: int, logprob: tuple[float, list[int], list[float]] | None) -> None:
        if token_id == NOTHING_ALLOWED:
            self._fail_job(job, GenerationError("the request's mask allows no token."))
            return
        if token_id < 0:
            pages = list(job.state.pages)
            self._fail_job(job, GenerationError(NO_NUMBERS))
            # What is no number must not lie about: a masked place is multiplied by 0, and must be a number for that.
            self._runner.wipe(self._pages.discard(pages))
            return
        self._scheduler.push(job.state, token_id)
        try:
            if job.mask is not None:
                job.mask.accept(token_id)
            chunk = job.row.push(token_id, _token_logprob(job.request, token_id, logprob))
        except Exception as error:  # the request's own: its mask, or what its tokenizer makes of the ids
            self._fail_job(job, error)
            return
        if chunk is not None:
            job.stream.put(chunk)
        if job.row.finish_reason is not None:
            self._drop(job)

    def _drop(self, job: _Job) -> None:
        job.is_gone = True
        del self._jobs[job.state]
        self._scheduler.remove(job.state)

    def _fail_job(self, job: _Job, error: Exception) -> None:
        job.stream.fail(_failure(error))
        self._drop(job)

    # Failures and changes.

    def _fail(self, error: Exception) -> None:
        """Fail all that runs, with the cause, and begin anew for those who come next."""
        report: Exception = GenerationError(f"the model failed while generating: {error!r}")
        if isinstance(error, torch.OutOfMemoryError):
            report = NotEnoughMemoryError(
                f"the device ran out of memory with {len(self._jobs)} rows; lower batch_size or kv_cache_memory, or "
                "load the model in fewer bits."
            )
        streams = {id(job.stream): job.stream for job in self._jobs.values()}
        self._jobs.clear()
        for stream in streams.values():
            failure = type(report)(*report.args)  # one of its own for each reader's traceback
            failure.__cause__ = error
            stream.fail(failure)
        self._begin_anew()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _begin_anew(self) -> None:
        self._forget_pages()
        self._runner.refresh()

    def _forget_pages(self) -> None:
        alone, beside = self._prefill_tokens
        self._put_back_before = self.put_back
        self._pages = BlockManager((self._limits.cache_tokens or 0) // BLOCK_TOKENS + 1)
        self._shared_roots: dict[int, int] = {}
        self._scheduler = Scheduler(self._pages, slots=self._slots, prefill_tokens=alone, prefill_tokens_beside=beside)

    def _notice_changes(self) -> None:
        """Let nobody use keys, values and graphs of a model whose modules or weights have changed, by an adapter say.

        Rows that run go on, on their pages and with the weights as they are.
        """
        if fingerprint(self._model, names_adapters=self._stack is not None) == self._fingerprint:
            return
        self._shared_roots = {}
        for job in self._jobs.values():
            job.state.keep_to_itself()
        self._fuse_anew()
        self._runner.take_changes(no_graph_reason(self._model, self._whole) if self._runner.can_capture else None)
        self._restack()
        # At last, for it all to be done again if something fails; fused steps may have moved weights, too.
        self._fingerprint = fingerprint(self._model, names_adapters=self._stack is not None)

    def _fuse_anew(self) -> None:
        """Find the fused steps of the model as it is now; none, where that fails."""
        if self._fusion is None:
            return
        try:
            self._fusion.build()
            release_heap()
        except Exception as error:  # memory, say
            _log.warning("fused steps could not be found anew: %r", error)

    def _restack(self) -> None:
        """Take the adapters as they are now; where they cannot be, no row runs until they can."""
        if self._stack is None:
            return
        self._why_no_rows = changed_by_hand("they could not be taken anew")  # should memory run out here, say
        try:
            self._stack.build()
            self._why_no_rows = None
        except UnsupportedError as error:
            self._why_no_rows = changed_by_hand(str(error))
            for job in list(self._jobs.values()):
                self._fail_job(job, GenerationError(self._why_no_rows))


@dataclass
class _Step:
    """A forward on its way, with the rows that draw a token from it."""

    jobs: list[_Job]
    chances: list[Chance]
    launched: Launched


def _halves(pieces: Sequence[Piece], first_tokens: int) -> tuple[list[Piece], list[Piece]]:
    """Divide pieces into those of the first tokens, and the rest."""
    first: list[Piece] = []
    rest = list(pieces)
    while rest and rest[0].count <= first_tokens:
        first_tokens -= rest[0].count
        first.append(rest.pop(0))
    if rest and first_tokens:
        piece = rest[0]
        first.append(replace(piece, count=first_tokens, is_last=False))
        rest[0] = replace(piece, start=piece.start + first_tokens, count=piece.count - first_tokens)
    return first, rest


def _failure(error: Exception) -> Exception:
    """Make of an error what a caller may get: one of this package's, with the error as its cause."""
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
