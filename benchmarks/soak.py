"""A long run of the engines: thousands of requests of every kind at once, each answer checked, and what they leave.

    python -m benchmarks.soak --requests 20000 --engine both

Threads and an event loop send random requests (see `soak_calls`) to one tiny model. Streams are cancelled, read late or
never; masks and forwards raise; the model is unloaded and loaded, its weights are changed and adapters attached. Each
answer is compared with an oracle's (see `oracle`), or must be an error that the request allows. Whenever the engine
comes to rest, its books are checked. Halfway and at the end it must have all of its fused steps, and at the end there
may be no more threads, files, tensors or objects than halfway. Prints a table, and fails if an answer was wrong or
anything is left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import logging
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.census import left_behind, settled_census
from benchmarks.oracle import Verdict
from benchmarks.soak_calls import ENGINE_FAILS, Call, Conversation, Maker, Panic
from benchmarks.soak_model import SoakModel, make_checkpoint
from langchain_quantllm.engine import continuous
from langchain_quantllm.engine import stream as stream_module
from langchain_quantllm.engine.forward_context import current_context
from langchain_quantllm.errors import GenerationError, QuantLLMError
from tests.support.critical import CriticalMessages

MOST_UNREAD = 8
"""Chunks after which a stream of the soak is full."""

_CALLS_OF_A_CHANGE = 60
_LOOP_CALLERS = 4  # in the event loop
_MOST_LEFT = 12  # streams that are open and never read


@dataclass
class Tally:
    """The calls of one kind."""

    calls: int = 0
    right: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    verdict: Verdict = field(default_factory=Verdict)


class Soak:
    """A model under load, with the tallies of its calls."""

    def __init__(self, folder: Path, engine: str, threads: int, seed: int) -> None:
        """Make the model, with forwards that fail now and then."""
        self.model = SoakModel(folder, engine, seed)
        self.tallies: dict[str, Tally] = {}
        self.preempted = 0
        self.lost_steps: list[str] = []
        self._fused = self._fused_steps()
        self._threads, self._seed = threads, seed
        self._random = random.Random(seed + 1)
        self._lock = threading.Lock()
        self._left: list[Conversation] = []
        self._failures: list[str] = []
        self._changes = itertools.cycle([self._change_weights, self._attach, self._unload, self._unload_while_running])
        self._hooked: Any = None
        self._hook()

    def _hook(self) -> None:
        """Let forwards of the model that is loaded now fail at random."""
        if (model := self.model.model) is self._hooked:
            return
        self._hooked = model
        fails = random.Random(self._random.random())

        def fail_sometimes(module: Any, args: Any, kwargs: Any) -> None:
            context = current_context()
            if context is not None and context.record is not None:
                return  # a model that fails there is rightly left without fused steps
            if fails.random() < 0.0003:
                raise fails.choice([RuntimeError, Panic])("the device had a bad day")

        model.register_forward_pre_hook(fail_sometimes, with_kwargs=True)

    # Calls.

    def run(self, requests: int, seed: int) -> dict[str, Any]:
        """Send requests from all threads and the event loop, and count what there is when all have ended."""
        numbers = iter(range(requests))
        workers = [
            threading.Thread(target=self._serve, args=(numbers, seed + i), daemon=True) for i in range(self._threads)
        ]
        workers.append(threading.Thread(target=lambda: asyncio.run(self._aserve(numbers, seed + 100)), daemon=True))
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if self._failures:
            raise RuntimeError(self._failures[0])
        return self._at_rest()

    def _take(self, numbers: Any) -> int | None:
        with self._lock:
            return None if self._failures else next(numbers, None)

    def _serve(self, numbers: Any, seed: int) -> None:
        maker, rng = Maker(seed), random.Random(seed)
        try:
            while (number := self._take(numbers)) is not None:
                if number % _CALLS_OF_A_CHANGE == _CALLS_OF_A_CHANGE - 1:
                    self._change()
                call, llm = maker.make(), rng.choice(self.model.llms)
                with self.model.calling():
                    self._call(call, llm, maker)
        except BaseException:
            self._failures.append(traceback.format_exc())

    def _call(self, call: Call, llm: Any, maker: Maker) -> None:
        conversation = None
        try:
            with maker.state():
                conversation = Conversation(self.model, call, llm)
                conversation.read()
        except QuantLLMError as error:
            self._note(call, conversation, error)
        else:
            self._note(call, conversation, None)
            maker.remember(call)

    async def _aserve(self, numbers: Any, seed: int) -> None:
        async def one(seed: int) -> None:
            maker, rng = Maker(seed), random.Random(seed)
            try:
                while self._take(numbers) is not None:
                    call, llm = maker.make(), rng.choice(self.model.llms)
                    await asyncio.to_thread(self.model.begin_call)
                    try:
                        await self._acall(call, llm, maker)
                    finally:
                        self.model.end_call()
            except BaseException:
                self._failures.append(traceback.format_exc())

        await asyncio.gather(*(one(seed + i) for i in range(_LOOP_CALLERS)))

    async def _acall(self, call: Call, llm: Any, maker: Maker) -> None:
        conversation = None
        try:
            conversation = await asyncio.to_thread(Conversation, self.model, call, llm)
            await conversation.aread()
        except QuantLLMError as error:
            await asyncio.to_thread(self._note, call, conversation, error)
        else:
            await asyncio.to_thread(self._note, call, conversation, None)
            maker.remember(call)

    def _note(self, call: Call, conversation: Conversation | None, error: QuantLLMError | None) -> None:
        """Judge a call and count it."""
        verdict = Verdict() if conversation is None else conversation.judge(has_failed=error is not None)
        if error is not None and not _is_allowed(call, error):
            verdict.faults.append(f"{type(error).__name__}: {error}")
        elif error is None and call.must_fail:
            verdict.faults.append("it did not fail")
        with self._lock:
            tally = self.tallies.setdefault(call.kind, Tally())
            tally.calls += 1
            tally.right += error is None and not verdict.faults
            if error is not None and _is_allowed(call, error):
                tally.errors[type(error).__name__] += 1
            tally.verdict.add(verdict)
        if conversation is not None:
            self._leave(conversation, call)

    def _leave(self, conversation: Conversation, call: Call) -> None:
        """Close the stream, or leave it open and close an older one."""
        if not call.is_left:
            conversation.stream.close()
            return
        with self._lock:
            self._left.append(conversation)
            old = self._left.pop(0) if len(self._left) > _MOST_LEFT else None
        if old is not None:
            old.stream.close()

    # Changes.

    def _change(self) -> None:
        change = next(self._changes)
        if change == self._unload_while_running:
            change()
        else:
            with self.model.changing():
                change()
        with self.model.changing():
            self._hook()

    def _checked_calls(self, count: int) -> None:
        maker = Maker(self._random.randrange(1 << 30))
        for _ in range(count):
            self._call(maker.make(), self._random.choice(self.model.llms), maker)

    def _change_weights(self) -> None:
        """Change weights beside unread sequences, which go on with the new ones and are not checked."""
        with self.model.changed_weights():
            self._checked_calls(6)
        self._close_left()
        self.model.wait_for_rest()
        self._checked_calls(3)

    def _attach(self) -> None:
        self._close_left()
        self.model.wait_for_rest()
        with self.model.attached_adapter():
            self._checked_calls(6)
        self._checked_calls(3)

    def _unload(self) -> None:
        self._close_left()
        self._note_preempted()
        self.model.llms[0].unload()
        self.model.load()

    def _unload_while_running(self) -> None:
        self._note_preempted()
        self.model.llms[0].unload()
        with self.model.changing():
            self._close_left()
            self.model.load()

    def _note_preempted(self) -> None:
        for engine in self.model.engines():
            self.preempted += engine._scheduler.preempted if hasattr(engine, "_scheduler") else 0

    def _close_left(self) -> None:
        with self._lock:
            left, self._left = self._left, []
        for conversation in left:
            conversation.stream.close()

    # What is left behind.

    def _at_rest(self) -> dict[str, Any]:
        with self.model.changing():
            self._close_left()
            self.model.load()
            self.model.wait_for_rest()
            if (fused := self._fused_steps()) != self._fused:
                self.lost_steps.append(f"the fused steps are {fused}, and were {self._fused}")
        return settled_census()

    def _fused_steps(self) -> list[dict[str, int]]:
        return [dict(engine.info.fused) for engine in self.model.engines()]

    def close(self) -> None:
        """Unload the model."""
        self._note_preempted()
        self.model.llms[0].unload()


def _is_allowed(call: Call, error: QuantLLMError) -> bool:
    return isinstance(error, call.errors) or (
        isinstance(error, GenerationError) and any(words in str(error) for words in ENGINE_FAILS)
    )


def soak(requests: int, threads: int = 6, *, engine: str = "fast", seed: int = 0) -> dict[str, Any]:
    """Run the soak.

    Args:
        requests: How many requests.
        threads: How many threads call at once, beside the event loop's callers.
        engine: `"fast"`, `"pipeline"`, or `"both"` over one model.
        seed: Seed of every random choice.

    Returns:
        What happened, and what was left behind.
    """
    critical, log = CriticalMessages(), logging.getLogger(continuous.__name__)
    log.addHandler(critical)
    before = (continuous.CHECKS_INTEGRITY, stream_module.MOST_UNREAD)
    continuous.CHECKS_INTEGRITY, stream_module.MOST_UNREAD = True, MOST_UNREAD
    threads_before = _engine_threads()
    try:
        with tempfile.TemporaryDirectory() as folder:
            make_checkpoint(Path(folder), seed)
            one = Soak(Path(folder), engine, threads, seed)
            began = time.monotonic()
            half = one.run(requests // 2, seed)
            end = one.run(requests - requests // 2, seed + 1000)
            seconds = time.monotonic() - began
            one.close()
    finally:
        log.removeHandler(critical)
        continuous.CHECKS_INTEGRITY, stream_module.MOST_UNREAD = before
    return {
        "requests": requests,
        "engine": engine,
        "seconds": round(seconds, 1),
        "tallies": one.tallies,
        "halfway": half,
        "at the end": end,
        "preemptions": one.preempted,
        "books": critical.messages,
        "lost steps": one.lost_steps,
        "torch": torch.__version__,
        "threads after unload": _engine_threads() - threads_before,
    }


def _engine_threads() -> int:
    return sum(thread.name == "quantllm-engine" for thread in threading.enumerate())


def wrong_answers(found: dict[str, Any]) -> list[str]:
    """List the wrong answers, the faults of the engines' books, and fused steps that were lost."""
    faults = [f"{kind}: {fault}" for kind, tally in found["tallies"].items() for fault in tally.verdict.faults]
    return [*faults, *found["books"], *found["lost steps"]]


