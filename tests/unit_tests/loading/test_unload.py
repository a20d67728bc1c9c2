"""Unloading frees the weights for all instances, which load them again at their next call."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from pathlib import Path

import psutil
import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import GenerationError
from tests.support.loading import PROMPT, is_gone, make_llm, model_of


def test_unload_frees_and_the_next_call_loads_again(fresh: Path, loads: list[str]) -> None:
    llm = make_llm(fresh, quantization="nf4")
    assert not llm.is_loaded
    llm.unload()  # no effect: it is not loaded
    text = llm.invoke(PROMPT)
    assert llm.is_loaded
    gone = weakref.ref(llm.pipeline.model)
    llm.unload()
    assert not llm.is_loaded
    assert not llm.is_loaded
    assert gone() is None  # at once: an idle engine's thread must not keep it
    llm.unload()
    assert llm.invoke(PROMPT) == text
    assert len(loads) == 2


def test_unload_takes_the_model_from_all_who_share_it(fresh: Path, loads: list[str]) -> None:
    one, two, three = (make_llm(fresh) for _ in range(3))
    text = one.invoke(PROMPT)
    assert two.invoke(PROMPT) == three.invoke(PROMPT) == text
    gone = weakref.ref(one.pipeline.model)
    one.unload()
    assert not two.is_loaded
    assert is_gone(gone, within_s=1), "instances that share the model hold its weights on"
    assert two.invoke(PROMPT) == text
    assert three.invoke(PROMPT) == text
    assert two.pipeline.model is three.pipeline.model
    assert len(loads) == 2


def test_unload_gives_memory_back(smollm2: Path) -> None:
    """SmolLM2 takes 538 MB in float32; at least two thirds of it must be released to the system."""
    process = psutil.Process(os.getpid())
    make_llm(smollm2, dtype="float32").load().unload()  # what the first load of all keeps is not counted
    gc.collect()
    before = process.memory_info().rss
    llm = make_llm(smollm2, dtype="float32").load()
    model_of(llm)(torch.tensor([[1, 2, 3]]))
    held = process.memory_info().rss - before
    llm.unload()
    freed = before + held - process.memory_info().rss
    assert held > 350 * 2**20
    assert freed > held * 2 / 3


def test_unload_while_generating_says_so(tiny: Path) -> None:
    llm = make_llm(tiny, max_new_tokens=200, ignore_eos=True)
    stream = llm.stream(PROMPT)
    next(stream)
    began = time.monotonic()
    llm.unload()
    assert time.monotonic() - began < 3  # at the next token, not at the end of the text
    with pytest.raises(GenerationError, match="unloaded while"):
        list(stream)
    assert llm.invoke(PROMPT, max_new_tokens=3)


def test_unload_by_another_thread_while_waiting(tiny: Path) -> None:
    llm, other = make_llm(tiny, max_new_tokens=200, ignore_eos=True), make_llm(tiny)
    llm.load()
    other.load()
    started = threading.Event()
    caught: list[BaseException] = []

    def work() -> None:
        try:
            for _ in llm.stream(PROMPT):
                started.set()
        except GenerationError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(10)
    other.unload()
    thread.join(10)
    assert not thread.is_alive()
    assert "unloaded while" in str(caught[0])


def test_threads_that_unload_and_call_at_once(tiny: Path) -> None:
    """Each call must return its text or raise GenerationError."""
    llms = [make_llm(tiny, max_new_tokens=4) for _ in range(3)]
    expected = llms[0].invoke(PROMPT)
    unexpected: list[BaseException] = []
    ended = threading.Semaphore(0)

    def call(llm: QuantizedHuggingFaceLLM) -> None:
        for _ in range(8):
            try:
                assert llm.invoke(PROMPT) == expected
            except GenerationError as error:
                assert "unloaded" in str(error)  # noqa: PT017
            except Exception as error:
                unexpected.append(error)
            ended.release()

    threads = [threading.Thread(target=call, args=(llm,)) for llm in llms for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        assert ended.acquire(timeout=60)
        llms[0].unload()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert unexpected == []


def test_an_engine_whose_model_was_unloaded_says_so(tiny: Path) -> None:
    llm = make_llm(tiny).load()
    engine, requests = llm._engine(), llm._plan([PROMPT], None, {}).requests
    llm.unload()
    with pytest.raises(GenerationError, match="unloaded"):
        engine.submit(requests)
