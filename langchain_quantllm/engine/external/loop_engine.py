"""The base of engines of others: the life of a request, as a task on one thread with an event loop of its own.

Each request of a submission is one task. It waits for a place, is answered by the subclass, and leaves its place,
however it ends. A closed or expired stream cancels its requests at once; one that is not read lets them rest.

Knows no server and no vLLM.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

from langchain_quantllm.engine.detokenizer import Completion, begin_completions
from langchain_quantllm.engine.external.loop_thread import LoopThread
from langchain_quantllm.engine.external.places import Places
from langchain_quantllm.engine.failures import request_failure
from langchain_quantllm.engine.process import check_process, is_forked, note_loading
from langchain_quantllm.engine.request import EngineLoad, Request
from langchain_quantllm.engine.request_checks import check_queue
from langchain_quantllm.engine.stream import ChunkStream, fail_streams
from langchain_quantllm.engine.worker import UNLOADED
from langchain_quantllm.errors import GenerationError, QuantLLMError

_log = logging.getLogger(__name__)

_CANCEL_S, _CLOSE_S = 10.0, 60.0
"""Longest waits, at the end, for requests to leave, and for the thread."""


class StreamTasks:
    """The tasks of one stream's requests, their timer, and whether more may be written to the stream."""

    def __init__(self, stream: ChunkStream) -> None:
        """Begin with none."""
        self.tasks: set[asyncio.Task[None]] = set()
        self.timer: asyncio.TimerHandle | None = None
        self.may_write = asyncio.Event()
        self._stream = stream
        self._is_cancelled = False

    def cancel(self) -> None:
        """Cancel the tasks, once: a second time would interrupt them while they end their requests."""
        if not self._is_cancelled:
            self._is_cancelled = True
            for task in self.tasks:
                task.cancel()

    async def wait_for_reader(self) -> None:
        """Wait while the reader of the stream has enough."""
        while self._stream.is_full:
            self.may_write.clear()
            if self._stream.is_full:  # else it has been read meanwhile, and nothing would set the event
                await self.may_write.wait()


