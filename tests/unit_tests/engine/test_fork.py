"""A process forked off one with a loaded model: every call says so at once, whatever lock was held at that moment."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM, estimate_memory
from langchain_quantllm.engine import worker
from langchain_quantllm.loading import handles
from langchain_quantllm.memory import estimate
from tests.support.checkpoints import make_checkpoint, run_python
from tests.support.engine import plan
from tests.support.models import forwards, slowly, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows forks no processes")


def in_fork(call: Callable[[], Any]) -> str:
    """Run a call in a forked process; return its result or error as a text, or that it hung."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        try:
            answer = repr(call())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return "it hung" if os.WIFSIGNALED(status) else answer


@contextlib.contextmanager
def held(*locks: Any) -> Iterator[None]:
    """Hold locks in another thread, as one that was at work when the process forked."""
    has_all, release = threading.Event(), threading.Event()

    def hold() -> None:
        with contextlib.ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            has_all.set()
            release.wait(60)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert has_all.wait(10)
    try:
        yield
    finally:
        release.set()
        thread.join()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QuantizedHuggingFaceLLM]:
    folder = make_checkpoint(tmp_path_factory.mktemp("model"), dtype="float32")
    llm = QuantizedHuggingFaceLLM(model_id=str(folder), engine="fast", max_new_tokens=4, progress=False).load()
    assert llm.engine_info.name == "fast"
    yield llm
    llm.unload()


@pytest.fixture
def busy(loaded: QuantizedHuggingFaceLLM) -> Iterator[tuple[QuantizedHuggingFaceLLM, Any]]:
    """The model with an open stream, while another thread holds all locks."""
    model: Any = loaded._model
    engine = loaded._engine()
    with forwards(loaded, slowly(0.001)):
        stream = engine.submit(plan(loaded, [5, 6, 7], max_new_tokens=100))
        reader = iter(stream)
        next(reader)
        locks = [
            model.lock,
            model.handle._lock,
            handles._lock,
            model.engines._lock,
            engine._worker._changed,  # type: ignore[attr-defined]
            stream._changed,
            estimate._build_lock,
        ]
        with held(*locks):
            yield loaded, (stream, reader)
        stream.close()


def other(llm: QuantizedHuggingFaceLLM, **fields: Any) -> QuantizedHuggingFaceLLM:
    """Make another object, which has no model yet."""
    return QuantizedHuggingFaceLLM(**{"model_id": llm.model_id, "progress": False, **fields})


CALLS: dict[str, Callable[[QuantizedHuggingFaceLLM], Any]] = {
    "invoke": lambda llm: llm.invoke("Sea"),
    "stream": lambda llm: list(llm.stream("Sea")),
    "batch": lambda llm: llm.batch(["Sea", "Sky"]),
    "ainvoke": lambda llm: asyncio.run(llm.ainvoke("Sea")),
    "load": lambda llm: llm.load(),
    "unload": lambda llm: llm.unload(),
    "engine_info": lambda llm: llm.engine_info,
    "pipeline": lambda llm: llm.pipeline,
    "memory_report": lambda llm: llm.memory_report(),
    "get_num_tokens": lambda llm: llm.get_num_tokens("Sea"),
    "chat": lambda llm: ChatQuantizedHuggingFace(model_id=llm.model_id).invoke("Sea"),
    "another object": lambda llm: other(llm).invoke("Sea"),
    "another scheme": lambda llm: other(llm, quantization="nf4").load(),
    "another model": lambda llm: other(llm, model_id=llm.model_id + "/../other").load(),
}


class TestForkedProcess:
    @pytest.mark.parametrize("call", CALLS)
    def test_a_call_is_told_that_the_process_was_forked(
        self, busy: tuple[QuantizedHuggingFaceLLM, Any], call: str
    ) -> None:
        answer = in_fork(lambda: CALLS[call](busy[0]))
        assert answer.startswith("UnsupportedError: this model was loaded before the process was forked")

    def test_a_stream_of_the_parent_is_told_too(self, busy: tuple[QuantizedHuggingFaceLLM, Any]) -> None:
        _, (_, reader) = busy
        assert in_fork(lambda: next(reader)).startswith("UnsupportedError: this model was loaded before")

    def test_an_async_reader_of_a_stream_of_the_parent_is_told_too(
        self, busy: tuple[QuantizedHuggingFaceLLM, Any]
    ) -> None:
        _, (stream, _) = busy

        async def read() -> None:
            async for _ in stream:
                pass

        assert in_fork(lambda: asyncio.run(read())).startswith("UnsupportedError: this model was loaded before")

    def test_what_runs_without_a_call_waits_for_no_lock(self, busy: tuple[QuantizedHuggingFaceLLM, Any]) -> None:
        """Closing streams, dropping the model, and the end of the process."""
        llm, (stream, _) = busy

        def end() -> str:
            stream.close()
            model: Any = llm._model
            llm._model = None
            for engine in model.engines._fast.values():
                engine._worker.close("the model was dropped.")
            model.engines = engine = None
            del model
            gc.collect()
            worker._close_all()
            return "ended"

        assert in_fork(end) == "'ended'"

    def test_memory_can_be_estimated(self, busy: tuple[QuantizedHuggingFaceLLM, Any]) -> None:
        llm, _ = busy
        assert in_fork(lambda: estimate_memory(llm.model_id).bytes_16bit > 0) == "True"

    def test_the_parent_goes_on(self, loaded: QuantizedHuggingFaceLLM) -> None:
        expected = loaded.invoke("Sea")
        assert in_fork(lambda: loaded.invoke("Sea")).startswith("UnsupportedError")
        assert loaded.invoke("Sea") == expected

    def test_a_thread_that_tokenizes_a_long_prompt_does_not_hold_the_child_up(
        self, loaded: QuantizedHuggingFaceLLM
    ) -> None:
        model: Any = loaded._model
        thread = threading.Thread(
            target=lambda: loaded.invoke("the quick brown fox. " * 40000, truncation=True), daemon=True
        )
        thread.start()
        wait_until(lambda: not thread.is_alive() or not model.lock.acquire(blocking=False) or model.lock.release())
        assert in_fork(lambda: loaded.invoke("Sea")).startswith("UnsupportedError")
        thread.join()

    @pytest.mark.slow
    def test_processes_forked_before_the_first_model_load_their_own_and_end(self, tmp_path: Path) -> None:
        make_checkpoint(tmp_path, dtype="float32")
        code = """
import os, sys
from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM, estimate_memory
estimate_memory(sys.argv[1])
children = [os.fork() for _ in range(1)]
llm = QuantizedHuggingFaceLLM(model_id=sys.argv[1], max_new_tokens=4, progress=False)
text = llm.invoke("Sea")
if children == [0]:
    sys.exit(0 if text else 1)  # by the interpreter's own end
assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
child = os.fork()
if child == 0:
    sys.exit(3)  # by the interpreter's own end, with an inherited model
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
assert llm.invoke("Sea") == text
print("done")
"""
        assert run_python(code, tmp_path).stdout.strip().endswith("done")
