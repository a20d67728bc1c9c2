"""A server under load: many clients at once, some leaving in the middle and some with wrong requests.

    python -m benchmarks.serve_load --requests 10000 --clients 200

The clients run in a process of their own, over HTTP on loopback, each with a connection of its own. Each answer is
compared with that of the engine in process, and at the end nothing may be left: no sequence, no block, no stream, no
thread, no open file, no memory. The same mix of requests then runs in process, as many at once, for the price of the
way through HTTP. Prints one line of JSON; exits with 1 if anything is wrong. Without --model, a tiny random model,
whose steps cost next to nothing: the times are the server's own, and the clients' share of the processors.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

PROMPTS = 64
NEW_TOKENS = 16
ENDLESS_TOKENS = 200
"""Tokens that a client asks for who leaves after the first."""
WRONG = "refused"
"""The answer to a wrong request."""
MOST_GROWN_MIB = 32
"""Memory that the allocator may keep: of ten thousand requests, 3 KiB each."""


class Result(NamedTuple):
    """One request as its client saw it; times in seconds."""

    kind: str
    prompt: int
    answer: str
    first_s: float
    total_s: float


def prompt_of(i: int) -> str:
    """Write one of the prompts."""
    return f"The quick brown fox number {i % PROMPTS} jumps over"


def kind_of(i: int) -> str:
    """Choose the kind of a request: of ten, one leaves, one is wrong, four stream and four do not."""
    return ("leaves", "wrong", "stream", "stream", "stream", "stream", "whole", "whole", "whole", "whole")[i % 10]


async def ask(client: httpx.AsyncClient, i: int) -> Result:
    """Send one request, and read its answer."""
    kind = kind_of(i)
    body: dict[str, Any] = {"prompt": prompt_of(i), "max_tokens": NEW_TOKENS, "temperature": 0}
    began = time.perf_counter()
    if kind == "wrong":
        response = await client.post("/v1/completions", json={**body, "temperature": -1})
        now = time.perf_counter() - began
        is_refused = response.status_code == 400 and response.json()["error"]["param"] == "temperature"
        return Result(kind, i, WRONG if is_refused else response.text, now, now)
    if kind == "whole":
        response = await client.post("/v1/completions", json=body)
        now = time.perf_counter() - began
        text = response.json()["choices"][0]["text"] if response.status_code == 200 else response.text
        return Result(kind, i, text, now, now)
    if kind == "leaves":
        body |= {"max_tokens": ENDLESS_TOKENS, "ignore_eos": True}
    first_s, text = 0.0, ""
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        async for line in response.aiter_lines():
            first_s = first_s or time.perf_counter() - began
            if kind == "leaves":
                break
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                text += event["choices"][0]["text"] if "choices" in event else json.dumps(event)
    return Result(kind, i, text, first_s, time.perf_counter() - began)


async def _send_all(url: str, requests: int, clients: int) -> list[Result]:
    """Send requests, so many at once."""
    numbers, results = iter(range(requests)), []

    async def work() -> None:
        # Its own, as clients are: one client with hundreds of connections spends its time on choosing among them.
        async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False, verify=False) as client:
            for i in numbers:
                result = await ask(client, i)
                results.append(result)

    await asyncio.gather(*(work() for _ in range(clients)))
    return results


def send_all(url: str, requests: int, clients: int) -> list[Result]:
    """Send requests from this process, so many at once."""
    return asyncio.run(_send_all(url, requests, clients))


async def call(llm: Any, i: int) -> Result:
    """Make the same request in process."""
    kind = kind_of(i)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "temperature": 0}
    began = time.perf_counter()
    first_s, text = 0.0, ""
    if kind == "whole":
        text = await llm.ainvoke(prompt_of(i), **options)
    elif kind == "wrong":
        try:
            await llm.ainvoke(prompt_of(i), **{**options, "temperature": -1})
        except ValueError:
            text = WRONG
    else:
        if kind == "leaves":
            options |= {"max_new_tokens": ENDLESS_TOKENS, "ignore_eos": True}
        async with contextlib.aclosing(llm.astream(prompt_of(i), **options)) as stream:
            async for piece in stream:
                first_s = first_s or time.perf_counter() - began
                if kind == "leaves":
                    break
                text += piece
    return Result(kind, i, text, first_s, time.perf_counter() - began)


async def call_all(llm: Any, requests: int, clients: int) -> list[Result]:
    """Make requests in process, so many at once."""
    numbers, results = iter(range(requests)), []

    async def work() -> None:
        for i in numbers:
            result = await call(llm, i)
            results.append(result)

    await asyncio.gather(*(work() for _ in range(clients)))
    return results


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 99th percentile, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50_ms": round(1000 * cuts[49], 1), "p99_ms": round(1000 * cuts[98], 1)}


def held() -> dict[str, int]:
    """Count what a process could leak; the pool of threads for calls, which grows to its bound and stays, is apart."""
    folder = Path("/proc/self/fd")
    files = len(os.listdir(folder)) if folder.is_dir() else 0
    threads = threading.enumerate()
    pool = sum(thread.name.startswith("quantllm-call") for thread in threads)
    gc.collect()
    resident_mib = psutil.Process().memory_info().rss >> 20
    return {"threads": len(threads) - pool, "pool_threads": pool, "files": files, "resident_mib": resident_mib}


@contextlib.contextmanager
def loaded(model: str | None, quantization: str | None) -> Iterator[Any]:
    """Load the model; without a name, a tiny random one."""
    from langchain_quantllm import QuantizedHuggingFaceLLM
    from tests.support.checkpoints import make_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        fields: dict[str, Any] = {"quantization": quantization}
        if model is None:
            model = str(make_checkpoint(Path(folder) / "tiny", dtype="float32", max_position_embeddings=512))
            fields = {"dtype": "float32", "device": "cpu"}
        llm = QuantizedHuggingFaceLLM(model_id=model, progress=False, **fields).load()
        yield llm
        llm.unload()


def wrong_results(results: Sequence[Result], expected: Sequence[str]) -> list[Result]:
    """List the results that are not what they should be."""
    wanted = {"wrong": WRONG, "leaves": ""}
    return [r for r in results if r.answer != wanted.get(r.kind, expected[r.prompt % PROMPTS])]


class Clock:
    """Seconds since it was made: of the wall clock, and of this process's computing."""

    def __init__(self) -> None:
        self._began_s = self.now()

    @staticmethod
    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def seconds(self) -> tuple[float, float]:
        """Return both."""
        wall_s, computing_s = self.now()
        return wall_s - self._began_s[0], computing_s - self._began_s[1]