class LoopEngine:
    """Runs requests as tasks of one event loop. Subclasses implement `_check` and `_answer`."""

    peak_cache_tokens = 0
    """0: engines of others keep no such count."""

    def __init__(self, name: str, tokenizer: Any, *, places: int, rows: int) -> None:
        """Start the thread.

        Args:
            name: The thread's name.
            tokenizer: Turns tokens into text.
            places: Most requests that are answered at once; others wait here.
            rows: Most of them that the engine of others runs at once; the others wait there.
        """
        note_loading()
        self._tokenizer = tokenizer
        self._rows = rows
        self._places = Places(places)
        self._lock = threading.Lock()
        self._unended: Counter[tuple[int | None, int | None]] = Counter()
        """Requests that have not ended, by their owner and its `max_rows`; under the lock."""
        self._closed = False
        self._streams: dict[ChunkStream, StreamTasks] = {}  # on the loop's thread only
        self._thread = LoopThread(name)

    # For subclasses.

    def _check(self, requests: Sequence[Request]) -> None:
        """Check requests before they are queued; in the caller's thread."""
        raise NotImplementedError

    async def _answer(self, completion: Completion, tasks: StreamTasks) -> None:
        """Run a request until its completion has ended, and its last chunk is put; in the loop."""
        raise NotImplementedError

    def _failure(self, error: BaseException) -> BaseException:
        """Return the error that a request ends with, for what `_answer` raised; in the loop."""
        if isinstance(error, QuantLLMError):
            return error
        _log.debug("a request failed", exc_info=error)
        return request_failure(error)

    async def _release(self) -> None:
        """End the connection to the engine of others, or that engine; in the loop, after the last request."""

    # The protocol.

    @property
    def load(self) -> EngineLoad:
        """Its requests at this moment. Any thread may ask."""
        with self._lock:
            waiting = self._waiting
            return EngineLoad(running=sum(self._unended.values()) - waiting, waiting=waiting)

    def submit(
        self,
        requests: Sequence[Request],
        timeout_s: float | None = None,
        *,
        in_pieces: bool = True,
        max_waiting: int | None = None,
    ) -> ChunkStream:
        """Queue requests and return the stream of their chunks; see `Engine.submit`."""
        check_process()
        self._check(requests)
        stream, completions = begin_completions(requests, self._tokenizer, timeout_s, in_pieces=in_pieces)
        stream.wakes_on_close = True
        stream.is_served = self._thread.is_running
        stream.wake = lambda: self._thread.tell(self._look_at, stream)
        with self._lock:
            if self._closed:
                raise GenerationError(UNLOADED)
            check_queue(self._waiting, max_waiting)
            self._unended.update((request.owner, request.max_rows) for request in requests)
            self._thread.post(self._begin, stream, completions, timeout_s)
        return stream

    @property
    def _waiting(self) -> int:
        """Requests that wait, here or there: more than run at once, in all or for one owner. Under the lock."""
        counts = self._unended.items()
        beyond = sum(max(0, count - most) for (_, most), count in counts if most is not None)
        return max(beyond, sum(count for _, count in counts) - self._rows, 0)

    def close(self) -> None:
        """Cancel all requests, and release the engine of others. In a forked process nothing is left to do."""
        if is_forked():
            return
        with self._lock:
            was_closed, self._closed = self._closed, True
        if not was_closed:
            self._thread.stop_after(self._end)
        self._thread.join(_CLOSE_S)

    # In the loop.

    def _begin(self, stream: ChunkStream, completions: Sequence[Completion], timeout_s: float | None) -> None:
        if not completions:  # nothing would end them
            return
        tasks = self._streams[stream] = StreamTasks(stream)
        for completion in completions:
            task = asyncio.get_running_loop().create_task(self._run(completion, tasks))
            tasks.tasks.add(task)
            task.add_done_callback(functools.partial(self._ended, stream, completion.request))
        if timeout_s is not None:
            tasks.timer = asyncio.get_running_loop().call_later(timeout_s, self._look_at, stream)
        self._look_at(stream)

    def _look_at(self, stream: ChunkStream) -> None:
        """Cancel the requests of a stream that is closed or expired; let those of one that was read go on."""
        tasks = self._streams.get(stream)
        if tasks is None:
            return
        if stream.should_stop():
            tasks.cancel()
        elif not stream.is_full:
            tasks.may_write.set()

    def _ended(self, stream: ChunkStream, request: Request, task: asyncio.Task[None]) -> None:
        """Count a request off; a task that is cancelled before its first step has run nothing of `_run`."""
        with self._lock:
            self._unended.subtract([(request.owner, request.max_rows)])
            self._unended += Counter()  # drops those that are none
        tasks = self._streams[stream]
        tasks.tasks.discard(task)
        if not tasks.tasks:
            del self._streams[stream]
            if tasks.timer is not None:
                tasks.timer.cancel()

    async def _run(self, completion: Completion, tasks: StreamTasks) -> None:
        try:
            async with self._places.hold(completion.request):
                completion.start()
                await self._answer(completion, tasks)
        except BaseException as error:
            if not (isinstance(error, asyncio.CancelledError) and completion.stream.cancelled):
                completion.stream.fail(self._failure(error))

    def _fail_all(self, error: Exception, cause: BaseException | None = None) -> None:
        """End all streams with an error, which cancels their requests."""
        fail_streams(self._streams, error, cause)

    async def _end(self) -> None:
        """Fail what runs, and wait until it has left."""
        self._fail_all(GenerationError("the model was unloaded while it was generating."))
        running = [task for tasks in self._streams.values() for task in tasks.tasks]
        for tasks in self._streams.values():
            tasks.cancel()
        if running:
            await asyncio.wait(running, timeout=_CANCEL_S)
        await self._release()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others, timeout=_CANCEL_S)
