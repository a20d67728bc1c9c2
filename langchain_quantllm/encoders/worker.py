"""The threads of a loaded encoder, where concurrent calls meet in batches.

The thread measures the items' lengths, packs those of all calls with
the same operation into batches, and gives each call its results in order. Short calls pass long ones at every second
batch. A call whose items make a batch fail, fails alone. With several devices there is a thread for each.

The threads hold the encoder weakly: they end with it. Knows no kind of model and no text.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from langchain_quantllm.encoders.batches import BatchSize, run_halving
from langchain_quantllm.encoders.work import UNLOADED, Operation, Work
from langchain_quantllm.engine.clean_thread import start_thread
from langchain_quantllm.engine.process import check_process, is_forked, note_loading
from langchain_quantllm.errors import EncodingError, QuantLLMError, first_line

_QUIET_S, _GATHER_S = 0.001, 0.01
# Concurrent calls come a little apart. An idle thread begins when no more has come for the first of these times, and at
# the latest after the second.

_SHORT_TOKENS = 32
"""Items up to this length join any batch."""

_workers: weakref.WeakSet[EncoderWorker] = weakref.WeakSet()


class Runner(Protocol):
    """A device that runs operations."""

    def prepare(self) -> None:
        """Make it ready, which may take long; does nothing where it is. Raises why it cannot."""

    def run(self, encoder: Any, operation: Operation, items: Sequence[Any]) -> Sequence[Any]:
        """Run an operation over prepared items."""


class EncoderWorker:
    """The queue of a loaded encoder's calls, and its threads.

    Args:
        encoder: The loaded encoder; held weakly.
        runners: One for each device; the first one runs on the encoder's own model.
    """

    def __init__(self, encoder: Any, runners: Sequence[Runner]) -> None:
        note_loading()
        self._encoder = weakref.ref(encoder)
        self._runners = list(runners)
        self._works: deque[Work] = deque()
        self._changed = threading.Condition()
        self._batching = threading.Lock()
        """Held by a thread that makes a batch; callers do not wait for it."""
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._short_turn = True
        self._size = BatchSize()
        self.batches = 0
        """Number of batches that were run."""
        _workers.add(self)
        weakref.finalize(encoder, self.close).atexit = False

    def submit(self, work: Work) -> None:
        """Queue a call.

        Raises:
            UnsupportedError: If this process was forked off the one that loaded the model, or starts no more threads.
            EncodingError: If the model was unloaded.
        """
        check_process()
        with self._changed:
            if self._closed:
                raise EncodingError(UNLOADED)
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            for number in range(len(self._threads), len(self._runners)):
                thread = threading.Thread(
                    target=self._serve, args=(self._runners[number],), name="quantllm-encoder", daemon=True
                )
                start_thread(thread, "an encoder")
                self._threads.append(thread)
            self._works.append(work)
            self._changed.notify_all()

    def prepare(self) -> None:
        """Wait until every device is ready; calls need not wait for it.

        Raises:
            QuantLLMError: If a device cannot be made ready.
        """
        for runner in self._runners:
            runner.prepare()

    def close(self) -> None:
        """Fail all calls, and wait until the threads have ended. In a forked process nothing is left to do."""
        self.stop()
        self.join()

    def stop(self) -> None:
        """Fail all calls; the threads end after the batch that they run."""
        if is_forked():
            return
        with self._changed:
            self._closed = True
            works, self._works = list(self._works), deque()
            self._changed.notify_all()
        for work in works:
            work.fail(EncodingError(UNLOADED))

    def join(self) -> None:
        """Wait until the threads have ended."""
        for thread in [] if is_forked() else list(self._threads):
            if thread is not threading.current_thread():
                thread.join(timeout=30)

    # The threads.

    def _serve(self, runner: Runner) -> None:
        try:
            runner.prepare()  # meanwhile the other devices work
            while self._wait():
                encoder = self._encoder()
                if encoder is None:
                    return
                with self._batching:
                    rows = self._next_batch(encoder)
                if rows:
                    self._run(encoder, runner, rows)
                del encoder, rows
        except BaseException as error:  # no call may wait for a thread that has ended; the next one starts another
            with self._changed:
                works = list(self._works)
            for work in works:
                work.fail(_described(error))

    def _wait(self) -> bool:
        """Wait for work; an idle thread waits a moment for more of it. False after closing."""
        with self._changed:
            was_idle = False
            while not self._closed and not self._drop_ended():
                was_idle = True
                self._changed.wait()
            until, seen = time.monotonic() + _GATHER_S, -1
            while was_idle and not self._closed and seen != len(self._works) and time.monotonic() < until:
                seen = len(self._works)
                self._changed.wait(_QUIET_S)
            return not self._closed

    def _drop_ended(self) -> bool:
        """Drop calls that have ended, and say whether any has items that wait."""
        for work in [work for work in self._works if work.has_ended]:
            self._works.remove(work)
            work.encoder = None
        return any(work.waits for work in self._works)

    def _next_batch(self, encoder: Any) -> list[tuple[Work, tuple[int, Any, int]]]:
        """Take the items of the next batch: those of the oldest or the shortest call, and of others that fit."""
        with self._changed:
            live = [work for work in self._works if work.waits and not work.has_ended]
        if not live:
            return []
        by_size = sorted(live, key=lambda work: work.remaining)
        leader = by_size[0] if self._short_turn else live[0]
        self._short_turn = not self._short_turn
        if not self._measure(encoder, leader):
            return []
        most_tokens = self._size.within(leader.most_tokens)
        longest = max(1, leader.next_length)
        rows: list[tuple[Work, tuple[int, Any, int]]] = []
        most_rows = leader.most_items or most_tokens
        while leader.is_measured and (not rows or (longest * (len(rows) + 1) <= most_tokens and len(rows) < most_rows)):
            rows.append((leader, leader.take()))
        if leader.is_separate:
            return rows
        for work in by_size:
            if work is leader or work.is_separate or work.operation != leader.operation:
                continue
            if not self._measure(encoder, work):
                continue
            while work.is_measured and work.next_length <= max(2 * longest, _SHORT_TOKENS):
                widest = max(longest, work.next_length)
                if widest * (len(rows) + 1) > most_tokens or len(rows) >= most_rows:
                    break
                longest = widest
                rows.append((work, work.take()))
        return rows

    def _measure(self, encoder: Any, work: Work) -> bool:
        """Measure the next items of a call, if none is measured; False if it has failed."""
        if not work.is_measured:
            try:
                with encoder.tokenizer_lock:
                    work.measure(encoder.model)
            except Exception as error:
                work.fail(_described(error))
                return False
        return work.is_measured

    def _run(
        self,
        encoder: Any,
        runner: Runner,
        rows: Sequence[tuple[Work, tuple[int, Any, int]]],
    ) -> None:
        operation = rows[0][0].operation
        tokens = max(row[2] for _, row in rows)
        self.batches += 1
        has_shrunk = False

        def shrunk(count: int) -> None:
            nonlocal has_shrunk
            has_shrunk = True
            self._size.shrink(tokens * count)

        try:
            results = run_halving(
                lambda items: runner.run(encoder, operation, items), [item for _, (_, item, _) in rows], shrunk
            )
            if len(results) != len(rows):
                msg = f"the model returned {len(results)} results for {len(rows)} items"
                raise RuntimeError(msg)
        except BaseException as error:
            self._give_up(error, rows)
            return
        if not has_shrunk:
            self._size.count(tokens * len(rows))
        for work in dict.fromkeys(work for work, _ in rows):
            work.finish([(row[0], result) for (owner, row), result in zip(rows, results, strict=True) if owner is work])

    def _give_up(self, error: BaseException, rows: Sequence[tuple[Work, tuple[int, Any, int]]]) -> None:
        """End a call whose batch failed; where several calls shared it, each tries again alone."""
        works = list(dict.fromkeys(work for work, _ in rows))
        if len(works) == 1:
            works[0].fail(_described(error))
            return
        with self._batching:
            for work in works:
                work.is_separate = True
                work.give_back([row for owner, row in rows if owner is work])
        with self._changed:
            self._changed.notify_all()


def _described(error: BaseException) -> BaseException:
    """Return an error of this package for what was raised in a thread."""
    if isinstance(error, QuantLLMError):
        return error
    described = EncodingError(f"the encoder failed: {type(error).__name__}: {first_line(error)}.")
    described.__cause__ = error
    return described


def _close_all() -> None:
    for worker in list(_workers):
        worker.close()


atexit.register(_close_all)
