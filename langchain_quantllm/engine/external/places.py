"""The places of requests at a server: how many are there at once, and who is next. Belongs to one event loop."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from langchain_quantllm.engine.request import Request


@dataclass(order=True)
class _Waiting:
    priority: int
    number: int
    owner: _Owner = field(compare=False)
    most: int | None = field(compare=False)
    turn: asyncio.Future[None] = field(compare=False)

    @property
    def may_go(self) -> bool:
        return self.most is None or self.owner.held < self.most


class _Owner:
    """One owner's requests: the number of places that they hold, and a heap of those that wait."""

    def __init__(self) -> None:
        self.held = 0
        self.queue: list[_Waiting] = []


class Places:
    """A number of places, taken in the order of priorities, then of arrival.

    `Request.max_rows` bounds the places of its owner, and holds up no other owner. A step takes as long as the
    logarithm of the requests that wait.
    """

    def __init__(self, count: int) -> None:
        """Begin with all places free.

        Args:
            count: How many there are.
        """
        self._free = count
        self._owners: dict[int | None, _Owner] = {}
        self._next: list[_Waiting] = []
        """A heap with the first request of each owner that may have one more place; and some that may not any more."""
        self._numbers = itertools.count()

    @asynccontextmanager
    async def hold(self, request: Request) -> AsyncIterator[None]:
        """Wait for a place, and hold it."""
        owner = self._owners.setdefault(request.owner, _Owner())
        turn = asyncio.get_running_loop().create_future()
        priority = request.options.priority
        heapq.heappush(owner.queue, _Waiting(priority, next(self._numbers), owner, request.max_rows, turn))
        self._offer(owner)
        try:
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave(owner)
                else:
                    self._offer(owner)
                raise
            try:
                yield
            finally:
                self._leave(owner)
        finally:
            if not owner.held and not owner.queue and self._owners.get(request.owner) is owner:
                del self._owners[request.owner]

    def _leave(self, owner: _Owner) -> None:
        self._free += 1
        owner.held -= 1
        self._offer(owner)

    def _offer(self, owner: _Owner) -> None:
        """Let an owner's first request take part, and give the free places away."""
        self._list(owner)
        while self._free and self._next:
            waiting = heapq.heappop(self._next)
            queue = waiting.owner.queue
            # One that is cancelled, was listed twice, or comes behind another of its owner is listed when it is first.
            if waiting.turn.done() or not waiting.may_go or queue[0] is not waiting:
                continue
            heapq.heappop(queue)
            self._free -= 1
            waiting.owner.held += 1
            waiting.turn.set_result(None)
            self._list(waiting.owner)

    def _list(self, owner: _Owner) -> None:
        while owner.queue and owner.queue[0].turn.done():  # cancelled
            heapq.heappop(owner.queue)
        if owner.queue and owner.queue[0].may_go:
            heapq.heappush(self._next, owner.queue[0])
