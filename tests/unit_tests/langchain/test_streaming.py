"""Streams on real models: pieces come as soon as they are certain, errors at once, and an unread stream stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from langchain_core.exceptions import ModelTimeoutError

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import GenerationError, QuantLLMError
from tests.support.models import (
    byte_fallback_tokenizer,
    fail_at,
    forwards,
    llm_of,
    scripted_model,
    slowly,
    tiny_model,
    wait_until,
)

PROMPT = "The sea is"
LONG = 4000
"""More new tokens than any test waits for."""


@pytest.mark.compat
class TestPieces:
    def test_the_first_chunk_comes_before_the_third_forward(self, llm: QuantizedHuggingFaceLLM) -> None:
        assert llm.engine_info.name == "fast"  # its check of the model is done by now
        with forwards(llm, slowly(0.02)) as seen:
            stream = llm.stream("The capital of France is")
            assert next(stream) == " Paris"
            assert seen.count < 3
            stream.close()

    def test_pieces_come_one_by_one_while_the_model_runs(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        with forwards(tiny_llm, slowly(0.02)) as seen:
            at = [seen.count for _ in tiny_llm.stream(PROMPT, max_new_tokens=10)]
        assert len(at) >= 8  # of 10 tokens, of which some may be parts of characters
        assert at[-1] - at[0] >= 7
        assert at == sorted(at)

    @pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
    def test_text_without_spaces_comes_character_by_character(self, tokenizer: Any, kind: str) -> None:
        text = "吾輩は猫である。名前はまだ無い。🍣と𠮷野家"
        if kind == "byte-fallback":
            tokenizer = byte_fallback_tokenizer()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = "日本"
        vocab = len(tokenizer) if kind == "byte-level" else 320
        model = scripted_model(vocab, ids, len(tokenizer(prompt)["input_ids"]), context_tokens=128)
        llm = llm_of(model, tokenizer, max_new_tokens=len(ids))
        pieces = list(llm.stream(prompt))
        assert "".join(pieces).strip() == text
        assert llm.invoke(prompt) == "".join(pieces)
        assert not any("\ufffd" in piece for piece in pieces)
        assert max(len(piece.strip()) for piece in pieces) <= 3
        assert sum(piece == "" for piece in pieces) <= 1  # the last may carry the finish reason alone

    @pytest.mark.parametrize("tokens", range(1, 9))
    def test_a_text_cut_inside_a_character_ends_as_decode_gives_it(self, tokenizer: Any, tokens: int) -> None:
        ids = tokenizer("𠮷🍣𠮷🍣", add_special_tokens=False)["input_ids"]
        model = scripted_model(len(tokenizer), ids, 1, context_tokens=64)
        llm = llm_of(model, tokenizer, max_new_tokens=tokens)
        expected = tokenizer.decode(ids[:tokens])
        assert llm.invoke("x") == "".join(llm.stream("x")) == expected

    def test_no_flood_of_empty_pieces(self, tiny_llm: QuantizedHuggingFaceLLM, tokenizer: Any) -> None:
        for options in ({}, {"stop": ["zzz"]}, {"temperature": 1.0, "seed": 1}, {"logprobs": True}):
            pieces = list(tiny_llm.stream(PROMPT, max_new_tokens=40, **options))
            assert sum(piece == "" for piece in pieces) <= 1

    def test_logprobs_stream_with_their_pieces(self, tiny_llm: QuantizedHuggingFaceLLM, tokenizer: Any) -> None:
        chunks = list(tiny_llm._stream(PROMPT, logprobs=1, max_new_tokens=12))
        contents = [(chunk.generation_info or {}).get("logprobs", {}).get("content", []) for chunk in chunks]
        (whole,) = tiny_llm.generate([PROMPT], logprobs=1, max_new_tokens=12).generations[0]
        assert whole.generation_info is not None
        assert [entry for content in contents for entry in content] == whole.generation_info["logprobs"]["content"]
        assert [c.generation_info for c in chunks][-1]["usage_metadata"]["output_tokens"] == 12  # type: ignore[index]
        assert sum("usage_metadata" in (c.generation_info or {}) for c in chunks) == 1


class TestStopping:
    """The model stops soon after its stream is not read any more."""

    def check_stopped(self, seen: Any, before: int) -> None:
        """Check that at most two forwards come after the end: the running one, and one begun meanwhile."""
        assert seen.settle() <= before + 2

    def test_closing_a_stream_stops_the_model(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        with forwards(tiny_llm, slowly()) as seen:
            stream = tiny_llm.stream(PROMPT, max_new_tokens=LONG)
            for _ in range(3):
                next(stream)
            stream.close()
            self.check_stopped(seen, seen.count)

    def test_breaking_out_of_the_loop_stops_the_model(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        with forwards(tiny_llm, slowly()) as seen:
            for number, _ in enumerate(tiny_llm.stream(PROMPT, max_new_tokens=LONG)):
                if number == 3:
                    break
            self.check_stopped(seen, seen.count)

    def test_an_error_in_the_loop_stops_the_model(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        def read() -> None:
            for _ in tiny_llm.stream(PROMPT, max_new_tokens=LONG):
                raise KeyError

        with forwards(tiny_llm, slowly()) as seen:
            with pytest.raises(KeyError):
                read()
            self.check_stopped(seen, seen.count)

    def test_closing_the_stream_of_a_chain_stops_the_model(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        from langchain_core.output_parsers import StrOutputParser
        from langchain_core.prompts import PromptTemplate

        chain = PromptTemplate.from_template("The {x} is") | tiny_llm | StrOutputParser()
        with forwards(tiny_llm, slowly()) as seen:
            stream = chain.stream({"x": "sea"}, max_new_tokens=LONG)
            next(stream)
            stream.close()  # type: ignore[attr-defined]
            self.check_stopped(seen, seen.count)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
    @pytest.mark.compat
    def test_timeout_raises_and_stops_the_model(
        self, tiny_llm: QuantizedHuggingFaceLLM, options: dict[str, Any]
    ) -> None:
        with forwards(tiny_llm, slowly()) as seen:
            began = time.monotonic()
            with pytest.raises(ModelTimeoutError, match=r"timeout=0\.3 seconds") as error:
                tiny_llm.invoke(PROMPT, max_new_tokens=LONG, timeout=0.3, **options)
            assert isinstance(error.value, QuantLLMError)
            assert isinstance(error.value, TimeoutError)
            assert time.monotonic() - began < 2
            self.check_stopped(seen, seen.count)

    def test_timeout_holds_for_streams_and_as_a_field(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        llm = QuantizedHuggingFaceLLM(pipeline=tiny_llm.pipeline, timeout=0.3, max_new_tokens=LONG)
        with forwards(tiny_llm, slowly()) as seen:
            with pytest.raises(ModelTimeoutError):
                list(llm.stream(PROMPT))
            self.check_stopped(seen, seen.count)
        assert llm.invoke(PROMPT, max_new_tokens=2, timeout=60) == tiny_llm.invoke(PROMPT, max_new_tokens=2)

    def test_a_request_that_waits_times_out_without_harm_to_the_one_that_runs(
        self, tiny_llm: QuantizedHuggingFaceLLM
    ) -> None:
        expected = tiny_llm.invoke(PROMPT, max_new_tokens=60)
        texts: list[str] = []
        with forwards(tiny_llm, slowly()) as seen:
            thread = threading.Thread(target=lambda: texts.append(tiny_llm.invoke(PROMPT, max_new_tokens=60)))
            thread.start()
            seen.wait_for(3)
            with pytest.raises(ModelTimeoutError):
                tiny_llm.invoke("Another", max_new_tokens=LONG, timeout=0.1)
            thread.join(20)
        assert texts == [expected]

    @pytest.mark.parametrize("name", ["fast", "pipeline"])
    def test_others_in_the_batch_run_on(self, tiny_llm: QuantizedHuggingFaceLLM, name: str) -> None:
        """One stream of a batch is closed, the other is read to its end."""
        llm = QuantizedHuggingFaceLLM(pipeline=tiny_llm.pipeline, engine=name)
        engine = llm._engine()
        options = llm._options(None, {"max_new_tokens": 40})
        (request,) = llm._requests(PROMPT, options)
        with forwards(llm, slowly()) as seen:
            one, two = engine.submit([request]), engine.submit([request])
            next(iter(one))
            if name == "fast":
                seen.wait_for(4)  # both decode in one batch by then
            one.close()
            text = "".join(chunk.text for chunk in two)
            if name == "fast":  # a sequence without a reader leaves the batch
                assert (1, 2) in seen.shapes
                assert seen.shapes[-20:] == [(1, 1)] * 20
                assert seen.count <= 41
            else:
                assert seen.rows == [2] * 40
        assert text == llm.invoke(PROMPT, max_new_tokens=40)

    def test_unloading_ends_what_runs_with_a_reason(self, tokenizer: Any) -> None:
        llm = llm_of(tiny_model(len(tokenizer)), tokenizer)
        with forwards(llm, slowly()) as seen:
            stream = llm.stream(PROMPT, max_new_tokens=LONG)
            next(stream)
            llm.unload()
            with pytest.raises(GenerationError, match="unloaded"):
                list(stream)
            self.check_stopped(seen, seen.count)
        assert llm.invoke(PROMPT, max_new_tokens=2)  # a pipeline of one's own stays usable


class TestErrors:
    CAUSE = ValueError("cosmic ray")

    @pytest.mark.parametrize("number", [1, 4])
    def test_an_error_surfaces_at_once_with_its_cause(self, tiny_llm: QuantizedHuggingFaceLLM, number: int) -> None:
        for call in (tiny_llm.invoke, lambda p: list(tiny_llm.stream(p)), lambda p: tiny_llm.batch([p, p])):
            began = time.monotonic()
            with forwards(tiny_llm, fail_at(number, self.CAUSE)) as seen:
                with pytest.raises(GenerationError, match="cosmic ray") as error:
                    call(PROMPT)
                assert seen.count == number
            assert error.value.__cause__ is self.CAUSE
            assert time.monotonic() - began < 5

    def test_pieces_before_the_error_still_come(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        whole = list(tiny_llm.stream(PROMPT))
        with forwards(tiny_llm, fail_at(4, self.CAUSE)):
            stream = tiny_llm.stream(PROMPT)
            assert [next(stream) for _ in range(3)] == whole[:3]
            with pytest.raises(GenerationError):
                next(stream)

    def test_the_next_call_after_an_error_works(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        expected = tiny_llm.invoke(PROMPT)
        with forwards(tiny_llm, fail_at(2, self.CAUSE)), pytest.raises(GenerationError):
            tiny_llm.invoke(PROMPT)
        assert tiny_llm.invoke(PROMPT) == expected

    def test_requests_that_wait_behind_the_error_are_served(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        expected = tiny_llm.invoke("Another")
        texts: list[str] = []
        thread = threading.Thread(target=lambda: texts.append(tiny_llm.invoke("Another")))

        def before(count: int) -> None:
            if count == 2:
                thread.start()
                wait_until(lambda: tiny_llm._engine()._worker._waiting)  # type: ignore[attr-defined]
                raise self.CAUSE

        with forwards(tiny_llm, before):
            with pytest.raises(GenerationError):
                tiny_llm.invoke(PROMPT)
            thread.join(20)
        assert texts == [expected]

    def test_out_of_memory_says_what_to_do(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        import torch

        full = fail_at(1, torch.OutOfMemoryError("CUDA out of memory"))
        with forwards(tiny_llm, full), pytest.raises(MemoryError, match="lower batch_size") as error:
            tiny_llm.invoke(PROMPT)
        assert isinstance(error.value, QuantLLMError)

    def test_an_error_in_a_callback_is_the_caller_s_own(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        from langchain_core.callbacks import BaseCallbackHandler

        class Picky(BaseCallbackHandler):
            raise_error = True

            def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
                raise LookupError(token)

        with forwards(tiny_llm, slowly()) as seen:
            with pytest.raises(LookupError):
                list(tiny_llm.stream(PROMPT, {"callbacks": [Picky()]}, max_new_tokens=LONG))
            TestStopping().check_stopped(seen, seen.count)


SETUP = """
    import asyncio, json, os, signal, sys, threading, time, warnings
    warnings.simplefilter("ignore")
    from transformers import AutoTokenizer
    from tests.support.models import forwards, llm_of, slowly, tiny_model, wait_until

    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    llm = llm_of(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=4000)
    llm.invoke("warm", max_new_tokens=2)
