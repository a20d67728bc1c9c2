"""The thread that runs an engine, and the queue before it.

Owns the queue of waiting requests and the thread's life: started by the first request, ended with the engine or the
interpreter. The thread stays while the engine lives, asleep without work, since a new thread's first tokens on a GPU
take twice as long. It holds the engine weakly, so that dropping the last reference to a model frees it. Knows no model.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from langchain_quantllm.engine.detokenizer import Completion
from langchain_quantllm.engine.stream import ChunkStream, fail_streams
from langchain_quantllm.errors import GenerationError, UnsupportedError

UNLOADED = "the model was unloaded while this call was on its way; call again."

_QUIET_S, _GATHER_S = 0.004, 0.05
# The requests of one LangChain batch come from several threads, a little apart. Work begins when no more has come for
# the first of these times, and at the latest after the second.

_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


class Worker:
    """A queue of requests, as completions to be filled, and one thread that passes the queue to `run`."""

    def __init__(self, run: Callable[[deque[Completion]], None], *, gathers: bool = True) -> None:
        """Serve a bound method of an engine.

        Args:
            run: Takes completions off the queue, and returns when they have ended.
            gathers: Wait a moment for more requests before `run` is called; for engines that take none while they run.
        """
        self._gathers = gathers
        self._run = weakref.WeakMethod(run)
        self._waiting: deque[Completion] = deque()
        self._streams: weakref.WeakSet[ChunkStream] = weakref.WeakSet()
        self._changed = threading.Condition()
        self._was_woken = False
        self._thread: threading.Thread | None = None
        self._closed = False
        self._process_id = os.getpid()
        _workers.add(self)
        weakref.finalize(run.__self__, self.close, "the model was dropped.").atexit = False  # type: ignore[attr-defined]

    def submit(self, completions: Sequence[Completion]) -> None:
        """Queue the requests of one submission, together.

        Raises:
            UnsupportedError: If this process was forked off the one that loaded the model.
            GenerationError: If the engine was closed.
        """
        if os.getpid() != self._process_id:
            msg = (
                "this model was loaded before the process was forked, and its threads and device did not come along; "
                "fork before the first model is loaded, or start children with multiprocessing's 'spawn'."
            )
            raise UnsupportedError(msg)
        with self._changed:
            if self._closed:
                raise GenerationError(UNLOADED)
            self._streams.update(completion.stream for completion in completions)
            self._waiting.extend(completions)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="quantllm-engine", daemon=True)
                self._thread.start()

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
        """Fail all requests, and wait until the thread has ended."""
        with self._changed:
            self._closed = True
            self._fail_all(reason)
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=30)

    def _fail_all(self, reason: str, cause: Exception | None = None) -> None:
        self._waiting.clear()
        fail_streams([stream for stream in self._streams if not stream.cancelled], GenerationError(reason), cause)

    def _serve(self) -> None:
        while self._gather():
            run = self._run()
            try:
                if run is None:
                    self._fail_all("the model was dropped while requests waited for it.")
                else:
                    run(self._waiting)
            except Exception as error:
                self._fail_all(f"the engine failed: {error!r}", error)
            del run  # an idle thread must keep no model alive

    def _gather(self) -> bool:
        """Wait for work, then until no more of it comes; False after closing."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            seen = 0
            until = time.monotonic() + (_GATHER_S if self._gathers else 0)
            while not self._closed and seen < len(self._waiting) and time.monotonic() < until:
                seen = len(self._waiting)
                self._changed.wait(_QUIET_S)
            return bool(self._waiting) and not self._closed


def _close_all(*_: Any) -> None:
    for worker in list(_workers):
        worker.close("the program is ending.")


atexit.register(_close_all)
