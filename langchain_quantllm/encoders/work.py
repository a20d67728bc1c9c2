"""A call of an encoder: an operation over items, and its results as they come. Knows no kind of model and no text."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # another class before Python 3.11
from typing import Any, Protocol

from langchain_quantllm.errors import EncodingError

UNLOADED = "the model was unloaded while this call was on its way; call again."

_WINDOW = 512
"""Items of a call that are measured at once; others may run between two windows."""


class Operation(Protocol):
    """The computation of a call; equal ones share batches. Frozen and picklable: other processes run it too."""

    def measure(self, model: Any, items: Sequence[Any]) -> tuple[Sequence[Any], Sequence[int]]:
        """Prepare items, and count their tokens; raises what is wrong with one of them.

        Returns:
            The prepared items, and the number of tokens of each.
        """

    def run(self, model: Any, items: Sequence[Any]) -> Sequence[Any]:
        """Compute the results of prepared items, in their order."""


class Work:
    """One call: an operation over items, and its results as they come.

    Args:
        encoder: The loaded encoder, which lives as long as the call.
        operation: The operation.
        items: Its items.
        sizes: A rough size of each item, such as its characters: large ones are measured first.
        most_tokens: Most tokens of a batch, padding included.
        most_items: Most items of a batch; None bounds the tokens alone.
        progress: Is told the number of further items that are done.
    """

    def __init__(
        self,
        encoder: Any,
        operation: Operation,
        items: Sequence[Any],
        *,
        sizes: Sequence[int],
        most_tokens: int,
        most_items: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.encoder: Any = encoder
        self.operation = operation
        self.most_tokens = most_tokens
        self.most_items = most_items
        self._ending = threading.Lock()
        self.future: Future[list[Any]] = Future()
        self._items = list(items)
        self._results: list[Any] = [None] * len(self._items)
        self._unmeasured = deque(sorted(range(len(self._items)), key=lambda i: -sizes[i]))
        self._pending: deque[tuple[int, Any, int]] = deque()
        """Index, prepared item and tokens of the measured items, the longest first."""
        self._missing = len(self._items)
        self._progress = progress
        self.is_separate = False
        """Whether it shares no batch any more, as one that it was in has failed."""

    @property
    def has_ended(self) -> bool:
        """Whether it has all results, an error, or was cancelled."""
        return self.future.done()

    @property
    def is_measured(self) -> bool:
        """Whether a measured item waits."""
        return bool(self._pending)

    @property
    def waits(self) -> bool:
        """Whether items wait for a batch."""
        return bool(self._pending or self._unmeasured)

    @property
    def remaining(self) -> int:
        """Number of items that wait for a batch."""
        return len(self._pending) + len(self._unmeasured)

    @property
    def next_length(self) -> int:
        """Tokens of the next measured item, the longest."""
        return self._pending[0][2]

    def measure(self, model: Any) -> None:
        """Measure the next window of items."""
        window = [self._unmeasured.popleft() for _ in range(min(_WINDOW, len(self._unmeasured)))]
        prepared, lengths = self.operation.measure(model, [self._items[i] for i in window])
        rows = zip(window, prepared, lengths, strict=True)
        self._pending = deque(sorted(rows, key=lambda row: -row[2]))

    def take(self) -> tuple[int, Any, int]:
        """Take the next measured item."""
        return self._pending.popleft()

    def give_back(self, rows: Sequence[tuple[int, Any, int]]) -> None:
        """Put items of a failed batch back."""
        self._pending.extendleft(reversed(rows))

    def finish(self, results: Sequence[tuple[int, Any]]) -> None:
        """Keep results by their index; the last ones end the call."""
        for index, result in results:
            self._results[index] = result
        if self._progress is not None and results:
            self._progress(len(results))
        with self._ending:
            self._missing -= len(results)
            is_last = not self._missing
        if is_last:
            self._end(lambda: self.future.set_result(self._results))

    def fail(self, error: BaseException) -> None:
        """End the call with an error."""
        self._end(lambda: self.future.set_exception(error))

    def cancel(self) -> None:
        """End the call without results; items that wait are dropped."""
        self.future.cancel()

    def result(self) -> list[Any]:
        """Wait for the results, in the order of the items.

        Raises:
            QuantLLMError: What the call ended with.
        """
        try:
            while True:
                try:
                    return self.future.result(timeout=1.0)  # so that Ctrl-C gets through on every platform
                except FutureTimeoutError:
                    if self.future.done():
                        raise
        except CancelledError:
            raise EncodingError(UNLOADED) from None
        except BaseException:
            self.cancel()
            raise

    def _end(self, how: Callable[[], None]) -> None:
        with self._ending:
            if not self.future.done() and self.future.set_running_or_notify_cancel():
                how()
        self.encoder = None
