"""Attention to the tokens that an indexer chooses: its memory, its parts, its check, adapters, and changed models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine import chosen_attention, indexed_attention
from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.attention import Batch, LayerPool, PagedForward, Span
from langchain_quantllm.engine.attention_interface import configs_of, paged_attention
from langchain_quantllm.engine.chosen_attention import attend_to_chosen
from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.forward_patch import ForwardPatch
from langchain_quantllm.engine.gather_attention import GatherAttention
from langchain_quantllm.engine.kv_cache import spoiled_blocks
from langchain_quantllm.engine.request import plan_requests
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.memory.estimate import estimate_config
from langchain_quantllm.options import GenerationOptions
from tests.support.engine import Background, ask, ids_after, plan
from tests.support.families import INDEXED, family_model, generated_ids, likeliest_ids, random_ids
from tests.support.models import forwards, llm_of, slowly
from tests.support.selection import slow_but

NAMES = list(INDEXED)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not NAMES, reason="this transformers is older than 5.24"),
]

FAMILY = "deepseek_v32"
SHARING = "glm_moe_dsa"
"""Its second layer takes over the choice of the first one."""

MakeLLM = Callable[..., QuantizedHuggingFaceLLM]


@pytest.fixture
def make(tokenizer: Any) -> Iterator[MakeLLM]:
    """Make LLMs over models of a family that the test may spoil."""
    made = []

    def make(name: str = FAMILY, most_chosen: int | None = None, **fields: Any) -> QuantizedHuggingFaceLLM:
        family = INDEXED[name]
        if most_chosen is not None:
            family = replace(family, options={**family.options, "index_topk": most_chosen})
        made.append(llm_of(family_model(family), tokenizer, **fields))
        return made[-1]

    yield make
    for llm in made:
        llm.unload()


def engine_of(llm: QuantizedHuggingFaceLLM) -> Any:
    return llm._engine()


class TestMemory:
    LATENT_BYTES, INDEX_BYTES = (40 + 8) * 4, 16 * 4

    @pytest.mark.parametrize(("name", "layers", "with_indexer"), [(FAMILY, 2, 2), (SHARING, 3, 2)])
    def test_a_token_takes_the_memory_of_its_latents_and_of_its_indexers_keys(
        self, make: MakeLLM, name: str, layers: int, with_indexer: int
    ) -> None:
        info = make(name, kv_cache_memory="1MiB").engine_info
        assert info.name == "fast", info.reason
        token_bytes = layers * self.LATENT_BYTES + with_indexer * self.INDEX_BYTES
        assert info.kv_cache_tokens == (2**20 // token_bytes // 16 - 1) * 16
        assert info.kv_cache_bytes == (info.kv_cache_tokens + 16) * token_bytes
        config = AutoConfig.for_model(name, **INDEXED[name].options)
        assert estimate_config(config, "none", dtype="bfloat16").kv_cache_bytes_per_token == token_bytes / 2

    def test_the_pools_take_as_much(self, make: MakeLLM) -> None:
        llm = make(SHARING, kv_cache_memory="1MiB")
        pools = engine_of(llm)._parts.pools
        assert [pool.index_keys is not None for pool in pools] == [True, False, True]
        assert sum(t.nbytes for pool in pools for t in pool.tensors) == llm.engine_info.kv_cache_bytes
        assert llm.memory_report().kv_pool_bytes == llm.engine_info.kv_cache_bytes

    def test_keys_of_an_indexer_that_are_no_numbers_spoil_their_block(self, make: MakeLLM) -> None:
        pools = engine_of(make(SHARING))._parts.pools
        pools[2].index_keys[3, 5] = torch.inf
        assert spoiled_blocks(pools, [1, 2, 3, 4]) == [3]


HEADS, KV_HEADS, DIM, VALUE = 4, 2, 6, 3
SPANS = ((0, 1, 40), (1, 3, 18), (2, 1, 4), (3, 2, 0))  # slot, new tokens, tokens before
TOKENS, MOST = 7, 5


class TestChosenTokens:
    def attend(self, chosen: torch.Tensor, query: torch.Tensor, pool: LayerPool, **options: Any) -> torch.Tensor:
        firsts = [sum(count for _, count, _ in SPANS[:i]) for i in range(len(SPANS))]
        spans = [Span(slot=s, first=f, position=p, count=c) for (s, c, p), f in zip(SPANS, firsts, strict=True)]
        batch = Batch(
            table=torch.arange(1, 13, dtype=torch.int32).view(4, 3),
            slots=torch.tensor([s for s, count, _ in SPANS for _ in range(count)], dtype=torch.int32),
            positions=torch.tensor([p + i for _, count, p in SPANS for i in range(count)], dtype=torch.int32),
            spans=spans,
            decodes=False,
        )
        forward = PagedForward(GatherAttention(), {0: pool}, batch, by_sdpa=False)
        forward._begin(0)
        found = attend_to_chosen(forward, chosen, query, 0.4, **options)
        assert forward.choosing == {0}
        assert forward.windows == {0: 0}
        return found

    @pytest.mark.parametrize("at_once", [2**26, 1])
    @pytest.mark.parametrize("has_sinks", [False, True])
    @pytest.mark.parametrize("softcap", [None, 2.0])
    def test_attention_sees_the_chosen_tokens_and_nothing_else(
        self, at_once: int, has_sinks: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(chosen_attention, "_GATHERED_BYTES", at_once)
        made = torch.Generator().manual_seed(0)
        pool = LayerPool(kv=torch.full((13, 16, KV_HEADS, DIM + VALUE), torch.nan), key_dim=DIM)
        query = torch.randn(1, HEADS, TOKENS, DIM, generator=made)
        sinks = torch.randn(HEADS, generator=made) if has_sinks else None
        chosen = torch.full((1, TOKENS, MOST), -1)
        expected = torch.empty(TOKENS, HEADS, VALUE)
        token = 0
        for slot, count, before in SPANS:
            for position in range(before, before + count):
                seen = torch.randperm(position + 1, generator=made)[:MOST]
                chosen[0, token, : len(seen)] = seen
                kv = torch.randn(len(seen), KV_HEADS, DIM + VALUE, generator=made)
                blocks = 1 + 3 * slot + seen // 16
                kv = torch.where(pool.kv[blocks, seen % 16].isnan(), kv, pool.kv[blocks, seen % 16])
                pool.kv[blocks, seen % 16] = kv
                for head in range(HEADS):
                    of_head = kv[:, head // (HEADS // KV_HEADS)]
                    scores = of_head[:, :DIM] @ query[0, head, token] * 0.4
                    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                    scores = scores if sinks is None else torch.cat([scores, sinks[head : head + 1]])
                    expected[token, head] = scores.softmax(0)[: len(seen)] @ of_head[:, DIM:]
                token += 1
        found = self.attend(chosen, query, pool, softcap=softcap, sinks=sinks)
        torch.testing.assert_close(found[0], expected)

    @pytest.mark.parametrize("options", [{"window": 8}, {"chunk": 8}])
    def test_a_window_beside_is_refused(self, options: dict[str, int]) -> None:
        pool = LayerPool(kv=torch.zeros(13, 16, KV_HEADS, DIM + VALUE), key_dim=DIM)
        with pytest.raises(UnsupportedError, match="chosen tokens of a window"):
            self.attend(torch.zeros(1, TOKENS, MOST), torch.zeros(1, HEADS, TOKENS, DIM), pool, **options)


class TestTokens:
    @pytest.mark.parametrize("name", slow_but([SHARING], NAMES))
    def test_long_prompts_go_on_in_chunks_and_parts_while_others_decode(
        self, make: MakeLLM, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        llm = make(name)
        # So that a chunk is scored in parts of 16 tokens, and no two sequences of other lengths together.
        monkeypatch.setattr(indexed_attention, "_SCORES", 2**10)
        short, long = random_ids(9), random_ids(300)
        call = Background(lambda: ids_after(llm, short, max_new_tokens=40))
        with forwards(llm, slowly(0.002)) as seen, call as beside:
            seen.wait_for(3)
            found = ids_after(llm, long, max_new_tokens=8)
        assert max(tokens for _, tokens in seen.shapes) < 150
        assert found == generated_ids(llm.pipeline.model, long, 8)
        assert beside.result == likeliest_ids(llm.pipeline.model, short, beside.result)

    @pytest.mark.parametrize("name", slow_but([SHARING], NAMES))
    def test_preempted_sequences_get_the_same_tokens(self, make: MakeLLM, name: str) -> None:
        parts = engine_of(make(name))._parts
        token = sum(shape.token_bytes for shape in parts.probe.shapes)
        llm = make(name, kv_cache_memory=13 * 16 * token)
        requests = [plan(llm, random_ids(30, seed=i), max_new_tokens=75)[0] for i in range(4)]
        answers = ask(llm, requests)
        assert engine_of(llm)._scheduler.preempted > 0
        for request, answer in zip(requests, answers, strict=True):
            assert len(answer.token_ids) == 75
            assert answer.token_ids == likeliest_ids(llm.pipeline.model, request.prompt_ids, answer.token_ids)

    def test_texts_up_to_the_number_of_chosen_tokens_see_all_of_their_tokens(self, make: MakeLLM) -> None:
        llm = make(most_chosen=100)
        prompts = [random_ids(60), random_ids(98)]
        answers = ask(llm, [plan(llm, prompt, max_new_tokens=12)[0] for prompt in prompts])
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer.token_ids == generated_ids(llm.pipeline.model, prompt, 12)

    @pytest.mark.parametrize("name", slow_but([SHARING], [SHARING, "hy_v4"]))
    def test_adapters_choose_their_rows(self, make: MakeLLM, name: str) -> None:
        peft = pytest.importorskip("peft")
        from tests.support.adapters import add_adapter, choose_adapter

        llm = make(name)
        model = llm.pipeline.model
        targets = ["wq_b", "wk", "weights_proj", "q_b_proj", "o_proj"]
        for seed, adapter in enumerate(("sql", "chat")):
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
            torch.manual_seed(seed)
            add_adapter(model, config, adapter)
        prompts = [random_ids(count, seed=count) for count in (40, 7, 19)]
        expected = {}
        for adapter in ("sql", "chat"):
            choose_adapter(model, adapter)
            expected[adapter] = [generated_ids(model, prompt, 16) for prompt in prompts]
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


class TestCheck:
    """A faulty choice is noticed when the engine is made, also where no text of the check is long enough for one."""

    def reason(self, make: MakeLLM, **fields: Any) -> str:
        info = make(most_chosen=400, **fields).engine_info
        assert info.name == "pipeline", "the fault was not noticed"
        return info.reason

    def test_keys_at_other_places_are_noticed(self, make: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
        update = indexed_attention._Part.update
        monkeypatch.setattr(
            indexed_attention._Part, "update", lambda part, pool, keys: update(part, pool, keys).roll(1, 1)
        )
        assert "its indexers choose other tokens" in self.reason(make)

    def test_keys_that_decode_steps_lack_are_noticed(self, make: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
        update = indexed_attention._Part.update

        def wrong(part: Any, pool: LayerPool, keys: torch.Tensor) -> torch.Tensor:
            return update(part, pool, keys if part.is_one_row else torch.zeros_like(keys))

        monkeypatch.setattr(indexed_attention._Part, "update", wrong)
        assert "its indexers choose other tokens" in self.reason(make)

    def test_attention_to_others_than_the_chosen_tokens_is_noticed(
        self, make: MakeLLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gather = chosen_attention._gather
        monkeypatch.setattr(
            chosen_attention, "_gather", lambda pool, table, slots, chosen: gather(pool, table, slots, chosen - 1)
        )
        assert "its logits over KV cache blocks are not its own" in self.reason(make)

    def test_an_indexer_whose_indices_reach_no_attention_is_noticed(self, make: MakeLLM) -> None:
        llm = make(SHARING)
        layer = llm.pipeline.model.model.layers[1].self_attn
        own = type(layer).forward

        def forgets(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = self.config
            if self is not layer or given._attn_implementation in ("eager", "sdpa"):
                return own(self, *args, **kwargs)
            self.config = type("Plain", (), {"_attn_implementation": "sdpa"})
            try:
                return own(self, *args, **kwargs)
            finally:
                self.config = given

        layer.forward = forgets.__get__(layer)
        assert llm.engine_info.name == "pipeline"

    def test_how_far_it_went_is_in_the_engine_s_reason(self, make: MakeLLM) -> None:
        assert "with fewer chosen" not in make().engine_info.reason
        info = make(most_chosen=3000).engine_info
        assert "sees 3000 chosen tokens" in info.reason
        assert "the check was of texts of 24 tokens, with fewer chosen" in info.reason

    @pytest.mark.parametrize("name", slow_but([SHARING, "dots3_note_text"], NAMES))
    def test_models_in_16_bits_pass_it(self, name: str, tokenizer: Any) -> None:
        family = INDEXED[name]
        dense = {"mlp_layer_types": ["dense"] * family.options["num_hidden_layers"]}  # no experts to choose as well
        model = family_model(replace(family, options={**family.options, **dense})).to(torch.bfloat16)
        llm = llm_of(model, tokenizer, kv_cache_memory="2MiB")
        assert llm.engine_info.name == "fast", llm.engine_info.reason
        llm.unload()


class TestModel:
    def test_no_decode_step_is_a_cuda_graph(self, make: MakeLLM) -> None:
        assert "an indexer chooses" in engine_of(make())._parts._no_graph_reason()

    def test_the_model_s_own_forward_stays_the_user_s_and_comes_back(self, make: MakeLLM) -> None:
        llm = make(SHARING)
        model = llm.pipeline.model
        given = torch.tensor([random_ids(30)])
        with torch.no_grad():
            before = model(given).logits
            assert llm.engine_info.name == "fast"
            assert [m for m in model.modules() if isinstance(m.__dict__.get("forward"), ForwardPatch)]
            assert torch.equal(model(given).logits, before)
        llm.unload()
        assert not [m for m in model.modules() if isinstance(m.__dict__.get("forward"), ForwardPatch)]

    @pytest.mark.parametrize("name", slow_but([SHARING, "hy_v4"], NAMES))
    def test_other_threads_attend_to_the_chosen_tokens_while_the_engine_runs(self, make: MakeLLM, name: str) -> None:
        model = make(name).pipeline.model
        given = torch.tensor([random_ids(30)])

        def logits() -> torch.Tensor:
            with torch.no_grad():
                return model(given).logits  # type: ignore[no-any-return]

        before = logits()
        batch = Batch(table=given, slots=given, positions=given, spans=(), decodes=False)
        context = ForwardContext(attention=PagedForward(GatherAttention(), [], batch, by_sdpa=False))
        with paged_attention(context, configs_of(model)), Background(logits) as beside:
            pass
        torch.testing.assert_close(beside.result, before)

    def test_changed_weights_of_an_indexer_count_from_the_next_request_on(self, make: MakeLLM) -> None:
        llm = make()
        model, ids = llm.pipeline.model, random_ids(40)
        before = ids_after(llm, ids, max_new_tokens=12)
        layer = model.model.layers[0].self_attn
        layer.indexer = type(layer.indexer)(model.config, 0).eval()
        for weight in layer.indexer.parameters():
            torch.nn.init.normal_(weight, 0.0, 0.3, generator=torch.Generator().manual_seed(1))
        after = ids_after(llm, ids, max_new_tokens=12)
        assert after == generated_ids(model, ids, 12) != before

    def test_batch_invariance_is_refused_with_the_reason(self, make: MakeLLM) -> None:
        with pytest.raises(UnsupportedError, match="an indexer chooses"):
            make(batch_invariant=True).invoke("Sea")