"""


def run_script(body: str, smollm2: Path, timeout_s: float = 120) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a program over a tiny model in an interpreter of its own; return its result and the time of its end."""
    root = Path(__file__).parents[3]
    script = textwrap.dedent(SETUP) + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", script, str(smollm2)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return done, time.time()


@pytest.fixture(scope="module")
def interrupted(smollm2: Path) -> dict[str, Any]:
    """The effect of Ctrl-C on each way of calling: the exception, its delay, and the forwards after it."""
    body = """
        llm.engine_info  # the engine's check of the model, which is not counted

        def interrupt(call):
            with forwards(llm, slowly(0.01)) as seen:
                def press():
                    seen.wait_for(5)
                    pressed.append(time.monotonic())
                    os.kill(os.getpid(), signal.SIGINT)
                pressed = []
                threading.Thread(target=press, daemon=True).start()
                try:
                    call()
                    raised = "nothing"
                except BaseException as error:
                    raised = type(error).__name__
                after_s = time.monotonic() - pressed[0]
                before = seen.count
                return {"raised": raised, "after_s": after_s, "ran_on": seen.settle() - before}

        prompts = ["The sea is", "The sky is", "The sun is"]

        async def astream():
            async for _ in llm.astream(prompts[0]):
                pass

        calls = {
            "invoke": lambda: llm.invoke(prompts[0]),
            "beams": lambda: llm.invoke(prompts[0], num_beams=2),
            "stream": lambda: list(llm.stream(prompts[0])),
            "batch": lambda: llm.batch(prompts),
            "batch, return_exceptions": lambda: llm.batch(prompts, return_exceptions=True),
            "ainvoke": lambda: asyncio.run(llm.ainvoke(prompts[0])),
            "abatch, return_exceptions": lambda: asyncio.run(llm.abatch(prompts, return_exceptions=True)),
            "astream": lambda: asyncio.run(astream()),
        }
        results = {name: interrupt(call) for name, call in calls.items()}
        results["next"] = llm.invoke(prompts[0], max_new_tokens=4)

        # A child process that inherits the loaded model, and a loaded one of its own.
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                llm.invoke("x")
                answer = "no error"
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}"
            os.write(write, answer.encode())
            os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        results["fork"] = os.read(read, 10000).decode()
        results["parent after fork"] = llm.invoke(prompts[0], max_new_tokens=4)
        print(json.dumps(results))
    """
    done, _ = run_script(body, smollm2)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


