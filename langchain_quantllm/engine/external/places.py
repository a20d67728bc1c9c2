"""The places of requests at a server: how many are there at once, and who is next. Belongs to one event loop."""

from __future__ import annotations

import asyncio
import bisect
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from langchain_quantllm.engine.request import Request


@dataclass(order=True)
class _Waiting:
    priority: int
    number: int
    owner: int | None = field(compare=False)
    most: int | None = field(compare=False)
    turn: asyncio.Future[None] = field(compare=False)


class Places:
    """A number of places, taken in the order of priorities, then of arrival.

    `Request.max_rows` bounds the places of its owner, and holds up no other owner.
    """

    def __init__(self, count: int) -> None:
        """Begin with all places free.

        Args:
            count: How many there are.
        """
        self._free = count
        self._held: Counter[int | None] = Counter()
        self._waiting: list[_Waiting] = []
        self._numbers = itertools.count()

    @asynccontextmanager
    async def hold(self, request: Request) -> AsyncIterator[None]:
        """Wait for a place, and hold it."""
        owner, most = request.owner, request.max_rows
        waiting = _Waiting(
            request.options.priority, next(self._numbers), owner, most, asyncio.get_running_loop().create_future()
        )
        bisect.insort(self._waiting, waiting)
        self._give()
        try:
            await waiting.turn
        except asyncio.CancelledError:
            if waiting.turn.done() and not waiting.turn.cancelled():
                self._leave(owner)
            else:
                self._waiting.remove(waiting)
            raise
        try:
            yield
        finally:
            self._leave(owner)

    def _leave(self, owner: int | None) -> None:
        self._free += 1
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]
        self._give()

    def _give(self) -> None:
        """Give free places to the first that may have one."""
        i = 0
        while self._free and i < len(self._waiting):
            waiting = self._waiting[i]
            is_cancelled = waiting.turn.done()  # it takes itself off the list
            if is_cancelled or (waiting.most is not None and self._held[waiting.owner] >= waiting.most):
                i += 1
                continue
            del self._waiting[i]
            self._free -= 1
            self._held[waiting.owner] += 1
            waiting.turn.set_result(None)
