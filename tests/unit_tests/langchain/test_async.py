"""Event loops and threads: cancellation, several loops, many callers at once, and the engine's thread."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from typing import Any

import pytest
from langchain_core.exceptions import ModelTimeoutError

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import GenerationError
from tests.support.models import fail_at, forwards, llm_of, slowly, tiny_model, wait_for_rest, wait_until

PROMPT = "The sea is"
LONG = 4000


async def check_stopped(seen: Any, before: int) -> None:
    """Check that at most two forwards come after the end: the running one, and one begun meanwhile."""
    assert await asyncio.to_thread(seen.settle) <= before + 2  # the loop may have something to close meanwhile


class TestStopping:
    @pytest.mark.parametrize("way", ["ainvoke", "abatch", "abatch, return_exceptions", "astream"])
    async def test_cancelling_a_task_stops_the_model(self, tiny_llm: QuantizedHuggingFaceLLM, way: str) -> None:
        async def call() -> None:
            if way == "ainvoke":
                await tiny_llm.ainvoke(PROMPT, max_new_tokens=LONG)
            elif way == "astream":
                async for _ in tiny_llm.astream(PROMPT, max_new_tokens=LONG):
                    pass
            else:
                await tiny_llm.abatch([PROMPT] * 3, return_exceptions="return" in way, max_new_tokens=LONG)

        with forwards(tiny_llm, slowly()) as seen:
            task = asyncio.create_task(call())
            await asyncio.to_thread(seen.wait_for, 4)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await check_stopped(seen, seen.count)

    async def test_a_timeout_of_asyncio_stops_the_model(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        with forwards(tiny_llm, slowly()) as seen:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(tiny_llm.ainvoke(PROMPT, max_new_tokens=LONG), 0.2)
            await check_stopped(seen, seen.count)

    async def test_breaking_out_of_the_loop_stops_the_model(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        """Without aclose(), as people write it."""
        with forwards(tiny_llm, slowly()) as seen:
            async for _ in tiny_llm.astream(PROMPT, max_new_tokens=LONG):
                if seen.count > 3:
                    break
            await check_stopped(seen, seen.count)

    async def test_closing_the_stream_stops_the_model(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        with forwards(tiny_llm, slowly()) as seen:
            stream = tiny_llm.astream(PROMPT, max_new_tokens=LONG)
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
            await check_stopped(seen, seen.count)

    async def test_timeout_raises_and_stops_the_model(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        with forwards(tiny_llm, slowly()) as seen:
            with pytest.raises(ModelTimeoutError, match=r"timeout=0\.2 seconds"):
                await tiny_llm.ainvoke(PROMPT, max_new_tokens=LONG, timeout=0.2)
            with pytest.raises(ModelTimeoutError):
                _ = [text async for text in tiny_llm.astream(PROMPT, max_new_tokens=LONG, timeout=0.2)]
            await check_stopped(seen, seen.count)

    async def test_one_of_several_is_cancelled_and_the_others_end_well(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        expected = [tiny_llm.invoke(f"{PROMPT} {i}", max_new_tokens=30) for i in range(3)]
        with forwards(tiny_llm, slowly()) as seen:
            tasks = [asyncio.create_task(tiny_llm.ainvoke(f"{PROMPT} {i}", max_new_tokens=30)) for i in range(3)]
            await asyncio.to_thread(seen.wait_for, 4)
            tasks[1].cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[1], asyncio.CancelledError)
        assert [results[0], results[2]] == [expected[0], expected[2]]


class TestErrors:
    async def test_an_error_surfaces_at_once_with_its_cause(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        cause = ValueError("cosmic ray")
        expected = tiny_llm.invoke(PROMPT)

        async def read() -> list[str]:
            return [text async for text in tiny_llm.astream(PROMPT)]

        for call in (lambda: tiny_llm.ainvoke(PROMPT), read, lambda: tiny_llm.abatch([PROMPT] * 2)):
            began = time.monotonic()
            with forwards(tiny_llm, fail_at(3, cause)), pytest.raises(GenerationError, match="cosmic ray") as error:
                await call()
            assert error.value.__cause__ is cause
            assert time.monotonic() - began < 5
            assert await tiny_llm.ainvoke(PROMPT) == expected

    async def test_the_loop_stays_free_while_the_model_runs(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        longest = 0.0

        async def watch() -> None:
            nonlocal longest
            while True:
                began = time.monotonic()
                await asyncio.sleep(0.01)
                longest = max(longest, time.monotonic() - began)

        watching = asyncio.create_task(watch())
        with forwards(tiny_llm, slowly(0.3)):
            await tiny_llm.ainvoke(PROMPT, max_new_tokens=2)
        watching.cancel()
        assert longest < 0.29  # a loop blocked by a forward would stand still for 0.3 s


class TestManyCallers:
    def test_threads_and_event_loops_at_once(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        """Six threads that invoke, stream and batch, and four event loops, each with three tasks."""
        prompts = [f"Number {i} is" for i in range(6)]
        options = [{"max_new_tokens": 5}, {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}]
        expected = {(p, i): tiny_llm.invoke(p, **o) for p in prompts for i, o in enumerate(options)}
        wrong: list[Any] = []
        finished = 0
        lock = threading.Lock()

        def check(prompt: str, i: int, text: str) -> None:
            nonlocal finished
            with lock:
                finished += 1
                if text != expected[prompt, i]:
                    wrong.append((prompt, i, text))

        def in_thread(number: int) -> None:
            for i, o in enumerate(options):
                prompt = prompts[number]
                check(prompt, i, tiny_llm.invoke(prompt, **o))
                check(prompt, i, "".join(tiny_llm.stream(prompt, **o)))
                for p, text in zip(prompts, tiny_llm.batch(prompts, **o), strict=True):
                    check(p, i, text)

        async def one(prompt: str, i: int) -> None:
            check(prompt, i, await tiny_llm.ainvoke(prompt, **options[i]))
            check(prompt, i, "".join([t async for t in tiny_llm.astream(prompt, **options[i])]))

        async def tasks() -> None:
            await asyncio.gather(*(one(prompts[n], n % 2) for n in range(3)))

        threads = [threading.Thread(target=in_thread, args=(n,)) for n in range(6)]
        threads += [threading.Thread(target=lambda: asyncio.run(tasks())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []
        assert finished == 6 * 2 * 8 + 4 * 3 * 2

    def test_one_event_loop_after_another(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        """A notebook's cells and asyncio.run make a new loop each time."""
        assert len({asyncio.run(tiny_llm.ainvoke(PROMPT)) for _ in range(3)}) == 1

    async def test_a_sync_call_inside_a_loop_works(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        assert tiny_llm.invoke(PROMPT) == await tiny_llm.ainvoke(PROMPT)

    async def test_tasks_become_one_batch(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        llm = QuantizedHuggingFaceLLM(pipeline=tiny_llm.pipeline, engine="pipeline")
        prompts = [f"The sea is {i}" for i in range(8)]
        expected = [llm.invoke(prompt, max_new_tokens=4) for prompt in prompts]
        with forwards(llm) as seen:
            texts = await asyncio.gather(*(llm.ainvoke(prompt, max_new_tokens=4) for prompt in prompts))
        assert texts == expected
        assert len(seen.prefills) <= 3  # one, or a few if the machine delays a loop

    async def test_tasks_join_the_running_batch(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        """In the fast engine, which begins without waiting for others."""
        llm = QuantizedHuggingFaceLLM(pipeline=tiny_llm.pipeline, engine="fast", max_new_tokens=12)
        prompts = [f"The sea is {i}" for i in range(8)]
        expected = [llm.invoke(prompt) for prompt in prompts]
        with forwards(llm, slowly(0.02)) as seen:
            texts = await asyncio.gather(*(llm.ainvoke(prompt) for prompt in prompts))
        assert texts == expected
        assert (1, 8) in seen.shapes[-8:]  # one token of each
        assert seen.count < 8 * 12 / 2  # 96 one by one, 12 at best


class TestThread:
    def test_the_engine_s_thread_sleeps_without_work_and_serves_the_next_call(self, tokenizer: Any) -> None:
        before = set(threading.enumerate())

        def mine() -> list[threading.Thread]:
            return [thread for thread in threading.enumerate() if thread not in before]

        llm = llm_of(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=2)
        llm.load()
        assert mine() == []
        text = llm.invoke(PROMPT)
        (thread,) = mine()
        assert thread.name == "quantllm-engine"
        assert thread.daemon
        wait_for_rest()
        used = time.process_time()
        time.sleep(0.3)  # the observed time
        assert time.process_time() - used < 0.06  # a thread that polls or spins takes more
        assert llm.invoke(PROMPT) == text
        assert mine() == [thread]

    def test_the_engine_s_thread_ends_with_the_last_instance(self, tokenizer: Any) -> None:
        before = set(threading.enumerate())
        llm = llm_of(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=2)
        llm.invoke(PROMPT)
        (thread,) = [thread for thread in threading.enumerate() if thread not in before]
        del llm
        gc.collect()
        thread.join(5)
        assert not thread.is_alive()

    def test_the_engine_s_thread_ends_with_unload(self, tokenizer: Any) -> None:
        llm = llm_of(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=2)
        llm.invoke(PROMPT)
        thread = llm._engine()._worker._thread  # type: ignore[attr-defined]
        assert thread is not None
        llm.unload()
        assert not thread.is_alive()

    def test_the_last_reference_frees_the_model_though_the_thread_idles(self, tokenizer: Any) -> None:
        llm = llm_of(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=2)
        llm.invoke(PROMPT)
        gone = weakref.ref(llm.pipeline.model)
        del llm
        wait_until(lambda: gc.collect() is not None and gone() is None, 2.0)  # far less than the thread's idle time