def table(found: dict[str, Any]) -> str:
    """Format the tallies as a table of Markdown."""
    lines = ["| kind | requests | right | tokens | ties | allowed errors | wrong |", "|---" * 7 + "|"]
    total = Tally()
    for tally in found["tallies"].values():
        total.calls += tally.calls
        total.right += tally.right
        total.errors += tally.errors
        total.verdict.add(tally.verdict)
    for kind, t in [*sorted(found["tallies"].items()), ("all", total)]:
        errors = ", ".join(f"{name} {count}" for name, count in sorted(t.errors.items()))
        v = t.verdict
        lines.append(f"| {kind} | {t.calls} | {t.right} | {v.tokens} | {v.ties} | {errors} | {len(v.faults)} |")
    return "\n".join(lines)


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--engine", default="both", choices=["fast", "pipeline", "both"])
    parser.add_argument("--threads", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = soak(given.requests, given.threads, engine=given.engine, seed=given.seed)
    print(table(found))
    print(json.dumps({name: value for name, value in found.items() if name != "tallies"}))
    left = [*left_behind(found["halfway"], found["at the end"]), *["thread"] * found["threads after unload"]]
    faults = [*wrong_answers(found), *(f"left behind: {name}" for name in left)]
    sys.exit("\n".join([f"{len(faults)} faults:", *faults[:30]]) if faults else 0)


if __name__ == "__main__":
    main()
