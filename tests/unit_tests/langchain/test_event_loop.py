"""The event loop stands still for no part of a call: what a call prepares and reads runs in other threads."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import operator
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from langchain_core.tools import tool

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM
from langchain_quantllm.base.aside import run_aside, submit_aside
from langchain_quantllm.errors import GenerationError
from langchain_quantllm.loading.inputs import token_ids
from tests.support.models import forwards, llm_of, tiny_model, wait_for_rest

PROMPT = "The sea is"
PREPARES = ("/transformers/", "/tokenizers/", "/loading/", "/structured/", "engine/build.py", "engine/detokenizer.py")
"""Parts of the names of files that prepare a call, or read what the model wrote."""


@contextlib.contextmanager
def calls_here() -> Iterator[set[str]]:
    """Note the files of `PREPARES` whose functions are called in this thread."""
    seen: set[str] = set()

    def note(frame: Any, event: str, arg: Any) -> None:
        name = f"{frame.f_code.co_filename}: {frame.f_code.co_name}"
        if event == "call" and any(part in name for part in PREPARES):
            seen.add(name)

    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)


async def joined(stream: Any) -> Any:
    parts = [part async for part in stream]
    return functools.reduce(operator.add, parts)


@tool
def depth_of(place: str) -> int:
    """Return the depth of the sea at a place, in metres."""
    return len(place)


LLM_CALLS: dict[str, Callable[[Any], Any]] = {
    "ainvoke": lambda llm: llm.ainvoke(PROMPT),
    "ainvoke with logprobs": lambda llm: llm.ainvoke(PROMPT, logprobs=3),
    "agenerate": lambda llm: llm.agenerate([PROMPT, "Sea"], n=2, temperature=1.0, logprobs=1),
    "abatch": lambda llm: llm.abatch([PROMPT, "Sea"]),
    "abatch, return_exceptions": lambda llm: llm.abatch([PROMPT, "Sea"], return_exceptions=True),
    "astream": lambda llm: joined(llm.astream(PROMPT)),
    "astream of silent tokens": lambda llm: joined(llm.astream(PROMPT, stop=["<|im_end|>"])),
}
CHAT_CALLS: dict[str, Callable[[Any], Any]] = {
    "ainvoke": lambda chat: chat.ainvoke(PROMPT, logprobs=True),
    "astream": lambda chat: joined(chat.astream(PROMPT)),
    "abatch": lambda chat: chat.abatch([PROMPT, "Sea"]),
    "ainvoke with tools": lambda chat: chat.bind_tools([depth_of]).ainvoke(PROMPT),
    "astream with tools": lambda chat: joined(chat.bind_tools([depth_of], tool_choice="any").astream(PROMPT)),
}


@pytest.fixture(scope="module")
def loaded(short_smollm2: Path) -> QuantizedHuggingFaceLLM:
    """A model of which langchain-core's traces read nothing but fields."""
    llm = QuantizedHuggingFaceLLM(model_id=str(short_smollm2), dtype="float32", max_new_tokens=8, progress=False)
    llm.load().invoke(PROMPT)
    return llm


