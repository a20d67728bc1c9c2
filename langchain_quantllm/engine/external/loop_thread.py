"""A thread with an event loop of its own, for libraries that are bound to one loop. Knows no engine."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from langchain_quantllm.engine.clean_thread import start_thread

_Result = TypeVar("_Result")
_WAIT_S = 0.5
"""Longest wait at a time, so that Ctrl-C gets through on every platform."""


class LoopThread:
    """A daemon thread that runs an event loop until it is stopped."""

    def __init__(self, name: str) -> None:
        """Start the thread.

        Args:
            name: The thread's name.

        Raises:
            UnsupportedError: If the system starts no more threads.
        """
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        start_thread(self._thread, "an engine")

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            with contextlib.suppress(Exception):
                self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()

    def is_running(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def post(self, call: Callable[..., object], *arguments: Any) -> None:
        """Call a function in the loop, some time; never waits.

        Raises:
            RuntimeError: If the loop was closed.
        """
        self.loop.call_soon_threadsafe(call, *arguments)

    def tell(self, call: Callable[..., object], *arguments: Any) -> None:
        """Call a function in the loop, some time; a loop that is closed has nothing left to be told."""
        with contextlib.suppress(RuntimeError):
            self.post(call, *arguments)

    def wait_for(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        """Run a coroutine in the loop, from another thread, and return its result or raise its exception.

        Ctrl-C cancels the coroutine.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            while True:
                with contextlib.suppress(concurrent.futures.TimeoutError):
                    return future.result(_WAIT_S)
                if future.done():  # it raised a timeout of its own
                    return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop_after(self, last: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run a last coroutine in the loop, and stop the loop when it has ended; never waits."""

        def begin() -> None:
            self.loop.create_task(last()).add_done_callback(lambda _: self.loop.stop())

        self.tell(begin)

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended; the thread itself does not wait."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
