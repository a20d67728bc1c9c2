"""The fast engine's KV cache: shared prefixes, little memory, preemption."""

from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine import kv_cache
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.kv_cache import LayerShape, allocate_pools, count_blocks, resident_bytes
from langchain_quantllm.errors import InvalidOptionError, NotEnoughMemoryError, PromptTooLongError
from langchain_quantllm.memory import available_memory
from tests.support.engine import (
    ONE_SEQUENCE,
    AllowOnly,
    Background,
    MakeLLM,
    ask,
    cached_tokens,
    ids_after,
    ids_of,
    on_pipeline,
    plan,
)
from tests.support.families import likeliest_ids
from tests.support.models import forwards, llm_of, slowly, tiny_model, wait_for_rest, wait_until

pytestmark = pytest.mark.usefixtures("one_thread")


class TestPrefixes:
    @pytest.mark.compat
    def test_the_next_turn_of_a_chat_shares_the_turns_before(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        first = ids_of(21)
        answer = ids_after(llm, first, max_new_tokens=30)
        second = [*first, *answer, *ids_of(9, seed=1)]
        # The keys of the answer's last token were never computed: 50 tokens, three full blocks.
        assert cached_tokens(llm, second, max_new_tokens=20) == [48]
        found = ids_after(llm, second, max_new_tokens=20)
        assert found == likeliest_ids(llm.pipeline.model, second, found)
        third = [*second, *found, *ids_of(40, seed=2)]
        assert cached_tokens(llm, third) == [(len(second) + 19) // BLOCK_TOKENS * BLOCK_TOKENS]
        found = ids_after(llm, third)
        assert found == likeliest_ids(llm.pipeline.model, third, found)

    def test_the_last_token_of_a_prompt_is_never_taken_from_the_cache(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        for count, expected in ((32, 16), (33, 32), (16, 0), (17, 16)):
            before = ids_after(llm, ids_of(count))
            assert cached_tokens(llm, ids_of(count)) == [expected]
            assert ids_after(llm, ids_of(count)) == before

    def test_cached_tokens_are_counted_in_the_usage(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        prompt = "All happy families are alike; each unhappy family is unhappy in its own way. " * 3
        tokens = llm.get_num_tokens(prompt)
        whole = (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        for expected in (0, whole):
            result = llm.generate([prompt])
            usage = result.generations[0][0].generation_info["usage_metadata"]
            assert usage["input_token_details"] == {"cache_read": expected}
            assert usage["input_tokens"] == tokens
            assert result.llm_output["token_usage"]["cached_tokens"] == expected

    def test_without_prefix_caching_nothing_is_shared(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny(prefix_caching=False)
        sharing = QuantizedHuggingFaceLLM(pipeline=llm.pipeline)
        for _ in range(2):
            assert cached_tokens(llm, ids_of(40)) == [0]
        assert cached_tokens(sharing, ids_of(40)) == [0]  # it left nothing for others
        assert cached_tokens(sharing, ids_of(40)) == [32]
        assert cached_tokens(llm, ids_of(40)) == [0]

    def test_samples_of_one_call_share_their_prompt_without_prefix_caching(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny(prefix_caching=False)
        options: dict[str, Any] = {"n": 3, "do_sample": True, "top_k": 30, "seed": 1, "max_new_tokens": 20}
        llm._engine()
        with forwards(llm) as seen:
            assert cached_tokens(llm, ids_of(40), **options) == [0, 32, 32]
        assert seen.shapes[0] == (1, 40 + 8 + 8)
        assert cached_tokens(llm, ids_of(40), **options) == [0, 32, 32]  # not the other call's
        found = [a.token_ids for a in ask(llm, plan(llm, ids_of(40), **options))]
        assert found == [a.token_ids for a in ask(on_pipeline(llm), plan(on_pipeline(llm), ids_of(40), **options))]

    def test_prompts_of_one_batch_share_their_prefix(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        prompts = [[*ids_of(33), *ids_of(4 + i, seed=i)] for i in range(4)]
        answers = ask(llm, [plan(llm, prompt)[0] for prompt in prompts])
        assert [a.usage.cached_tokens for a in answers if a.usage] == [0, 32, 32, 32]
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == likeliest_ids(llm.pipeline.model, prompt, answer.token_ids)


class TestSalts:
    """Callers who must not learn of each other share nothing that shows in counts or times."""

    def test_only_requests_of_the_same_salt_share(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        for _ in range(2):
            for salt, expected in (("a", 0), ("b", 0), (None, 0), ("a", 32), ("b", 32), (None, 32)):
                assert cached_tokens(llm, ids_of(40), cache_salt=salt) == [expected]
            engine: Any = llm._engine()
            wait_for_rest()
            engine._reset_cache()

    def test_a_salt_changes_no_token(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        expected = ids_after(llm, ids_of(40))
        assert all(ids_after(llm, ids_of(40), cache_salt=salt) == expected for salt in "abab")
        assert llm.invoke("Sea", cache_salt="a") == llm.invoke("Sea")
        assert on_pipeline(llm, max_new_tokens=12).invoke("Sea", cache_salt="a") == llm.invoke("Sea")

    def test_requests_of_one_step_share_only_with_their_salt(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        requests = [plan(llm, ids_of(40), cache_salt=salt)[0] for salt in ("a", "b", "a", None)]
        assert [a.usage.cached_tokens for a in ask(llm, requests) if a.usage] == [0, 0, 32, 0]

    def test_samples_of_a_call_share_under_their_salt(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        options: dict[str, Any] = {"n": 2, "do_sample": True, "seed": 1, "cache_salt": "a"}
        assert cached_tokens(llm, ids_of(40), **options) == [0, 32]
        assert cached_tokens(llm, ids_of(40)) == [0]

    def test_a_field_is_the_default_of_calls(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny(cache_salt="a")
        prompt = "All happy families are alike; each unhappy family is unhappy in its own way. " * 3

        def reads(**options: Any) -> bool:
            usage = llm.generate([prompt], **options).generations[0][0].generation_info["usage_metadata"]
            return bool(usage["input_token_details"]["cache_read"])

        assert [reads(), reads(), reads(cache_salt="b"), reads(cache_salt="b")] == [False, True, False, True]

    def test_many_salts_take_no_memory_and_the_latest_stay(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny(kv_cache_memory=ONE_SEQUENCE)
        engine: Any = llm._engine()
        ids_after(llm, ids_of(5))
        wait_for_rest()
        request = plan(llm, ids_of(40))[0]
        for i in range(10_000):
            salted = replace(request, options=replace(request.options, cache_salt=str(i)))
            engine._prefix_ids.first(salted, -1)
            engine._prefix_ids.first(request, -1)
        assert len(engine._prefix_ids._shared) == engine._blocks.total
        assert (-1, None, False) in engine._prefix_ids._shared
        assert (-1, "9999", False) in engine._prefix_ids._shared


class TestKVCacheMemory:
    def test_sequences_that_do_not_fit_together_are_preempted_and_get_the_same_tokens(
        self, tiny: QuantizedHuggingFaceLLM, make_tiny: MakeLLM
    ) -> None:
        llm = make_tiny(kv_cache_memory=ONE_SEQUENCE)
        assert llm.engine_info.kv_cache_tokens == 6 * BLOCK_TOKENS
        requests = [
            *plan(tiny, ids_of(20), max_new_tokens=70),
            *plan(tiny, ids_of(17), max_new_tokens=60, do_sample=True, top_k=30, seed=1, n=2),
            *plan(tiny, ids_of(16), max_new_tokens=75, repetition_penalty=1.2, logprobs=1),
            *plan(tiny, ids_of(40), max_new_tokens=56),
            *plan(tiny, ids_of(1), max_new_tokens=95, min_new_tokens=20, eos_token_id=(5,)),
            *plan(tiny, ids_of(5), max_new_tokens=30, mask=lambda: AllowOnly(AllowOnly.IDS)),
        ]
        found = ask(llm, requests)
        expected = ask(tiny, requests)
        assert llm._engine()._scheduler.preempted > 0
        assert tiny._engine()._scheduler.preempted == 0
        assert [a.token_ids for a in found] == [a.token_ids for a in expected]
        assert [entry.token_id for entry in found[3].logprobs] == found[3].token_ids
        assert [a.finish_reason for a in found] == [a.finish_reason for a in expected]
        assert all(a.usage and a.usage.completion_tokens == len(a.token_ids) for a in found)
        wait_until(lambda: llm._engine()._blocks.held == 0)

    @pytest.mark.parametrize("prefix_caching", [True, False])
    def test_many_requests_in_little_memory_get_the_same_tokens(
        self, tiny: QuantizedHuggingFaceLLM, make_tiny: MakeLLM, prefix_caching: bool
    ) -> None:
        llm = make_tiny(kv_cache_memory=3 * ONE_SEQUENCE, prefix_caching=prefix_caching)
        requests = [
            plan(llm, [*ids_of(33), *ids_of(1 + i, seed=i)][i % 3 * 16 :], max_new_tokens=10 + 3 * i % 40)[0]
            for i in range(25)
        ]
        expected = ask(tiny, [replace(request, shares_prefix=False) for request in requests])
        for _ in range(2):
            assert [a.token_ids for a in ask(llm, requests)] == [a.token_ids for a in expected]
        wait_until(lambda: llm._engine()._blocks.held == 0)

    def test_a_request_longer_than_the_cache_is_an_error_at_once(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny(kv_cache_memory=ONE_SEQUENCE)
        expected = ids_after(llm, ids_of(10), max_new_tokens=50)
        with (
            forwards(llm, slowly(0.003)) as seen,
            Background(lambda: ids_after(llm, ids_of(10), max_new_tokens=50)) as other,
        ):
            seen.wait_for(3)
            with pytest.raises(PromptTooLongError, match="kv_cache_memory"):
                llm.invoke("word " * 120)
            request = replace(plan(llm, ids_of(40))[0], max_new_tokens=57)
            with pytest.raises(PromptTooLongError, match="kv_cache_memory"):
                llm._engine().submit([request])
        assert other.result == expected
        assert len(ids_after(llm, ids_of(40), max_new_tokens=56)) == 56  # fits exactly

    def test_the_cache_stays_within_its_budget(self, make_tiny: MakeLLM) -> None:
        info = make_tiny(kv_cache_memory="1MiB").engine_info
        assert info.kv_cache_bytes is not None
        assert info.kv_cache_bytes <= 2**20

    @pytest.mark.parametrize("value", [0, -1, 1, 1.5, 0.0, -0.5, float("nan"), "lots", "", "4 apples", True])
    def test_invalid_values_of_kv_cache_memory_are_errors(self, tiny: QuantizedHuggingFaceLLM, value: Any) -> None:
        with pytest.raises(InvalidOptionError, match="kv_cache_memory"):
            QuantizedHuggingFaceLLM(pipeline=tiny.pipeline, kv_cache_memory=value)

    def test_too_little_memory_for_a_short_text_is_an_error(self, make_tiny: MakeLLM) -> None:
        with pytest.raises(NotEnoughMemoryError, match="kv_cache_memory"):
            make_tiny(kv_cache_memory=1000).invoke("Sea")

    def test_the_memory_report_counts_the_cache(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        assert llm.memory_report().kv_cache_bytes is None
        ids_after(llm, ids_of(40), max_new_tokens=20)
        report = llm.memory_report()
        assert report.kv_cache_bytes == 64 * 512  # 59 tokens in four blocks
        assert "KV cache" in str(report)
        if sys.platform == "linux":
            assert report.kv_cache_bytes <= report.kv_resident_bytes

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what is resident")
    def test_memory_becomes_resident_as_it_is_written(self) -> None:
        cpu = torch.device("cpu")
        shape = LayerShape(kv_heads=2, key_dim=64, value_dim=64, dtype=torch.bfloat16, device=cpu)
        freed = [torch.ones(8 * 2**20, dtype=torch.uint8) for _ in range(16)]  # goes to the heap once one was freed
        kept = [torch.ones(1) for _ in range(4)]
        del freed
        pools = allocate_pools([shape] * 4, 2048)  # 16 MiB each
        assert resident_bytes(pools) == 0
        pools[1].kv[7] = 1
        assert pools[1].kv[7].nbytes <= resident_bytes(pools) <= 4 * 2**20  # memory pages have 2 MiB at most
        assert not pools[1].kv[8].any()
        assert len(kept) == 4


class TestMainMemory:
    """Memory is taken only as it is written to, so the system itself refuses nothing."""

    SHAPES = (LayerShape(kv_heads=8, key_dim=128, value_dim=128, dtype=torch.float32, device=torch.device("cpu")),) * 4

    def count(self, budget: float | int) -> int:
        return count_blocks(self.SHAPES, budget, sequences=10**6, context=None)

    def test_more_than_there_is_is_an_error_with_the_numbers(self) -> None:
        with pytest.raises(NotEnoughMemoryError, match=r"a KV cache of .* does not fit: .* are free.*; lower kv_cache"):
            self.count(int(1.5 * available_memory("cpu")))

    def test_a_model_with_more_than_there_is_is_an_error_before_anything_is_generated(self, tokenizer: Any) -> None:
        model = tiny_model(len(tokenizer), context_tokens=2**30)
        llm = llm_of(model, tokenizer, kv_cache_memory=2 * available_memory("cpu"))
        with pytest.raises(NotEnoughMemoryError, match="lower kv_cache_memory"):
            llm.invoke("Sea")

    def test_a_budget_beyond_what_the_rows_can_use_is_no_error(self, make_tiny: MakeLLM) -> None:
        assert make_tiny(kv_cache_memory=2 * available_memory("cpu")).invoke("Sea")

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what is resident")
    def test_what_another_model_s_cache_may_still_fill_is_not_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # What the machine has free, and what the models of other tests hold, changes while this runs.
        monkeypatch.setattr(kv_cache, "available_memory", lambda _device: 8 * 2**30)
        monkeypatch.setattr(kv_cache, "_mappings", weakref.WeakKeyDictionary())
        size = int(0.7 * 8 * 2**30)
        alone = self.count(0.5)
        first = allocate_pools(self.SHAPES, self.count(size))
        with pytest.raises(NotEnoughMemoryError, match="other KV caches in this process may still fill"):
            self.count(size)
        assert self.count(0.5) == pytest.approx(0.3 * alone, rel=0.01), "a share of the free memory counts it, too"
        assert first[0].kv.shape[0] > 0
        del first
        gc.collect()
        assert self.count(size) > 0

    @pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what is resident")
    def test_what_a_cache_has_filled_is_not_counted_twice(self) -> None:
        gc.collect()
        before = kv_cache._unwritten_bytes()
        pools = allocate_pools(self.SHAPES, 64)
        size = sum(pool.kv.nbytes for pool in pools)
        assert kv_cache._unwritten_bytes() == before + size
        for pool in pools[:2]:
            pool.kv.fill_(1.0)
        assert kv_cache._unwritten_bytes() == before + size / 2
        del pools, pool
        assert kv_cache._unwritten_bytes() == before


class TestShortMemory:
    """The device's own error, raised where a real one would be: in a forward over too many tokens."""

    @pytest.mark.parametrize("most", [100, 17])
    def test_a_prefill_that_runs_out_of_memory_goes_on_in_smaller_steps(self, make_tiny: MakeLLM, most: int) -> None:
        llm = make_tiny(prefix_caching=False)
        requests = [plan(llm, ids_of(count), max_new_tokens=9)[0] for count in (300, 5, 16, 150)]
        expected = [answer.token_ids for answer in ask(llm, requests)]

        def check(module: Any, args: Any, kwargs: Any) -> None:
            if kwargs["input_ids"].shape[1] > most:
                msg = "no room for so many tokens"
                raise torch.OutOfMemoryError(msg)

        handle = llm.pipeline.model.register_forward_pre_hook(check, with_kwargs=True)
        try:
            assert [answer.token_ids for answer in ask(llm, requests)] == expected
        finally:
            handle.remove()
        engine: Any = llm._engine()
        assert engine._scheduler.step_tokens <= most
        assert engine._blocks.held == 0

    def test_decode_steps_between_layers_leave_all_parts_of_a_divided_step_alone(
        self, make_tiny: MakeLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        llm = make_tiny(prefix_caching=False)
        running = [plan(llm, ids_of(20), max_new_tokens=60)[0], plan(llm, ids_of(25), max_new_tokens=60)[0]]
        long = [plan(llm, ids_of(count), max_new_tokens=9)[0] for count in (180, 170, 90)]
        expected = [ask(llm, [request])[0].token_ids for request in (*running, *long)]
        engine: Any = llm._engine()
        # As on a GPU, with eager steps in the place of graphs.
        monkeypatch.setattr(type(engine._runner), "captures", property(lambda runner: True))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(engine._runner, "can_replay", lambda rows: True)
        monkeypatch.setattr(engine._runner, "_bucket", lambda rows: None)
        monkeypatch.setattr(engine._runner, "is_asynchronous", True)
        engine._step_tokens = (1200, 64)
        engine._reset_cache()
        failures = 0

        def check(module: Any, args: Any, output: Any) -> None:
            nonlocal failures
            if output.shape[1] > 300:
                failures += 1
                msg = "no room for so many tokens"
                raise torch.OutOfMemoryError(msg)

        llm.pipeline.model.model.norm.register_forward_hook(check)
        streams = [engine.submit([request]) for request in running]
        found: list[list[int]] = [[*next(stream).token_ids] for stream in map(iter, streams)]
        beside = engine.submit(long)
        found += [[] for _ in long]
        for chunk in beside:
            found[2 + chunk.row] += chunk.token_ids
        for ids, stream in zip(found, streams, strict=False):
            for chunk in stream:
                ids += chunk.token_ids
        assert failures == 1
        assert found == expected

    def test_running_out_of_memory_fails_the_running_requests_with_advice(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        expected = llm.invoke("Sea")

        def check(module: Any, args: Any, kwargs: Any) -> None:
            msg = "no room at all"
            raise torch.OutOfMemoryError(msg)

        handle = llm.pipeline.model.register_forward_pre_hook(check, with_kwargs=True)
        try:
            with pytest.raises(NotEnoughMemoryError, match="kv_cache_memory"):
                llm.invoke("Sea")
        finally:
            handle.remove()
        assert llm.invoke("Sea") == expected

    def test_max_new_tokens_beyond_the_cache_is_an_error(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny(kv_cache_memory=ONE_SEQUENCE)
        with pytest.raises(PromptTooLongError, match="max_new_tokens=500 .* kv_cache_memory"):
            llm.invoke("Sea", max_new_tokens=500)