class TestTheLoopIsFree:
    @pytest.mark.parametrize("call", LLM_CALLS.values(), ids=LLM_CALLS)
    async def test_an_llm_s_call_prepares_and_reads_beside_the_loop(
        self, loaded: QuantizedHuggingFaceLLM, call: Callable[[Any], Any]
    ) -> None:
        with calls_here() as seen:
            assert await call(loaded)
        assert sorted(seen) == []

    @pytest.mark.parametrize("call", CHAT_CALLS.values(), ids=CHAT_CALLS)
    async def test_a_chat_model_s_call_prepares_and_reads_beside_the_loop(
        self, loaded: QuantizedHuggingFaceLLM, call: Callable[[Any], Any]
    ) -> None:
        chat = ChatQuantizedHuggingFace(llm=loaded, max_new_tokens=40)
        assert chat.get_num_tokens("x")
        with calls_here() as seen:
            assert await call(chat)
        seen = {name for name in seen if "/structured/" not in name}  # of bind_tools, which is no part of the call
        assert sorted(seen) == []

    async def test_a_model_is_loaded_beside_the_loop(self, short_smollm2: Path) -> None:
        llm = QuantizedHuggingFaceLLM(model_id=str(short_smollm2), max_new_tokens=2, progress=False, seed=8)
        with calls_here() as seen:
            assert await llm.ainvoke(PROMPT)
        assert sorted(seen) == []
        llm.unload()

    async def test_a_call_needs_no_thread_of_the_loop_s_own(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        """Functions that wait for a call may have taken them all."""
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        done = threading.Event()
        waiting = loop.run_in_executor(None, done.wait, 60)
        assert await asyncio.wait_for(tiny_llm.ainvoke(PROMPT), 50)
        done.set()
        assert await waiting

    async def test_context_variables_reach_the_other_thread(self) -> None:
        variable: ContextVar[str] = ContextVar("variable", default="none")
        variable.set("seen")
        assert await run_aside(lambda: (variable.get(), threading.current_thread() is threading.main_thread())) == (
            "seen",
            False,
        )

    def test_a_forked_process_has_threads_of_its_own(self) -> None:
        if sys.platform == "win32":
            pytest.skip("no fork on Windows")
        script = (
            "import asyncio, os\n"
            "from langchain_quantllm.base.aside import run_aside\n"
            "call = lambda: asyncio.run(asyncio.wait_for(run_aside(str, 1), 30))\n"
            "call()\n"
            "child = os.fork()\n"
            "if not child:\n"
            "    call()\n"
            "    os._exit(7)\n"
            "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        )
        subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def watched(tokenizer: Any, before: Callable[[], None]) -> Any:
    """Copy a tokenizer; `before` is called whenever it begins to encode."""

    class Watched(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            before()
            return super().__call__(*args, **kwargs)

    copied = copy.deepcopy(tokenizer)
    copied.__class__ = Watched
    return copied


class Gate:
    """A place in another thread that a test waits for, and lets go on."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.opened.wait(60)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 60)


class TestCancelling:
    @pytest.mark.parametrize("way", ["ainvoke", "astream", "chat"])
    async def test_a_task_cancelled_while_it_tokenizes_leaves_no_request(self, tokenizer: Any, way: str) -> None:
        gate = Gate()
        llm = llm_of(tiny_model(len(tokenizer)), watched(tokenizer, gate), max_new_tokens=3000)
        assert llm.engine_info.name == "fast"
        calls: dict[str, Callable[[], Any]] = {
            "ainvoke": lambda: llm.ainvoke(PROMPT),
            "astream": lambda: joined(llm.astream(PROMPT)),
            "chat": lambda: ChatQuantizedHuggingFace(llm=llm).ainvoke(PROMPT),
        }
        with forwards(llm) as seen:
            task = asyncio.create_task(calls[way]())
            await gate.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.opened.set()
            await run_aside(token_ids, llm.load()._loaded(), PROMPT)  # a later one has been through
            await asyncio.to_thread(wait_for_rest)
            assert seen.count == 0
        llm.unload()

    async def test_a_task_cancelled_while_it_submits_leaves_no_request(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        gate, streams = Gate(), []

        class Plan:
            def submit(self, *, in_pieces: bool) -> Any:
                streams.append(tiny_llm._plan([PROMPT], None, {"max_new_tokens": 3000}).submit(in_pieces=in_pieces))
                gate()
                return streams[0]

        task = asyncio.create_task(submit_aside(Plan))  # type: ignore[type-var]
        await gate.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()
        with pytest.raises(GenerationError, match="cancelled"):
            await asyncio.wait_for(joined(streams[0]), 60)


class TestThreadsThatTokenize:
    def test_two_threads_tokenize_at_once(self, tokenizer: Any) -> None:
        both = threading.Barrier(2)
        llm = llm_of(tiny_model(len(tokenizer)), watched(tokenizer, lambda: both.wait(60) and None))
        model = llm.load()._loaded()
        with ThreadPoolExecutor(2) as executor:
            found = list(executor.map(lambda text: token_ids(model, text), [PROMPT, "Sea"]))
        assert found == [tokenizer(PROMPT)["input_ids"], tokenizer("Sea")["input_ids"]]

    def test_a_tokenizer_with_padding_is_used_by_one_thread_at_once(self, tokenizer: Any) -> None:
        inside = most = 0

        def before() -> None:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            threading.Event().wait(0.02)  # so that another would come in
            inside -= 1

        own = watched(tokenizer, before)
        model = llm_of(tiny_model(len(tokenizer)), own).load()._loaded()
        own.backend_tokenizer.enable_padding()
        with ThreadPoolExecutor(2) as executor:
            first, second = executor.map(lambda _: token_ids(model, PROMPT), range(2))
        assert first == second == tokenizer(PROMPT)["input_ids"]
        assert most == 1

    def test_a_thread_that_tokenizes_holds_up_no_other_call(self, tokenizer: Any) -> None:
        """Not even one whose tokenizer serves one thread at once."""
        gate = Gate()
        own = watched(tokenizer, gate)
        llm = llm_of(tiny_model(len(tokenizer)), own, max_new_tokens=2)
        model = llm.load()._loaded()
        own.backend_tokenizer.enable_truncation(5)
        thread = threading.Thread(target=token_ids, args=(model, PROMPT))
        thread.start()
        assert gate.reached.wait(60)
        assert not model.tokenizer_lock.acquire(blocking=False)
        with ThreadPoolExecutor(1) as executor:
            assert executor.submit(lambda: llm.engine_info).result(60).name == "fast"
        gate.opened.set()
        thread.join(60)