class TestProcess:
    @pytest.mark.parametrize(
        "call",
        [
            "invoke",
            "beams",
            "stream",
            "batch",
            "batch, return_exceptions",
            "ainvoke",
            "abatch, return_exceptions",
            "astream",
        ],
    )
    def test_ctrl_c_stops_the_model(self, interrupted: dict[str, Any], call: str) -> None:
        result = interrupted[call]
        assert result["raised"] == "KeyboardInterrupt"
        assert result["after_s"] < 1.5
        assert result["ran_on"] <= 2  # the running forward, and one begun before the engine looked

    def test_the_next_call_after_ctrl_c_works(
        self, interrupted: dict[str, Any], tiny_llm: QuantizedHuggingFaceLLM
    ) -> None:
        assert interrupted["next"] == tiny_llm.invoke(PROMPT, max_new_tokens=4)

    def test_a_forked_child_is_told_why_it_cannot(self, interrupted: dict[str, Any]) -> None:
        assert interrupted["fork"].startswith("UnsupportedError: this model was loaded before the process was forked")
        assert interrupted["parent after fork"] == interrupted["next"]

    @pytest.mark.slow
    def test_the_interpreter_ends_promptly_while_a_generation_runs(self, smollm2: Path) -> None:
        """With an open stream, an invoke in a daemon thread, and a batch that waits behind them."""
        body = """
            llm.engine_info  # the engine's check of the model, which is not counted
            counting = forwards(llm, slowly(0.01))
            seen = counting.__enter__()
            stream = llm.stream("The sea is")
            next(stream)

            def call(method, *inputs):
                try:
                    method(*inputs)
                except RuntimeError as error:  # the engine tells its callers that the program ends
                    assert "ending" in str(error)

            for work in ((llm.invoke, "The sky is"), (llm.batch, ["a", "b", "c"] * 8)):
                threading.Thread(target=call, args=work, daemon=True).start()
            wait_until(lambda: len(llm._engine()._scheduler.sequences) == 26 and seen.count > 3)
            print(json.dumps({"leaving": time.time(), "forwards": seen.count}), flush=True)
        """
        done, ended = run_script(body, smollm2)
        assert done.returncode == 0, done.stderr[-3000:]
        left = json.loads(done.stdout.splitlines()[-1])
        assert left["forwards"] > 3
        assert ended - left["leaving"] < 20  # 4000 tokens take twice as long
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