def times(results: Sequence[Result], clock: Clock) -> dict[str, Any]:
    """Sum up the times of answers; call it when the last has come."""
    wall_s, computing_s = clock.seconds()
    return {
        "rate_req_s": round(len(results) / wall_s, 1),
        "computing_ms": round(1000 * computing_s / len(results), 2),
        "whole": quantiles([r.total_s for r in results if r.kind == "whole"]),
        "first_event": quantiles([r.first_s for r in results if r.kind == "stream"]),
        "stream": quantiles([r.total_s for r in results if r.kind == "stream"]),
    }


def main() -> None:
    """Measure, print and check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--model", help="folder or repository; without, a tiny random model")
    parser.add_argument("--quantization")
    given = parser.parse_args()

    from langchain_quantllm.base.aside import MOST_THREADS
    from tests.support.models import wait_until
    from tests.support.serving import serving

    with (
        loaded(given.model, given.quantization) as llm,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as sender,
    ):
        expected = llm.batch([prompt_of(i) for i in range(PROMPTS)], max_new_tokens=NEW_TOKENS, temperature=0)
        with serving(llm) as server:
            sender.submit(send_all, server.url, 2 * given.clients, given.clients).result()  # warm up
            wait_until(lambda: server.load == (0, 0, 0), 60)
            before, outcomes_before = held(), collections.Counter(server.outcomes("completions"))
            clock = Clock()
            results = sender.submit(send_all, server.url, given.requests, given.clients).result()
            served = times(results, clock)
            wait_until(lambda: server.load == (0, 0, 0), 60)
            # A client's connection is closed a moment after the client.
            wait_until(lambda: held()["files"] <= before["files"], 60)
            after = held()
            calls = server.service.calls
            left = {"streams": len(calls.streams), "body_bytes": calls.body_bytes, "kv_tokens": server.load[2]}
            outcomes = collections.Counter(server.outcomes("completions"))
            outcomes.subtract(outcomes_before)
        clock = Clock()
        alone = asyncio.run(call_all(llm, given.requests, given.clients))
        in_process = times(alone, clock)
    wrong = wrong_results([*results, *alone], expected)
    report = {
        "requests": len(results),
        "clients": given.clients,
        "kinds": dict(collections.Counter(result.kind for result in results)),
        "outcomes": dict(outcomes),
        "wrong": len(wrong),
        "served": served,
        "in_process": in_process,
        "before": before,
        "after": after,
        "left": left,
    }
    print(json.dumps(report))
    is_lost = len(results) != given.requests or sum(outcomes.values()) != given.requests
    grown_mib = after["resident_mib"] - before["resident_mib"]
    is_leaking = after["threads"] > before["threads"] or after["pool_threads"] > MOST_THREADS or any(left.values())
    if wrong or is_lost or is_leaking or grown_mib > MOST_GROWN_MIB:
        print(f"wrong: {wrong[:3]}, lost: {is_lost}, leaking: {is_leaking}, grown: {grown_mib} MiB", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
