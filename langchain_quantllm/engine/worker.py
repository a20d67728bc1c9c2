"""The thread that runs an engine, and the queue before it.

Owns the queue of waiting requests, the thread's life, and its way out of failures. The thread is started by the first
request, and again should it have ended; it ends with the engine or the interpreter. It stays while the engine lives,
asleep without work, since a new thread's first tokens on a GPU take twice as long. It holds the engine weakly, so that
dropping the last reference to a model frees it. Knows no model.

Whatever is raised in the thread has one way out, `Worker._give_up`: the requests that the engine held end with the
cause, the engine recovers, and the next request runs. Requests still in the queue wait for the next run; if a run has
not even taken the first of them, they end as well, so the thread never turns without work done.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from langchain_quantllm.engine.clean_thread import start_thread
from langchain_quantllm.engine.detokenizer import Completion
from langchain_quantllm.engine.process import check_process, is_forked, note_loading
from langchain_quantllm.engine.stream import THREAD_ENDED, fail_streams
from langchain_quantllm.errors import GenerationError

UNLOADED = "the model was unloaded while this call was on its way; call again."

_QUIET_S, _GATHER_S = 0.004, 0.05
# The requests of one LangChain batch come from several threads, a little apart. Work begins when no more has come for
# the first of these times, and at the latest after the second.

_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


class Worker:
    """A queue of requests, as completions to be filled, and one thread that passes the queue to `run`."""

    def __init__(
        self,
        run: Callable[[deque[Completion]], None],
        recover: Callable[[BaseException], Exception],
        *,
        gathers: bool = True,
    ) -> None:
        """Serve two bound methods of an engine, which the thread calls.

        Args:
            run: Takes completions off the queue, and returns when they have ended. It may raise anything.
            recover: Takes what was raised, drops all requests that `run` took, makes the engine ready for others, and
                returns the error for those requests. If it raises itself, it is called again before the next run.
            gathers: Wait a moment for more requests before `run` is called; for engines that take none while they run.
        """
        note_loading()
        self._gathers = gathers
        self._run = weakref.WeakMethod(run)
        self._recover = weakref.WeakMethod(recover)
        self._waiting: deque[Completion] = deque()
        self._completions: weakref.WeakSet[Completion] = weakref.WeakSet()
        """Those that the queue or the engine holds; a stream alone holds none."""
        self._changed = threading.Condition()
        self._was_woken = False
        self._thread: _EngineThread | None = None
        self._is_recovered = True
        self._closed = False
        _workers.add(self)
        weakref.finalize(run.__self__, self.close, "the model was dropped.").atexit = False  # type: ignore[attr-defined]

    def submit(self, completions: Sequence[Completion]) -> None:
        """Queue the requests of one submission, together.

        Raises:
            UnsupportedError: If this process was forked off the one that loaded the model, or starts no more threads.
            GenerationError: If the engine was closed.
        """
        check_process()
        with self._changed:
            if self._closed:
                raise GenerationError(UNLOADED)
            if self._thread is None or self._thread.has_ended:
                thread = _EngineThread(self._serve)
                start_thread(thread, "an engine")
                self._thread = thread
            for completion in completions:
                completion.stream.is_served = self._thread.is_serving
            self._completions.update(completions)
            self._waiting.extend(completions)
            self._changed.notify_all()

    @property
    def queued(self) -> int:
        """Requests that `run` has not taken yet."""
        return len(self._waiting)

    def wake(self) -> None:
        """End `wait_for_change`, or the next call of it."""
        with self._changed:
            self._was_woken = True
            self._changed.notify_all()

    def wait_for_change(self) -> None:
        """Wait, in `run`, until a request comes, `wake` is called or the engine is closed; a second at most."""
        with self._changed:
            if not (self._waiting or self._was_woken or self._closed):
                self._changed.wait(1.0)
            self._was_woken = False

    def close(self, reason: str) -> None:
        """Fail all requests, and wait until the thread has ended. In a forked process nothing is left to do."""
        if is_forked():
            return
        with self._changed:
            self._closed = True
            self._fail_all(reason)
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=30)

    def _fail_all(self, reason: str) -> None:
        streams = {completion.stream for completion in self._completions}
        self._waiting.clear()
        fail_streams(streams, GenerationError(reason), None)

    # The thread.

    def _serve(self) -> None:
        with self._changed:
            if self._thread is not threading.current_thread():
                return  # Ctrl-C came while it started
        first: Completion | None = None
        try:
            while True:
                try:
                    if (first := self._gather()) is None:
                        return
                    self._run_engine()
                except BaseException as error:
                    self._give_up(error, first)
                first = None  # while the thread waits, it holds no request's images
        finally:
            self._leave()

    def _gather(self) -> Completion | None:
        """Wait for work, then until no more of it comes; returns the first request, None after closing."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            seen = 0
            until = time.monotonic() + (_GATHER_S if self._gathers else 0)
            while not self._closed and seen < len(self._waiting) and time.monotonic() < until:
                seen = len(self._waiting)
                self._changed.wait(_QUIET_S)
            return self._waiting[0] if self._waiting and not self._closed else None

    def _run_engine(self) -> None:
        run = self._run()  # in this frame only: an idle thread must keep no model alive
        if run is None:
            with self._changed:
                self._fail_all("the model was dropped while requests waited for it.")
            return
        if not self._is_recovered:
            self._recover_from(RuntimeError("the engine did not recover from its last failure"))
        run(self._waiting)

    def _give_up(self, error: BaseException, first: Completion | None) -> None:
        """End the requests of a run that raised, with the cause, and make the engine ready for others.

        Args:
            error: What was raised.
            first: The first request in the queue when the run began.
        """
        with self._changed:
            waiting = set(self._waiting)
            if first in waiting:  # the run has taken none, and the next one would not either
                waiting = set()
            streams = {completion.stream for completion in self._completions if completion not in waiting}
            if not waiting:
                self._waiting.clear()
        try:
            report = self._recover_from(error)
        except BaseException as another:
            report = GenerationError(f"the engine failed: {error!r}; and could not begin anew: {another!r}")
        fail_streams(streams, report, error.__cause__ if report is error else error)

    def _recover_from(self, error: BaseException) -> Exception:
        self._is_recovered = False
        recover = self._recover()
        report = GenerationError(f"the engine failed: {error!r}") if recover is None else recover(error)
        self._is_recovered = True
        return report

    def _leave(self) -> None:
        """Let no request wait for the thread that ends; after a failure in the way out itself, there may be some."""
        with self._changed:
            if self._thread is not None:
                self._thread.has_ended = True  # under the lock: the next request starts another thread
            if not self._closed:
                self._is_recovered = False
                self._fail_all(THREAD_ENDED)


class _EngineThread(threading.Thread):
    """A thread that says reliably whether it has ended: `is_alive` errs after a Ctrl-C that interrupted it."""

    def __init__(self, serve: Callable[[], None]) -> None:
        super().__init__(target=serve, name="quantllm-engine", daemon=True)
        self.has_ended = False

    def run(self) -> None:
        try:
            super().run()
        finally:
            self.has_ended = True

    def is_serving(self) -> bool:
        return not self.has_ended


def _close_all(*_: Any) -> None:
    for worker in list(_workers):
        worker.close("the program is ending.")


atexit.register(_close_all)
