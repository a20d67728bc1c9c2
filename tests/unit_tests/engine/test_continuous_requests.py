"""Requests to the fast engine: wrong ones, cancelled ones, failures, and several callers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.request import Request
from langchain_quantllm.errors import GenerationError, GenerationTimeoutError, InvalidOptionError, PromptTooLongError
from langchain_quantllm.options import GenerationOptions
from tests.support.checkpoints import run_python
from tests.support.engine import ONE_SEQUENCE, Background, MakeLLM, ask, ids_after, ids_of, on_pipeline, plan
from tests.support.families import likeliest_ids
from tests.support.models import fail_at, forwards, greedy_text, llm_of, slowly, tiny_model, wait_for_rest, wait_until

pytestmark = pytest.mark.usefixtures("one_thread")


class TestWrongRequests:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"prompt_ids": ()},
            {"prompt_ids": (5, -1)},
            {"prompt_ids": (49152,)},
            {"prompt_ids": (10**12,)},
            {"eos_token_ids": (49152,)},
            {"stop_token_ids": (-3,)},
            {"max_new_tokens": 10**6},
            {"options": GenerationOptions(extra={"num_beams": 2})},
        ],
        ids=str,
    )
    def test_wrong_requests_are_refused_alone(self, tiny: QuantizedHuggingFaceLLM, wrong: dict[str, Any]) -> None:
        good = plan(tiny, ids_of(6))[0]
        expected = ask(tiny, [good])[0].token_ids
        engine = tiny._engine()
        with (
            Background(lambda: ask(tiny, [good])) as other,
            pytest.raises((InvalidOptionError, PromptTooLongError)),
        ):
            engine.submit([good, replace(good, **wrong)])
        assert other.result[0].token_ids == expected
        assert ask(tiny, [good])[0].token_ids == expected
        wait_until(lambda: engine._blocks.held == 0)

    def test_a_text_ends_where_the_context_is_full(self, tokenizer: Any) -> None:
        llm = llm_of(tiny_model(len(tokenizer), context_tokens=64), tokenizer)
        found = ids_after(llm, ids_of(50), max_new_tokens=100)
        assert len(found) == 14
        assert found == likeliest_ids(llm.pipeline.model, ids_of(50), found)
        with pytest.raises(PromptTooLongError):
            ids_after(llm, ids_of(64))


class TestCancelling:
    def test_closing_a_stream_frees_its_blocks_at_once(self, tiny: QuantizedHuggingFaceLLM) -> None:
        engine: Any = tiny._engine()
        with forwards(tiny, slowly(0.003)) as seen:
            stream = engine.submit(plan(tiny, ids_of(40), max_new_tokens=2000))
            next(iter(stream))
            assert engine._blocks.held >= 3
            stream.close()
            count = seen.count
            wait_until(lambda: engine._blocks.held == 0, 1.0)
            assert seen.settle() <= count + 2  # the forward that ran, and one begun before the next look
        assert len(ids_after(tiny, ids_of(40))) == 12

    def test_closing_streams_leaves_other_requests_alone(self, tiny: QuantizedHuggingFaceLLM) -> None:
        engine: Any = tiny._engine()
        expected = ids_after(tiny, ids_of(10), max_new_tokens=60)
        with (
            forwards(tiny, slowly(0.002)) as seen,
            Background(lambda: ids_after(tiny, ids_of(10), max_new_tokens=60)) as other,
        ):
            seen.wait_for(2)
            streams = [engine.submit(plan(tiny, ids_of(200 + i), max_new_tokens=900)) for i in range(6)]
            seen.wait_for(12)
            for stream in streams:
                stream.close()
            wait_until(lambda: engine._blocks.held <= 5, 2.0)
        assert other.result == expected

    def test_breaking_off_a_langchain_stream_frees_its_blocks(self, tiny: QuantizedHuggingFaceLLM) -> None:
        engine: Any = tiny._engine()
        for _ in tiny.stream("Sea", max_new_tokens=3000):
            break
        wait_until(lambda: engine._blocks.held == 0, 5.0)

    def test_a_timeout_frees_its_blocks(self, tiny: QuantizedHuggingFaceLLM) -> None:
        engine: Any = tiny._engine()
        with forwards(tiny, slowly(0.01)), pytest.raises(GenerationTimeoutError):
            tiny.invoke("Sea", max_new_tokens=3000, timeout=0.1)
        wait_until(lambda: engine._blocks.held == 0, 5.0)


class TestFailures:
    @pytest.mark.parametrize("number", [1, 4])
    def test_a_failing_forward_fails_the_running_requests_only(
        self, tiny: QuantizedHuggingFaceLLM, number: int
    ) -> None:
        expected = ids_after(tiny, ids_of(9))
        error = RuntimeError("the device is on fire")
        requests = [plan(tiny, ids_of(9))[0], plan(tiny, ids_of(30))[0]]
        with forwards(tiny, fail_at(number, error)):
            streams = [tiny._engine().submit([request]) for request in requests]
            for stream in streams:
                with pytest.raises(GenerationError, match="on fire") as caught:
                    list(stream)
                assert caught.value.__cause__ is error
            assert ids_after(tiny, ids_of(9)) == expected
        assert tiny._engine()._blocks.held == 0

    @pytest.fixture
    def spoiled(self, tokenizer: Any) -> Iterator[tuple[QuantizedHuggingFaceLLM, Request]]:
        """An LLM that knows no numbers for one token, and a request with that token in its prompt."""
        model = tiny_model(len(tokenizer))
        with torch.no_grad():
            model.get_input_embeddings().weight[7] = torch.nan
        llm = llm_of(model, tokenizer, kv_cache_memory=4 * ONE_SEQUENCE, prefix_caching=False)
        assert llm.engine_info.name == "fast"
        yield llm, plan(llm, [*ids_of(20), 7], max_new_tokens=30)[0]
        llm.unload()

    def test_nan_logits_fail_their_request_alone(self, spoiled: tuple[QuantizedHuggingFaceLLM, Request]) -> None:
        llm, bad = spoiled
        expected = ids_after(llm, ids_of(3), max_new_tokens=30)
        with (
            forwards(llm, slowly(0.002)) as seen,
            Background(lambda: ids_after(llm, ids_of(3), max_new_tokens=30)) as other,
        ):
            seen.wait_for(5)
            with pytest.raises(GenerationError, match="not numbers"):
                ask(llm, [bad])
        assert other.result == expected

    def test_nan_does_not_spread_to_later_requests_on_the_same_blocks(
        self, spoiled: tuple[QuantizedHuggingFaceLLM, Request]
    ) -> None:
        """Masked values are multiplied by 0, and 0 times NaN is NaN."""
        llm, bad = spoiled
        expected = [ids_after(llm, ids_of(count), max_new_tokens=30) for count in (3, 40)]
        for _ in range(3):
            with pytest.raises(GenerationError, match="not numbers"):
                ask(llm, [bad])
            answers = ask(llm, [plan(llm, ids_of(count), max_new_tokens=30)[0] for count in (3, 40)])
            assert [answer.token_ids for answer in answers] == expected

    def test_unloading_fails_running_requests_and_loads_again_later(self, tmp_path: Path, tokenizer: Any) -> None:
        tiny_model(len(tokenizer)).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        llm = QuantizedHuggingFaceLLM(model_id=str(tmp_path), max_new_tokens=12, progress=False)
        expected = llm.invoke("Sea")
        assert llm.engine_info.name == "fast"
        engine: Any = llm._engine()
        stream = llm.stream("Sea", max_new_tokens=5000)
        next(stream)
        llm.unload()
        assert not engine.kv_resident_bytes  # as a report finds it that is made meanwhile
        with pytest.raises(GenerationError, match="unloaded"):
            list(stream)
        assert llm.invoke("Sea") == expected
        llm.unload()

    def test_unloading_leaves_the_user_s_own_pipeline_usable(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        expected = llm.invoke("Sea")
        llm.unload()
        assert greedy_text(llm, "Sea") == expected
        assert llm.invoke("Sea") == expected

    @pytest.mark.slow
    def test_a_forked_process_gets_an_error(self, tmp_path: Path, tokenizer: Any) -> None:
        tiny_model(len(tokenizer)).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        code = """
