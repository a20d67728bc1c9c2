"""Layers that keep a state, in the running batch: short of memory, in chunks, side by side, with adapters."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.compat.transformers_states import state_modules
from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.attention import Batch
from langchain_quantllm.engine.build import EngineParts
from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.engine.cuda_graphs import WaitFinder
from langchain_quantllm.engine.forward_context import ForwardContext, forward_context
from langchain_quantllm.engine.forward_patch import ForwardPatch
from langchain_quantllm.engine.generate import limits_of
from langchain_quantllm.engine.request import plan_requests
from langchain_quantllm.engine.state_forward import StateForward
from langchain_quantllm.engine.state_pool import StatePool, count_rows, state_bytes
from langchain_quantllm.errors import GenerationError, NotEnoughMemoryError, UnsupportedError
from langchain_quantllm.options import GenerationOptions
from tests.support.engine import Answer, Background, ask, cached_tokens, ids_after, plan
from tests.support.families import FAST, WITH_STATES, family_model, generated_ids, likeliest_ids, random_ids
from tests.support.models import forwards, llm_of, slowly, wait_for_rest
from tests.support.selection import slow_but
from tests.support.state_families import SINGLE_TOKENS, inputs_of

pytestmark = pytest.mark.usefixtures("one_thread")

MIXED = "qwen3_next"
"""A layer that keeps a state, one that keeps keys and values, and experts."""

MakeLLM = Callable[..., QuantizedHuggingFaceLLM]


@pytest.fixture
def make(tokenizer: Any) -> Iterator[MakeLLM]:
    """Make LLMs over models of a family that the test may spoil."""
    made = []

    def make(name: str = MIXED, **fields: Any) -> QuantizedHuggingFaceLLM:
        made.append(llm_of(family_model(FAST[name]), tokenizer, **fields))
        return made[-1]

    yield make
    for llm in made:
        llm.unload()


def engine_of(llm: QuantizedHuggingFaceLLM) -> Any:
    return llm._engine()


def cached(answer: Answer) -> int | None:
    return answer.usage.cached_tokens if answer.usage else None


def likeliest(llm: QuantizedHuggingFaceLLM, prompt_ids: list[int], ids: list[int]) -> list[int]:
    return likeliest_ids(llm.pipeline.model, prompt_ids, ids)


class TestMemory:
    def test_states_and_blocks_share_one_budget(self, make: MakeLLM) -> None:
        info = make(kv_cache_memory="64KiB").engine_info
        assert info.kv_cache_bytes is not None
        assert info.state_bytes is not None
        assert 0.9 * 65536 < info.kv_cache_bytes + info.state_bytes <= 65536
        assert info.state_bytes <= 65536 / 2

    def test_a_step_of_more_sequences_than_have_states_is_not_timed(self, make: MakeLLM) -> None:
        engine = engine_of(make(kv_cache_memory="64KiB"))
        slots = engine._parts.slots
        assert engine.time_step(slots, 20, 1) > 0
        assert engine.time_step(slots + 1, 20, 1) is None

    def test_the_memory_report_counts_the_states(self, make: MakeLLM) -> None:
        llm = make(kv_cache_memory="64KiB")
        ids_after(llm, random_ids(40), max_new_tokens=20)
        info, report = llm.engine_info, llm.memory_report()
        assert report.kv_pool_bytes == (info.kv_cache_bytes or 0) + (info.state_bytes or 0)
        if sys.platform == "linux":
            pools = len(engine_of(llm)._parts.pools)
            page = mmap.PAGESIZE
            assert (report.kv_resident_bytes or 0) >= report.kv_pool_bytes / 4 > pools * page

    def test_a_model_without_states_has_none(self, make: MakeLLM) -> None:
        assert make("llama").engine_info.state_bytes is None

    def test_as_many_sequences_run_as_there_are_states_for(self, make: MakeLLM) -> None:
        llm = make(kv_cache_memory="64KiB")
        info, slots = llm.engine_info, engine_of(llm)._parts.slots
        assert slots < engine_of(make())._parts.slots
        row = sum(shape.row_bytes for shape in engine_of(llm)._parts.probe.states)
        kept = int(info.reason.split("one of ")[1].split()[0])
        assert info.state_bytes == (slots + 1 + kept) * row
        requests = [plan(llm, random_ids(5, seed=i), max_new_tokens=6)[0] for i in range(slots + 3)]
        with forwards(llm) as seen:
            answers = ask(llm, requests)
        assert max(tokens for _, tokens in seen.shapes[-4:]) <= slots
        for request, answer in zip(requests, answers, strict=True):
            assert answer.token_ids == likeliest(llm, list(request.prompt_ids), answer.token_ids)

    def test_no_room_for_a_few_states_is_an_error(self, make: MakeLLM) -> None:
        with pytest.raises(NotEnoughMemoryError, match="states of 3 sequences"):
            make(kv_cache_memory=10_000).invoke("Sea")

    def test_a_model_of_states_alone_needs_memory_for_these_only(self, make: MakeLLM) -> None:
        llm = make("mamba2")
        info, parts = llm.engine_info, engine_of(llm)._parts
        assert info.kv_cache_bytes == 0
        assert info.state_bytes == sum(state_bytes(parts.probe.states, 2 * parts.slots + 1).values())
        assert info.kv_cache_tokens == parts.slots * 4096 - 16

    def test_a_fraction_is_one_of_what_is_free(self, make: MakeLLM) -> None:
        shapes = engine_of(make())._parts.probe.states
        assert count_rows(shapes, 0.5, most=7) == 7
        row = sum(shape.row_bytes for shape in shapes)
        assert count_rows(shapes, 10 * row, most=7) == 5

    def test_a_pool_has_the_states_of_all_rows(self, make: MakeLLM) -> None:
        shapes = engine_of(make())._parts.probe.states
        pool = StatePool(shapes, 5)
        assert {key: tensor.shape[0] for key, tensor in pool.tensors.items()} == {shape.key: 5 for shape in shapes}
        assert sum(tensor.nbytes for tensor in pool.tensors.values()) == sum(state_bytes(shapes, 5).values())


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_states_are_kept_only_where_several_tokens_go_on_from_them(make: MakeLLM, name: str) -> None:
    parts = engine_of(make(name))._parts
    parts.slots -= 1  # leaves a row of states that is no slot
    snapshots = parts.new_snapshots()
    assert snapshots is not None
    assert (snapshots.save(1) is None) == (name in SINGLE_TOKENS)


class TestTokens:
    @pytest.mark.parametrize("name", slow_but([MIXED, "mamba2"], WITH_STATES))
    def test_long_prompts_go_on_from_the_states_of_their_chunks_while_others_decode(
        self, make: MakeLLM, name: str
    ) -> None:
        llm = make(name)
        short, long = random_ids(9), random_ids(300)
        assert engine_of(llm)._step_tokens[1] < 300
        call = Background(lambda: ids_after(llm, short, max_new_tokens=40))
        with forwards(llm, slowly(0.002)) as seen, call as beside:
            seen.wait_for(3)
            found = ids_after(llm, long, max_new_tokens=8)
        longest = max(tokens for _, tokens in seen.shapes)
        assert longest >= 300 if name in SINGLE_TOKENS else longest < 150
        assert found == generated_ids(llm.pipeline.model, long, 8)
        assert beside.result == likeliest(llm, short, beside.result)

    @pytest.mark.parametrize("name", slow_but([MIXED, "lfm2"], WITH_STATES))
    def test_preempted_sequences_get_the_same_tokens(self, make: MakeLLM, name: str) -> None:
        parts = engine_of(make(name))._parts
        token = sum(shape.token_bytes for shape in parts.probe.shapes)
        if not token:
            pytest.skip("keeps no keys and values, and never runs out of blocks")
        row = sum(shape.row_bytes for shape in parts.probe.states)
        llm = make(name, kv_cache_memory=max(2 * 12 * 16 * token, 2 * 7 * row))
        if 7 * row >= 4 * 105 * token:
            pytest.skip("the least memory for its states leaves room for all blocks")
        requests = [plan(llm, random_ids(30, seed=i), max_new_tokens=75)[0] for i in range(4)]
        answers = ask(llm, requests)
        assert engine_of(llm)._scheduler.preempted > 0
        for request, answer in zip(requests, answers, strict=True):
            assert len(answer.token_ids) == 75
            assert answer.token_ids == likeliest(llm, list(request.prompt_ids), answer.token_ids)

    def test_samples_of_one_call_are_those_of_calls_of_their_own(self, make: MakeLLM) -> None:
        llm = make()
        options = {"max_new_tokens": 12, "do_sample": True, "seed": 5, "temperature": 1.0}
        together = [answer.token_ids for answer in ask(llm, plan(llm, random_ids(21), n=3, **options))]
        assert len({tuple(ids) for ids in together}) == 3
        with Background(lambda: ids_after(llm, random_ids(50), max_new_tokens=30)):
            beside = [answer.token_ids for answer in ask(llm, plan(llm, random_ids(21), n=3, **options))]
        assert beside == together
        assert ids_after(llm, random_ids(21), **options) == together[0]

    def test_two_threads_get_their_own_tokens(self, make: MakeLLM) -> None:
        llm = make("granitemoehybrid")
        first, second = random_ids(33), random_ids(18, seed=4)

        def many(prompt_ids: list[int]) -> list[list[int]]:
            return [ids_after(llm, prompt_ids, max_new_tokens=count) for count in (20, 1, 7, 16)]

        with Background(lambda: many(first)) as one, Background(lambda: many(second)) as other:
            pass
        for prompt_ids, answers in ((first, one.result), (second, other.result)):
            expected = generated_ids(llm.pipeline.model, prompt_ids, 20)
            assert answers == [expected[: len(ids)] for ids in answers]

    def test_a_slot_s_next_sequence_sees_nothing_of_a_cancelled_one(self, make: MakeLLM) -> None:
        llm = make()
        prompt_ids = random_ids(20)
        expected = generated_ids(llm.pipeline.model, prompt_ids, 20)
        with forwards(llm, slowly(0.002)), Background(lambda: ids_after(llm, prompt_ids, max_new_tokens=20)) as beside:
            for seed in range(5):
                with engine_of(llm).submit(plan(llm, random_ids(40, seed=seed), max_new_tokens=300)) as stream:
                    next(iter(stream))
        assert beside.result == expected
        wait_for_rest()
        pool = engine_of(llm)._parts.states
        for tensor in pool.tensors.values():
            tensor.fill_(math.nan)
        assert ids_after(llm, prompt_ids, max_new_tokens=20) == expected

    def test_a_prompt_of_one_token_begins_without_a_state(self, make: MakeLLM) -> None:
        llm = make()
        ids_after(llm, random_ids(30), max_new_tokens=4)
        found = ids_after(llm, [77], max_new_tokens=12)
        assert found == generated_ids(llm.pipeline.model, [77], 12)

    @pytest.mark.parametrize("name", [MIXED, "jamba"])
    def test_a_step_of_prompts_that_fails_midway_is_repeated_from_the_states_before(
        self, make: MakeLLM, name: str
    ) -> None:
        llm = make(name)
        requests = [plan(llm, random_ids(count), max_new_tokens=9)[0] for count in (300, 5, 16, 150)]
        expected = [answer.token_ids for answer in ask(llm, requests)]
        failures = 0

        def check(module: Any, args: Any, output: Any) -> None:
            nonlocal failures
            if output.shape[1] > 40:  # after the layers have run
                failures += 1
                msg = "no room for so many tokens"
                raise torch.OutOfMemoryError(msg)

        inner = llm.pipeline.model.model
        handle = (inner.norm if name == MIXED else inner.final_layernorm).register_forward_hook(check)
        try:
            assert [answer.token_ids for answer in ask(llm, requests)] == expected
        finally:
            handle.remove()
        assert failures > 0
        for request, ids in zip(requests, expected, strict=True):
            assert ids == likeliest(llm, list(request.prompt_ids), ids)


class TestPrefixes:
    def test_the_next_turn_goes_on_from_the_end_of_the_last_prompt(self, make: MakeLLM) -> None:
        llm = make()
        prompt_ids = random_ids(70)
        answer = ids_after(llm, prompt_ids, max_new_tokens=20)
        turn = [*prompt_ids, *answer, *random_ids(30, seed=8)]
        [found] = ask(llm, plan(llm, turn, max_new_tokens=16))
        assert cached(found) == 64
        assert found.token_ids == generated_ids(llm.pipeline.model, turn, 16)
        assert cached_tokens(llm, turn) == [112]

    def test_a_beginning_that_two_prompts_share_is_kept_for_the_third(self, make: MakeLLM) -> None:
        llm = make()
        prompts = [[*random_ids(50), *random_ids(40, seed=seed)] for seed in (1, 2, 3)]
        for prompt_ids, expected in zip(prompts, (0, 0, 48), strict=True):
            [found] = ask(llm, plan(llm, prompt_ids, max_new_tokens=12))
            assert cached(found) == expected
            assert found.token_ids == generated_ids(llm.pipeline.model, prompt_ids, 12)

    @pytest.mark.parametrize("prefix_caching", [True, False])
    def test_samples_of_one_call_share_their_prompt(self, make: MakeLLM, prefix_caching: bool) -> None:
        llm = make("granitemoehybrid", prefix_caching=prefix_caching)
        answers = ask(llm, plan(llm, random_ids(45), n=3, max_new_tokens=12))
        assert [cached(answer) for answer in answers] == [0, 32, 32]
        expected = generated_ids(llm.pipeline.model, random_ids(45), 12)
        assert [answer.token_ids for answer in answers] == [expected] * 3

    def test_requests_without_prefix_caching_share_nothing(self, make: MakeLLM) -> None:
        llm = make(prefix_caching=False)
        assert [cached_tokens(llm, random_ids(45)) for _ in range(2)] == [[0], [0]]

    def test_short_prompts_are_not_kept(self, make: MakeLLM) -> None:
        llm = make()
        assert [cached_tokens(llm, random_ids(31)) for _ in range(2)] == [[0], [0]]

    def test_a_spoiled_state_fails_one_request_only(self, make: MakeLLM) -> None:
        llm = make()
        expected = ids_after(llm, random_ids(45))
        pool = engine_of(llm)._parts.states
        for tensor in pool.tensors.values():
            tensor.fill_(math.nan)
        with pytest.raises(GenerationError):
            ids_after(llm, random_ids(45))
        assert ids_after(llm, random_ids(45)) == expected

    def test_without_memory_for_kept_states_the_engine_says_so(self, make: MakeLLM) -> None:
        llm = make("mamba2", kv_cache_memory=2 * 3 * 22_528)
        assert "no prefix caching: there is no memory" in llm.engine_info.reason
        assert [cached_tokens(llm, random_ids(45)) for _ in range(2)] == [[0], [0]]

    @pytest.mark.parametrize("name", slow_but([MIXED], WITH_STATES))
    def test_many_prompts_that_begin_alike_get_their_own_tokens_in_little_memory(
        self, make: MakeLLM, name: str
    ) -> None:
        parts = engine_of(make(name))._parts
        token = sum(shape.token_bytes for shape in parts.probe.shapes)
        row = sum(shape.row_bytes for shape in parts.probe.states)
        llm = make(name, kv_cache_memory=max(2 * 14 * 16 * token, 2 * 8 * row))
        prompts = [[*random_ids((16, 40, 90)[i % 3]), *random_ids(1 + 7 * i % 40, seed=i)] for i in range(14)]
        for _ in range(2):
            answers = ask(llm, [plan(llm, p, max_new_tokens=3 + 5 * i % 17)[0] for i, p in enumerate(prompts)])
            for prompt_ids, answer in zip(prompts, answers, strict=True):
                assert answer.token_ids == likeliest(llm, prompt_ids, answer.token_ids)
        assert (sum(cached(answer) or 0 for answer in answers) > 0) == (name not in SINGLE_TOKENS)

    def test_a_model_whose_prompts_cannot_go_on_from_a_state_says_so(self, make: MakeLLM) -> None:
        llm = make("jamba")
        assert "no prefix caching and no parts of prompts" in llm.engine_info.reason
        assert [cached_tokens(llm, random_ids(45)) for _ in range(2)] == [[0], [0]]


class TestModel:
    def test_the_model_s_own_forward_stays_the_user_s_and_comes_back(self, make: MakeLLM) -> None:
        llm = make()
        model = llm.pipeline.model
        before = model(input_ids=torch.tensor([random_ids(20)])).logits
        assert llm.engine_info.name == "fast"
        patched = [module for module in model.modules() if isinstance(module.__dict__.get("forward"), ForwardPatch)]
        assert patched
        assert torch.equal(model(input_ids=torch.tensor([random_ids(20)])).logits, before)
        llm.unload()
        assert not [m for m in model.modules() if isinstance(m.__dict__.get("forward"), ForwardPatch)]

    def test_a_module_that_was_replaced_is_found_anew(self, make: MakeLLM) -> None:
        llm = make()
        ids_after(llm, random_ids(20), max_new_tokens=4)
        model = llm.pipeline.model
        model.model.layers[0] = type(model.model.layers[0])(model.config, 0).eval()
        found = ids_after(llm, random_ids(20), max_new_tokens=12)
        assert found == generated_ids(model, random_ids(20), 12)

    def test_batch_invariance_is_refused_with_the_reason(self, make: MakeLLM) -> None:
        with pytest.raises(UnsupportedError, match="keep a state"):
            make(batch_invariant=True).invoke("Sea")

    @pytest.mark.parametrize("name", slow_but([MIXED, "granitemoehybrid", "lfm2", "mamba2"], WITH_STATES))
    def test_states_make_no_decode_step_wait_for_the_device(self, name: str, tokenizer: Any) -> None:
        model = family_model(FAST[name])
        parts = EngineParts(
            model, limits_of(model, tokenizer), cache_budget=None, switch=None, fusion=None, no_fusion_reason=None
        )
        rows = torch.tensor([0, 2, parts.slots], dtype=torch.int32)
        zero = torch.zeros_like(rows)
        batch = Batch(table=zero[:, None], slots=rows, positions=zero, spans=(), decodes=True)
        modules = list(state_modules(model))
        assert modules
        assert all(isinstance(module.__dict__.get("forward"), ForwardPatch) for module in modules)
        with torch.no_grad(), WaitFinder() as finder:
            for module in modules:
                states = StateForward(parts.states, batch, None)
                with forward_context(ForwardContext(states=states)):
                    given = {"cache": DynamicCache()}
                    if name == "minimax":
                        given |= {"position_embeddings": None, "attention_mask": None}
                    module(*inputs_of(module, torch.ones(1, 3, 64)), **given)
        assert finder.found is None
        parts.close()

    @pytest.mark.slow
    def test_adapters_choose_their_rows(self, make: MakeLLM) -> None:
        peft = pytest.importorskip("peft")
        from tests.support.adapters import add_adapter, choose_adapter

        llm = make("lfm2")
        model = llm.pipeline.model
        targets = ["in_proj", "out_proj", "q_proj", "w1"]
        for seed, name in enumerate(("sql", "chat")):
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
            torch.manual_seed(seed)
            add_adapter(model, config, name)
        prompts = [random_ids(count, seed=count) for count in (40, 7, 19)]
        expected = {}
        for name in ("sql", "chat"):
            choose_adapter(model, name)
            expected[name] = [generated_ids(model, prompt, 16) for prompt in prompts]
        assert expected["sql"] != expected["chat"]
        engine = ContinuousEngine(llm.pipeline, adapters=AdapterSwitch(model, ("sql", "chat")))
        options = [GenerationOptions(max_new_tokens=16, eos_token_id=(), adapter=n) for n in ("sql", "chat")]
        requests = [plan_requests(p, given, engine.limits)[0] for given in options for p in prompts]
        answers: list[list[int]] = [[] for _ in requests]
        with engine.submit(requests) as stream:
            for chunk in stream:
                answers[chunk.row] += chunk.token_ids
        engine.close()
        assert answers == expected["sql"] + expected["chat"]
