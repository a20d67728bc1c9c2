"""The stream of text chunks between an engine's thread and the caller's thread or event loop.

Owns the queue, the timeout and cancellation. Knows no model, no tensor and no tokenizer.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass

from typing_extensions import Self

from langchain_quantllm.errors import GenerationError, GenerationTimeoutError

MOST_UNREAD = 512
"""Chunks of a request, one for each token at most, that are computed ahead of the reader."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """The log probability of one token, before temperature and the other sampling options.

    `top` lists the likeliest tokens, best first, as `(token id, logprob)`.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts and times of one finished request; times in seconds."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queued_s: float
    first_token_s: float
    total_s: float


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some text of one request. The last chunk has a finish reason and the usage.

    `row` is the request's index in its submission. `finish_reason` is `"stop"` or `"length"`.
    """

    row: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None


class ChunkStream:
    """The chunks of one submission: an engine's thread puts them in, any other thread reads them.

    Iterate over it with `for` or `async for`; it ends after the last chunk of the last request. An error of any
    request is raised at once. Closing the stream, or leaving its `with` block, cancels the requests: the engine stops
    them at their next token. While `MOST_UNREAD` chunks for each request are unread, the stream is full, and engines
    that can let its requests rest.
    """

    def __init__(self, rows: int, timeout_s: float | None = None) -> None:
        """Open a stream for a number of requests, which must end within `timeout_s` seconds."""
        self._open_rows = rows
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._items: deque[Chunk | BaseException] = deque()
        self._changed = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self._most_unread = MOST_UNREAD * rows
        self.cancelled = False
        """Whether the stream is closed. Engines read it before each token."""
        self.is_full = False
        """Whether no more is to be computed before the reader has read half of what there is."""
        self.wake: Callable[[], None] | None = None
        """Wakes an engine that may rest: called when a full stream is read again, or closed."""

    # The engine's side.

    def put(self, item: Chunk | BaseException) -> None:
        """Append a chunk, or an error that the reader is to raise."""
        with self._changed:
            self._items.append(item)
            self.is_full = len(self._items) >= self._most_unread
            waiter, self._waiter = self._waiter, None
            self._changed.notify_all()
        self._wake(waiter)

    def fail(self, error: BaseException) -> None:
        """End the stream with an error, which its reader raises, and cancel all its requests."""
        self.put(error)  # before it is closed: a reader of a closed stream without items raises a cancellation
        self.close()

    def _wake(self, waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None) -> None:
        if waiter is None:
            return
        loop, future = waiter
        try:
            loop.call_soon_threadsafe(_set_done, future)
        except RuntimeError:  # the reader's event loop was closed
            self.cancelled = True

    # The reader's side.

    def __iter__(self) -> Iterator[Chunk]:
        """Iterate over the chunks, blocking until the next one is there."""
        while self._open_rows:
            with self._changed:
                while not self._items:
                    self._check_open()
                    # A bounded wait, so that Ctrl-C gets through on every platform.
                    self._changed.wait(min(self._remaining_s(), 1.0))
                item = self._take()
            yield self._deliver(item)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Iterate over the chunks without blocking the event loop."""
        while self._open_rows:
            loop = asyncio.get_running_loop()
            with self._changed:
                item = self._take() if self._items else None
                if item is None:
                    self._check_open()
                    future: asyncio.Future[None] = loop.create_future()
                    self._waiter = (loop, future)
            if item is None:
                await asyncio.wait([future], timeout=None if self._deadline is None else self._remaining_s())
                if not future.done():
                    self._remaining_s()
                continue
            yield self._deliver(item)

    def _take(self) -> Chunk | BaseException:
        item = self._items.popleft()
        if self.is_full and len(self._items) <= self._most_unread // 2:
            self.is_full = False
            if self.wake is not None:
                self.wake()
        return item

    def _remaining_s(self) -> float:
        if self._deadline is None:
            return float("inf")
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            self.close()
            msg = (
                f"the model did not finish within timeout={self._timeout_s:g} seconds; raise it or ask for fewer "
                "tokens."
            )
            raise GenerationTimeoutError(msg)
        return remaining

    def _deliver(self, item: Chunk | BaseException) -> Chunk:
        if isinstance(item, BaseException):
            self._open_rows = 0
            self.close()
            raise item
        if item.finish_reason is not None:
            self._open_rows -= 1
        elif self._deadline is not None:
            self._remaining_s()
        return item

    def _check_open(self) -> None:
        if self.cancelled:
            msg = "the request was cancelled."
            raise GenerationError(msg)

    def close(self) -> None:
        """Cancel the requests; a reader in another thread gets an error."""
        with self._changed:
            self.cancelled = True
            waiter, self._waiter = self._waiter, None
            self._changed.notify_all()
            if self.is_full and self.wake is not None:
                self.wake()
        self._wake(waiter)

    def __enter__(self) -> Self:
        """Use the stream as a `with` block that closes it."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the stream."""
        self.close()


def _set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def fail_streams(streams: Iterable[ChunkStream], error: Exception, cause: BaseException | None) -> None:
    """End streams with an error and its cause: a copy for each, as each reader adds its own traceback."""
    for stream in set(streams):
        failure = type(error)(*error.args)
        failure.__cause__ = cause
        stream.fail(failure)