import os, sys
from langchain_quantllm import QuantizedHuggingFaceLLM
llm = QuantizedHuggingFaceLLM(model_id=sys.argv[1], max_new_tokens=4, progress=False)
text = llm.invoke("Sea")
assert llm.engine_info.name == "fast"
stream = llm.stream("Sea", max_new_tokens=2000)
next(stream)
child = os.fork()
if child == 0:
    try:
        llm.invoke("Sea")
        os._exit(7)
    except Exception as error:
        os._exit(0 if "forked" in str(error) else 8)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
next(stream)
stream.close()
assert llm.invoke("Sea") == text
print("done")
"""
        assert run_python(code, tmp_path).stdout.strip().endswith("done")


class TestCallers:
    def test_two_objects_over_one_model_share_one_batch(self, tiny: QuantizedHuggingFaceLLM) -> None:
        other = QuantizedHuggingFaceLLM(pipeline=tiny.pipeline, max_new_tokens=30)
        assert other._engine() is tiny._engine()
        expected = [ids_after(tiny, ids_of(5), max_new_tokens=30), ids_after(other, ids_of(6), max_new_tokens=30)]
        with (
            forwards(tiny, slowly(0.003)) as seen,
            Background(lambda: ids_after(tiny, ids_of(5), max_new_tokens=30)) as one,
        ):
            seen.wait_for(3)
            assert ids_after(other, ids_of(6), max_new_tokens=30) == expected[1]
        assert one.result == expected[0]
        assert seen.count < 45  # 60 one after another

    def test_the_thread_is_idle_without_work(self, tiny: QuantizedHuggingFaceLLM) -> None:
        tiny.invoke("Sea")
        wait_for_rest()
        began = time.process_time()
        time.sleep(0.5)  # the time in which it is watched
        assert time.process_time() - began < 0.025

    def test_engine_info_of_the_fast_engine(self, tiny: QuantizedHuggingFaceLLM) -> None:
        info, engine = tiny.engine_info, tiny._engine()
        assert (info.name, info.graphs) == ("fast", False)
        assert info.reason == "one running batch over KV cache blocks"
        assert info.kv_cache_tokens == engine.limits.cache_tokens
        assert info.kv_cache_tokens is not None
        assert info.kv_cache_tokens >= 8192  # the whole context
        assert info.kv_cache_bytes is not None
        assert 0 <= info.kv_cache_bytes - 512 * info.kv_cache_tokens <= 512 * BLOCK_TOKENS

    def test_engine_info_of_the_pipeline_engine(self, tiny: QuantizedHuggingFaceLLM) -> None:
        info = on_pipeline(tiny).engine_info
        assert (info.name, info.kv_cache_tokens) == ("pipeline", None)
        assert "asked for" in info.reason

    @pytest.mark.parametrize("engine", ["bogus", "", "Fast"])
    def test_an_unknown_engine_is_an_error(self, tiny: QuantizedHuggingFaceLLM, engine: str) -> None:
        with pytest.raises(InvalidOptionError, match="'auto', 'fast', 'pipeline'"):
            QuantizedHuggingFaceLLM(pipeline=tiny.pipeline, engine=engine)


def test_an_engine_can_be_closed_twice(make_tiny: MakeLLM) -> None:
    llm = make_tiny()
    engine, requests = llm._engine(), plan(llm, ids_of(4))
    engine.close()
    engine.close()
    with pytest.raises(GenerationError, match="unloaded"):
        engine.submit(requests)
