"""The stream of text chunks between an engine's thread and the caller's thread or event loop.

Owns the queue, the timeout and cancellation. Knows no model, no tensor and no tokenizer.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from typing_extensions import Self

from langchain_quantllm.engine.process import check_process, is_forked
from langchain_quantllm.errors import GenerationError, GenerationTimeoutError

_log = logging.getLogger(__name__)

MOST_UNREAD = 512
"""Chunks of a request, one for each token at most, that are computed ahead of the reader."""

THREAD_ENDED = "the engine's thread has ended without an answer; call again."

_WAIT_S = 1.0
"""Longest wait at a time: Ctrl-C gets through on every platform, and the end of the engine's thread is noticed."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """The log probability of one token, before temperature and the other sampling options.

    `top` lists the likeliest tokens, best first, as `(token id, logprob)`; or the request's `reported_ids`, in order.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprob(
    token_id: int,
    found: tuple[float, list[int], list[float]] | None,
    wanted: int | None,
    reported_ids: Sequence[int] = (),
) -> TokenLogprob | None:
    """Make the report of a token.

    Args:
        token_id: The token.
        found: Its log probability; ids and log probabilities of the likeliest tokens, then of reported ones.
        wanted: How many of the likeliest to report; None for no report.
        reported_ids: Tokens to report in place of the likeliest.
    """
    if wanted is None or found is None:
        return None
    chosen, ids, logprobs = found
    top = tuple(zip(ids, logprobs, strict=True))
    if reported_ids:
        by_id = dict(top)
        top = tuple((i, by_id[i]) for i in reported_ids)
    return TokenLogprob(token_id=token_id, logprob=chosen, top=top if reported_ids else top[:wanted])


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Token counts and times of one finished request; times in seconds."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queued_s: float
    first_token_s: float
    total_s: float
    proposed_tokens: int = 0
    """Tokens that were proposed and verified, several a step."""
    accepted_tokens: int = 0
    """Those of them that the completion has."""


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
        self._resumes = False
        self.wake: Callable[[], None] | None = None
        """Wakes an engine that may rest: called when a full stream is read again, or closed."""
        self.wakes_on_close = False
        """Whether `wake` is called whenever the stream is closed: for engines that wait for others' answers."""
        self.is_served: Callable[[], bool] = lambda: True
        """Whether the thread that puts the chunks in is there; set by the engine when the requests are queued."""

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

    @property
    def expired(self) -> bool:
        """Whether its timeout has passed."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def should_stop(self) -> bool:
        """Whether the engine must stop the requests before their next token: closed, or expired, which ends it."""
        if self.expired and not self.cancelled:
            self.fail(self._timeout_error())
        return self.cancelled

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
            check_process()
            with self._changed:
                while not self._items:
                    self._check_open()
                    self._changed.wait(min(self._remaining_s(), _WAIT_S))
                item = self._take()
            yield self._deliver(item)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Iterate over the chunks without blocking the event loop."""
        while self._open_rows:
            check_process()
            loop = asyncio.get_running_loop()
            with self._changed:
                item = self._take() if self._items else None
                if item is None:
                    self._check_open()
                    future: asyncio.Future[None] = loop.create_future()
                    self._waiter = (loop, future)
            if item is None:
                await asyncio.wait([future], timeout=min(self._remaining_s(), _WAIT_S))
                if not future.done():
                    self._remaining_s()
                continue
            yield self._deliver(item)

    def _take(self) -> Chunk | BaseException:
        item = self._items.popleft()
        if self.is_full and len(self._items) <= self._most_unread // 2:
            self.is_full = False
            self._resumes = True
        return item

    def _remaining_s(self) -> float:
        if self._deadline is None:
            return float("inf")
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            self.close()
            raise self._timeout_error()
        return remaining

    def _timeout_error(self) -> GenerationTimeoutError:
        return GenerationTimeoutError(
            f"the model did not finish within timeout={self._timeout_s:g} seconds; raise it or ask for fewer tokens."
        )

    def _deliver(self, item: Chunk | BaseException) -> Chunk:
        if self._resumes:
            self._resumes = False
            self._wake_engine()
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
        if not self.is_served():
            self.close()
            raise GenerationError(THREAD_ENDED)

    def close(self) -> None:
        """Cancel the requests; a reader in another thread gets an error."""
        if is_forked():  # another thread of the parent may have held the lock, for ever
            self.cancelled = True
            return
        with self._changed:
            self.cancelled = True
            waiter, self._waiter = self._waiter, None
            self._changed.notify_all()
        self._wake(waiter)
        if self.is_full or self.wakes_on_close:
            self._wake_engine()

    def _wake_engine(self) -> None:
        """Wake the engine; outside of the stream's lock, which the engine takes under its own."""
        if self.wake is not None:
            self.wake()

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
    """End streams that are open with an error and its cause: a copy for each, as each reader adds its own traceback."""
    for stream in set(streams):
        if stream.cancelled:
            continue
        failure = type(error)(*error.args)
        failure.__cause__ = cause
        try:
            stream.fail(failure)
        except Exception:  # of its reader's event loop; the other readers must get their errors
            _log.exception("a reader could not be told that its request failed")
