"""Batches of items of different lengths: packed by padded tokens, and halved when memory runs out."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from langchain_quantllm.errors import NotEnoughMemoryError
from langchain_quantllm.loading.devices import release_memory

Item = TypeVar("Item")
Result = TypeVar("Result")

_CPU_FAILURES = ("not enough memory", "DefaultCPUAllocator", "can't allocate memory")
"""Words of torch's RuntimeError where main memory runs out."""


_GROWS_AFTER = 8
"""Batches of the largest size that fit, after which a size that was halved for lack of memory is doubled."""

_MOST_WAIT = 512
"""Such batches after which it is doubled at the latest, where doubling it has failed."""


def pack(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Pack items into batches by their padded size, the longest item of a batch times the number of its items.

    Args:
        lengths: Number of tokens of each item.
        most_tokens: Most tokens of a batch, padding included; an item that is longer has a batch of its own.

    Returns:
        Indices of the items by batch, the longest items first; items of equal length keep their order.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or len(batches[-1]) >= room:
            batches.append([])
            room = max(1, most_tokens // max(1, lengths[index]))
        batches[-1].append(index)
    return batches


def run_halving(
    run: Callable[[Sequence[Item]], Sequence[Result]],
    items: Sequence[Item],
    shrunk: Callable[[int], None] = lambda count: None,
) -> list[Result]:
    """Run a batch; where memory runs out, run its halves, and theirs.

    Args:
        run: Computes the results of some items, in their order.
        items: The items.
        shrunk: Is told the number of items that did not fit at once.

    Returns:
        A result for each item.

    Raises:
        NotEnoughMemoryError: If a single item does not fit.
    """
    try:
        return list(run(items))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        cause = error.with_traceback(None)  # the frames hold the tensors that did not fit
    release_memory()
    shrunk(len(items))
    if len(items) == 1:
        msg = (
            "the memory does not suffice for a single text; give a smaller max_length=, use a scheme of fewer bits, or "
            "free what other programs hold."
        )
        raise NotEnoughMemoryError(msg) from cause
    half = (len(items) + 1) // 2
    return [*run_halving(run, items[:half], shrunk), *run_halving(run, items[half:], shrunk)]


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is torch's or Python's for memory that ran out."""
    if isinstance(error, NotEnoughMemoryError):
        return False
    torch: Any = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in _CPU_FAILURES)


class BatchSize:
    """The most tokens of a batch after memory ran out: halved then, doubled again after batches that fit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._most_tokens: int | None = None
        self._wait = _GROWS_AFTER
        self._fitted = 0
        self._is_tried = False

    def within(self, most_tokens: int) -> int:
        """Return the most tokens of a batch that may have `most_tokens`."""
        with self._lock:
            if self._most_tokens is not None and self._fitted >= self._wait:
                if self._is_tried:  # the size before this one was doubled, and fits
                    self._wait = _GROWS_AFTER
                self._fitted, self._most_tokens, self._is_tried = 0, 2 * self._most_tokens, True
            if self._most_tokens is None or self._most_tokens >= most_tokens:
                return most_tokens
            return self._most_tokens

    def shrink(self, tokens: int) -> None:
        """Halve the size of a batch of so many tokens that did not fit; after a doubling, wait twice as long for one.

        A batch is halved again and again until its parts fit: all of it is one failure of the doubled size.
        """
        with self._lock:
            if self._is_tried:
                self._wait = min(2 * self._wait, _MOST_WAIT)
            self._is_tried, self._fitted = False, 0
            self._most_tokens = max(1, tokens // 2)

    def count(self, tokens: int) -> None:
        """Count a batch of so many tokens that fitted; small ones say nothing about larger ones."""
        with self._lock:
            if self._most_tokens is not None and 2 * tokens > self._most_tokens:
                self._fitted += 1
