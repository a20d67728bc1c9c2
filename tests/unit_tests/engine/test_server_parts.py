"""The parts of the engine over servers: the reader of events, and the places of requests."""

from __future__ import annotations

import asyncio
import random

import pytest

from langchain_quantllm.engine.external.events import MOST_EVENT_BYTES, EventReader
from langchain_quantllm.engine.external.places import Places
from langchain_quantllm.engine.request import Request
from langchain_quantllm.options import GenerationOptions


class TestEvents:
    STREAM = 'data: {"a": "é\u2028"}\r\n\r\n: a comment\nevent: x\nid: 3\n\ndata:b\ndata: c\n\ndata: [DONE]\n'.encode()
    FOUND = ('{"a": "é\u2028"}', "b\nc", "[DONE]")

    def test_events_are_the_same_however_bytes_come(self) -> None:
        chooser = random.Random(0)
        for _ in range(200):
            reader, found, at = EventReader(), [], 0
            while at < len(self.STREAM):
                size = chooser.randint(1, 12)
                found += reader.push(self.STREAM[at : at + size])
                at += size
            assert (*found, *reader.flush()) == self.FOUND

    def test_an_event_without_an_end_is_an_error(self) -> None:
        reader = EventReader()
        reader.push(b"data: x\ndata: " + b"x" * (MOST_EVENT_BYTES - 100))
        with pytest.raises(ValueError, match="bytes"):
            reader.push(b"x" * 200)

    def test_what_is_no_text_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="utf-8"):
            EventReader().push(b"data: \xff\n\n")


def request_of(owner: int | None = None, most: int | None = None, priority: int = 0) -> Request:
    return Request(
        prompt_ids=(1,),
        max_new_tokens=1,
        min_new_tokens=0,
        options=GenerationOptions(priority=priority),
        sample_index=0,
        seed=0,
        eos_token_ids=(),
        owner=owner,
        max_rows=most,
    )


class TestPlaces:
    """Each case holds places until it says otherwise, and notes who got one."""

    @staticmethod
    async def _settle() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def _hold(self, places: Places, request: Request, name: str, log: list[str], end: asyncio.Event) -> None:
        async with places.hold(request):
            log.append(name)
            await end.wait()

    def test_the_lowest_priority_then_the_first_goes_next(self) -> None:
        async def run() -> list[str]:
            places, log, ends = Places(1), [], [asyncio.Event() for _ in range(4)]
            names = [("first", 0), ("late", 5), ("second", 0), ("urgent", -1)]
            tasks = []
            for (name, priority), end in zip(names, ends, strict=True):
                tasks.append(asyncio.create_task(self._hold(places, request_of(priority=priority), name, log, end)))
                await self._settle()
            for end in ends:
                end.set()
            await asyncio.gather(*tasks)
            return log

        assert asyncio.run(run()) == ["first", "urgent", "second", "late"]

    def test_an_owners_limit_holds_up_no_other(self) -> None:
        async def run() -> list[str]:
            places, log, end = Places(3), [], asyncio.Event()
            mine, other = request_of(owner=1, most=1), request_of(owner=2)
            tasks = [
                asyncio.create_task(self._hold(places, request, name, log, end))
                for name, request in (("a", mine), ("b", mine), ("c", other))
            ]
            await self._settle()
            held = list(log)
            end.set()
            await asyncio.gather(*tasks)
            return held

        assert asyncio.run(run()) == ["a", "c"]

    def test_a_cancelled_one_leaves_no_place_taken(self) -> None:
        async def run() -> bool:
            places, log, end = Places(1), [], asyncio.Event()
            tasks = [asyncio.create_task(self._hold(places, request_of(), n, log, end)) for n in ("a", "b", "c", "d")]
            await self._settle()
            tasks[1].cancel()  # while it waits
            tasks[0].cancel()  # while it holds
            await self._settle()
            tasks[2].cancel()
            end.set()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.wait_for(self._hold(places, request_of(), "e", log, end), 20)
            return log[-1] == "e"

        assert asyncio.run(run())

    @pytest.mark.parametrize("seed", range(8))
    def test_whatever_comes_and_goes_those_hold_places_that_should(self, seed: int) -> None:
        async def run() -> None:
            chooser, count, most = random.Random(seed), 4, {0: None, 1: 1, 2: 2}
            places = Places(count)
            tasks: dict[str, tuple[Request, asyncio.Task[None], asyncio.Event]] = {}
            log: list[str] = []
            holding: list[str] = []
            waiting: list[str] = []  # in the order of arrival

            def admit() -> None:
                """Do what `Places` should, in the plainest way."""
                for name in sorted(waiting, key=lambda name: tasks[name][0].options.priority):
                    request = tasks[name][0]
                    own = sum(tasks[other][0].owner == request.owner for other in holding)
                    if len(holding) < count and (request.max_rows is None or own < request.max_rows):
                        waiting.remove(name)
                        holding.append(name)

            for step in range(300):
                choice = chooser.random()
                if choice < 0.5:
                    owner, name, end = chooser.randrange(3), str(step), asyncio.Event()
                    request = request_of(owner, most[owner], chooser.randrange(3))
                    task = asyncio.create_task(self._hold(places, request, name, log, end))
                    tasks[name] = (request, task, end)
                    waiting.append(name)
                elif choice < 0.75 and holding:
                    name = holding.pop(chooser.randrange(len(holding)))
                    tasks[name][2].set() if chooser.random() < 0.5 else tasks[name][1].cancel()
                elif waiting:
                    tasks[waiting.pop(chooser.randrange(len(waiting)))][1].cancel()
                admit()
                await self._settle()
                assert {name for name in log if not tasks[name][1].done()} == set(holding), step
            for _, task, _ in tasks.values():
                task.cancel()
            await asyncio.gather(*(task for _, task, _ in tasks.values()), return_exceptions=True)
            assert not places._owners
            assert places._free == count

        asyncio.run(run())

    def test_thousands_of_an_owner_with_a_limit_are_not_looked_through_for_each(self) -> None:
        class Limit(int):
            looks = 0

            def __gt__(self, other: int) -> bool:
                Limit.looks += 1
                return int(self) > other

            def __le__(self, other: int) -> bool:
                Limit.looks += 1
                return int(self) <= other

        async def run(count: int) -> None:
            places, request, end = Places(128), request_of(1, Limit(8)), asyncio.Event()
            tasks = [asyncio.create_task(self._hold(places, request, "", [], end)) for _ in range(count)]
            await self._settle()
            end.set()
            await asyncio.gather(*tasks)

        asyncio.run(run(1000))
        assert 1000 < Limit.looks < 20_000
