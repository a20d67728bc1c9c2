"""Batches: prompts run in one batch, give the texts of single calls, and a bad prompt fails alone."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from langchain_core.exceptions import ContextOverflowError

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import GenerationError, InvalidOptionError
from tests.support.models import TINY, Forwards, fail_at, forwards, llm_of, slowly, tiny_model

LENGTHS = [
    "Sea",
    "The sea is",
    "The sea is blue and the sky is",
    "海はとても青い、空も青い。",
    "a b c d e f g h i j k l m",
]
TWENTY = [f"Number {i} of the list is" for i in range(20)]
TWENTY_LONG = [f"Number {i}" + " of the list" * 10 for i in range(20)]
"""Prompts with more tokens each than there are prompts."""

ENGINES = ("fast", "pipeline")


def engine_of(llm: QuantizedHuggingFaceLLM, engine: str, **fields: Any) -> QuantizedHuggingFaceLLM:
    """Make an LLM over the same model with one engine, whose check of the model is done."""
    other = QuantizedHuggingFaceLLM(pipeline=llm.load().pipeline, engine=engine, **fields)
    assert other.engine_info.name == engine
    return other


def check_one_batch(seen: Forwards, engine: str, prompts: list[str], tokenizer: Any, *, steps: int, n: int = 1) -> None:
    """Check that prompts ran in one batch from the first to the last token.

    The pipeline engine pads them to rows of one length; the fast engine packs their tokens into one row. Only without
    prefix caching: with it, tokens that an earlier call left in the cache are not run again.
    """
    rows = len(prompts) * n
    if engine == "pipeline":
        assert seen.rows == [rows] * steps
    else:
        tokens = n * sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
        assert seen.shapes == [(1, tokens), *[(1, rows)] * (steps - 1)]


def rows_of_steps(seen: Forwards, engine: str) -> list[int]:
    """Return the number of rows in each decode step; for prompts of `TWENTY_LONG`, without prefix caching."""
    assert seen.count
    if engine == "pipeline":
        return [rows for rows, tokens in seen.shapes if tokens == 1]
    return [tokens for _, tokens in seen.shapes if tokens <= len(TWENTY_LONG)]


@pytest.mark.parametrize("engine", ENGINES)
class TestRows:
    def test_prompts_of_different_lengths_run_in_one_batch(
        self, tiny_llm: QuantizedHuggingFaceLLM, tokenizer: Any, engine: str
    ) -> None:
        llm = engine_of(tiny_llm, engine, prefix_caching=False)
        with forwards(llm) as seen:
            llm.batch(LENGTHS, max_new_tokens=4)
        check_one_batch(seen, engine, LENGTHS, tokenizer, steps=4)

    def test_prompts_for_a_checkpoint_from_disk_run_in_one_batch(
        self, tokenizer: Any, llm: QuantizedHuggingFaceLLM, engine: str
    ) -> None:
        """Its generation config says `use_cache: true`, as most do."""
        other = engine_of(llm, engine, prefix_caching=False)
        with forwards(other) as seen:
            other.batch(LENGTHS[:3], max_new_tokens=2)
        check_one_batch(seen, engine, LENGTHS[:3], tokenizer, steps=2)

    async def test_async_prompts_and_samples_run_in_one_batch(
        self, tiny_llm: QuantizedHuggingFaceLLM, tokenizer: Any, engine: str
    ) -> None:
        llm = engine_of(tiny_llm, engine, prefix_caching=False)
        with forwards(llm) as seen:
            await llm.abatch(LENGTHS, max_new_tokens=4)
        check_one_batch(seen, engine, LENGTHS, tokenizer, steps=4)
        with forwards(llm) as seen:
            llm.generate(LENGTHS[:2], n=3, temperature=1.0, max_new_tokens=4)
        check_one_batch(seen, engine, LENGTHS[:2], tokenizer, steps=4, n=3)

    @pytest.mark.parametrize("family", sorted(TINY))
    def test_a_batch_equals_the_single_calls(self, tokenizer: Any, family: str, engine: str) -> None:
        """In float32; the best two logits of these models lie further apart than padding or packing moves them."""
        model = tiny_model(len(tokenizer), family, seed=1)
        llm = engine_of(llm_of(model, tokenizer), engine, max_new_tokens=24, prefix_caching=False)
        singles = [llm.invoke(prompt) for prompt in LENGTHS]
        with forwards(llm) as seen:
            assert llm.batch(LENGTHS) == singles
        check_one_batch(seen, engine, LENGTHS, tokenizer, steps=24)  # else nothing was compared

    def test_a_batch_equals_the_single_calls_on_a_trained_model(
        self, llm: QuantizedHuggingFaceLLM, tokenizer: Any, engine: str
    ) -> None:
        other = engine_of(llm, engine, prefix_caching=False)
        prompts = ["The capital of France is", "Once upon a time there was a", "1, 2, 3, 4,"]
        singles = [other.invoke(prompt, max_new_tokens=5) for prompt in prompts]
        with forwards(other) as seen:
            assert other.batch(prompts, max_new_tokens=5) == singles
        check_one_batch(seen, engine, prompts, tokenizer, steps=5)

    def test_a_seeded_batch_equals_the_single_calls(self, tiny_llm: QuantizedHuggingFaceLLM, engine: str) -> None:
        llm = engine_of(tiny_llm, engine)
        options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 3, "max_new_tokens": 8}
        assert llm.batch(LENGTHS, **options) == [llm.invoke(prompt, **options) for prompt in LENGTHS]

    def test_rows_that_end_early_leave_the_others_alone(self, tiny_llm: QuantizedHuggingFaceLLM, engine: str) -> None:
        llm = engine_of(tiny_llm, engine)
        singles = [llm.invoke(prompt, max_new_tokens=10) for prompt in LENGTHS]
        stop = [singles[0][4:12], singles[2][6:14]]
        expected = [llm.invoke(prompt, max_new_tokens=10, stop=stop) for prompt in LENGTHS]
        assert expected[0] != singles[0]
        assert expected[1] == singles[1]
        assert llm.batch(LENGTHS, max_new_tokens=10, stop=stop) == expected

    def test_the_batch_ends_with_its_last_row(self, tiny_llm: QuantizedHuggingFaceLLM, engine: str) -> None:
        """It does not run on to `max_new_tokens`."""
        llm = engine_of(tiny_llm, engine)
        singles = [llm.invoke(prompt, max_new_tokens=10) for prompt in LENGTHS[:2]]
        with forwards(llm) as seen:
            llm.batch(LENGTHS[:2], max_new_tokens=10, stop=[singles[0][:1], singles[1][:1]])
        assert seen.count <= 2

    def test_twenty_prompts_four_at_a_time(self, tiny_llm: QuantizedHuggingFaceLLM, engine: str) -> None:
        llm = engine_of(tiny_llm, engine, batch_size=4, max_new_tokens=3, prefix_caching=False)
        expected = [llm.invoke(prompt) for prompt in TWENTY_LONG]
        with forwards(llm) as seen:
            assert llm.batch(TWENTY_LONG) == expected
        assert rows_of_steps(seen, engine) == [4] * 10
        assert seen.count == 15
        with forwards(llm) as seen:
            assert llm.batch(TWENTY_LONG, return_exceptions=True) == expected
        assert max(rows_of_steps(seen, engine)) <= 4
        if engine == "pipeline":
            assert max(seen.rows) == 4

    def test_max_concurrency_bounds_the_rows_of_batch(self, tiny_llm: QuantizedHuggingFaceLLM, engine: str) -> None:
        llm = engine_of(tiny_llm, engine, prefix_caching=False, max_new_tokens=3)
        expected = [llm.invoke(prompt) for prompt in TWENTY_LONG[:6]]
        for return_exceptions in (False, True):
            with forwards(llm) as seen:
                texts = llm.batch(TWENTY_LONG[:6], {"max_concurrency": 2}, return_exceptions=return_exceptions)
            assert texts == expected
            assert 1 <= max(rows_of_steps(seen, engine)) <= 2

    async def test_max_concurrency_bounds_the_rows_of_abatch(
        self, tiny_llm: QuantizedHuggingFaceLLM, engine: str
    ) -> None:
        llm = engine_of(tiny_llm, engine, prefix_caching=False, max_new_tokens=3)
        expected = [llm.invoke(prompt) for prompt in TWENTY_LONG[:6]]
        for return_exceptions in (False, True):
            with forwards(llm) as seen:
                texts = await llm.abatch(TWENTY_LONG[:6], {"max_concurrency": 2}, return_exceptions=return_exceptions)
            assert texts == expected
            assert 1 <= max(rows_of_steps(seen, engine)) <= 2

    def test_calls_of_many_threads_become_batches(self, tiny_llm: QuantizedHuggingFaceLLM, engine: str) -> None:
        """As LangChain runs the branches of a RunnableParallel."""
        llm = engine_of(tiny_llm, engine)
        expected = [llm.invoke(prompt, max_new_tokens=6) for prompt in TWENTY[:8]]
        texts: list[str] = [""] * 8
        barrier = threading.Barrier(8)

        def call(i: int) -> None:
            barrier.wait()
            texts[i] = llm.invoke(TWENTY[i], max_new_tokens=6)

        with forwards(llm, slowly(0.01)) as seen:
            threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
        assert texts == expected
        assert seen.count < 8 * 6 / 2  # 48 one by one, 6 at best

    def test_instances_over_one_pipeline_meet_in_one_engine(
        self, tiny_llm: QuantizedHuggingFaceLLM, engine: str
    ) -> None:
        """As `configurable_fields` makes them: two engines would run the model from two threads at once."""
        both = [engine_of(tiny_llm, engine, max_new_tokens=12) for _ in range(2)]
        expected = [both[0].invoke(prompt) for prompt in TWENTY[:2]]
        texts: list[str] = ["", ""]
        barrier = threading.Barrier(2)

        def call(i: int) -> None:
            barrier.wait()
            texts[i] = both[i].invoke(TWENTY[i])

        inside, most = 0, 0

        def enter(module: Any, args: Any) -> None:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)  # a slow model, so that the other call comes meanwhile

        def leave(module: Any, args: Any, output: Any) -> None:
            nonlocal inside
            inside -= 1

        model = tiny_llm.pipeline.model
        hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave)]
        threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for hook in hooks:
            hook.remove()
        assert texts == expected
        assert most == 1

    def test_no_prompts_are_no_texts(self, tiny_llm: QuantizedHuggingFaceLLM, engine: str) -> None:
        llm = engine_of(tiny_llm, engine)
        assert llm.batch([]) == []
        assert llm.batch([], return_exceptions=True) == []
        assert llm.generate([]).generations == []


def test_engines_agree(tiny_llm: QuantizedHuggingFaceLLM) -> None:
    """Greedy and with a seed, one call and a batch."""
    fast, plain = (engine_of(tiny_llm, engine, max_new_tokens=12) for engine in ENGINES)
    assert fast.batch(LENGTHS) == plain.batch(LENGTHS)
    options: dict[str, Any] = {"temperature": 1.2, "top_k": 50, "repetition_penalty": 1.1, "seed": 4}
    assert fast.batch(LENGTHS, **options) == plain.batch(LENGTHS, **options)


class TestErrors:
    PROMPTS = ("The sea is", "", "The sky is", "word " * 9000)

    def check(self, llm: QuantizedHuggingFaceLLM, results: list[Any]) -> None:
        assert results[0] == llm.invoke(self.PROMPTS[0], max_new_tokens=4)
        assert isinstance(results[1], InvalidOptionError)
        assert "at least one character" in str(results[1])
        assert results[2] == llm.invoke(self.PROMPTS[2], max_new_tokens=4)
        assert isinstance(results[3], ContextOverflowError)

    def test_a_bad_prompt_fails_alone(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        results = tiny_llm.batch(list(self.PROMPTS), return_exceptions=True, max_new_tokens=4)
        self.check(tiny_llm, results)

    async def test_a_bad_prompt_fails_alone_in_async(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        self.check(tiny_llm, await tiny_llm.abatch(list(self.PROMPTS), return_exceptions=True, max_new_tokens=4))

    def test_a_single_bad_prompt_returns_its_error(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        (error,) = tiny_llm.batch([""], return_exceptions=True)
        assert isinstance(error, InvalidOptionError)

    def test_good_prompts_beside_a_bad_one_are_one_batch_of_the_pipeline_engine(
        self, tiny_llm: QuantizedHuggingFaceLLM
    ) -> None:
        llm = engine_of(tiny_llm, "pipeline")
        prompts = [*TWENTY[:8], ""]
        with forwards(llm) as seen:
            results = llm.batch(prompts, return_exceptions=True, max_new_tokens=4)
        assert results[:8] == [llm.invoke(prompt, max_new_tokens=4) for prompt in TWENTY[:8]]
        assert len(seen.prefills) <= 3  # one, or a few if the machine delays a caller
        assert sum(rows for rows, _ in seen.prefills) == 8

    def test_good_prompts_beside_a_bad_one_join_the_fast_engine_s_batch(
        self, tiny_llm: QuantizedHuggingFaceLLM
    ) -> None:
        """It begins with the first prompt, and the others join the running batch."""
        llm = engine_of(tiny_llm, "fast", prefix_caching=False)
        prompts = [*TWENTY_LONG[:8], ""]
        with forwards(llm, slowly(0.02)) as seen:
            results = llm.batch(prompts, return_exceptions=True, max_new_tokens=12)
        assert results[:8] == [llm.invoke(prompt, max_new_tokens=12) for prompt in TWENTY_LONG[:8]]
        assert max(rows_of_steps(seen, "fast")) == 8
        assert seen.count < 8 * 12 / 2  # 96 one by one, 12 at best

    async def test_without_return_exceptions_the_first_error_is_raised(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        with forwards(tiny_llm) as seen:
            with pytest.raises(InvalidOptionError, match="at least one character"):
                tiny_llm.batch(list(self.PROMPTS))
            with pytest.raises(InvalidOptionError, match="at least one character"):
                await tiny_llm.abatch(list(self.PROMPTS))
            assert seen.settle() == 0  # no forward ran

    def test_a_failed_batch_cancels_the_prompts_that_wait(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        """Prompts that wait behind a failed batch of the same call do not run."""
        llm = QuantizedHuggingFaceLLM(pipeline=tiny_llm.pipeline, batch_size=4, max_new_tokens=5)
        with forwards(llm, fail_at(3, ValueError("cosmic ray"))) as seen:
            with pytest.raises(GenerationError, match="cosmic ray"):
                llm.batch(TWENTY)
            assert seen.settle() <= 4
        assert llm.batch(TWENTY[:2]) == [llm.invoke(prompt) for prompt in TWENTY[:2]]

    def test_a_failing_model_fails_each_of_a_batch_with_an_error_of_its_own(
        self, tiny_llm: QuantizedHuggingFaceLLM
    ) -> None:
        cause = ValueError("cosmic ray")
        with forwards(tiny_llm, lambda number: (_ for _ in ()).throw(cause)):
            results = tiny_llm.batch(TWENTY[:4], return_exceptions=True, max_new_tokens=4)
        assert all(isinstance(error, GenerationError) and error.__cause__ is cause for error in results)
        assert len({id(error) for error in results}) == 4

    def test_options_are_checked_for_all_before_any_runs(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        results = tiny_llm.batch(TWENTY[:3], return_exceptions=True, top_p=7)
        assert [type(error) for error in results] == [InvalidOptionError] * 3

    def test_a_timeout_counts_for_each_call(self, tiny_llm: QuantizedHuggingFaceLLM) -> None:
        began = time.monotonic()
        with forwards(tiny_llm, slowly(0.02)) as seen:
            results = tiny_llm.batch(TWENTY[:3], return_exceptions=True, timeout=0.3, max_new_tokens=2000)
            assert all(isinstance(error, TimeoutError) for error in results)
            assert time.monotonic() - began < 5
            before = seen.count
            assert seen.settle() <= before + 2  # the running forward, and one begun before the engine looked


def _spoil_first_row(model: Any) -> Any:
    """Make every score of the first row nan, as an overflow does."""

    def spoil(module: Any, args: Any, output: Any) -> None:
        output.logits[0] = float("nan")

    return model.register_forward_hook(spoil)


class TestNoNumbers:
    @pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}], ids=["greedy", "sampled"])
    def test_a_row_without_scores_fails_alone(self, tokenizer: Any, options: dict[str, Any]) -> None:
        llm = llm_of(tiny_model(len(tokenizer)), tokenizer, max_new_tokens=3)
        expected = llm.invoke("The sea is", **options)
        hook = _spoil_first_row(llm.pipeline.model)
        with pytest.raises(GenerationError, match="nan"):
            llm.invoke("The sea is", **options)
        texts = llm.batch(["The sea is"] * 4, return_exceptions=True, **options)
        hook.remove()
        failed = [text for text in texts if isinstance(text, GenerationError)]
        assert failed  # one for each batch of these calls
        assert [text for text in texts if isinstance(text, str)] == [expected] * (4 - len(failed))
        assert llm.invoke("The sea is", **options) == expected
