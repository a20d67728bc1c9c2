"""Keys and values that are no numbers stay with the sequence that wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.request import Request
from langchain_quantllm.errors import GenerationError
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
from tests.support.families import FAST, INDEXED, family_model, random_ids
from tests.support.models import fail_at, forwards, llm_of, slowly, tiny_model, wait_for_rest, wait_until
from tests.support.selection import slow_but

pytestmark = pytest.mark.usefixtures("one_thread")

BAD = 7
"""A token without numbers: it stands for a text that overflows float16."""


@pytest.fixture
def spoiled(tokenizer: Any) -> Iterator[QuantizedHuggingFaceLLM]:
    """An LLM that knows no numbers for one token, with room for four sequences."""
    model = tiny_model(len(tokenizer))
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = torch.nan
    llm = llm_of(model, tokenizer, kv_cache_memory=40 * ONE_SEQUENCE)
    assert llm.engine_info.name == "fast"
    yield llm
    llm.unload()


def fill_with_nan(llm: QuantizedHuggingFaceLLM) -> None:
    """Leave NaN in every block that holds nothing, block 0 included."""
    engine: Any = llm._engine()
    wait_for_rest()
    assert engine._blocks.held == 0
    engine._reset_cache()
    for tensor in (tensor for pool in engine._parts.pools for tensor in pool.tensors):
        tensor.fill_(torch.nan)


NAN_FAMILIES = ["llama-grouped", "mistral-window", "gemma2", "qwen2-window"]


def requests_of_all_kinds(llm: QuantizedHuggingFaceLLM, **options: Any) -> list[Request]:
    """Greedy and seeded ones, longer than a chunk, shorter than a block, with a beginning in common."""
    common = random_ids(40)
    return [
        *plan(llm, random_ids(3), max_new_tokens=30, **options),
        *plan(llm, [*common, *random_ids(9)], max_new_tokens=20, **options),
        *plan(llm, [*common, *random_ids(21)], max_new_tokens=8, do_sample=True, top_k=30, seed=4, n=2, **options),
        *plan(llm, random_ids(290), max_new_tokens=12, **options),
        *[request for i in range(6) for request in plan(llm, random_ids(17 + i), max_new_tokens=70, **options)],
        *plan(llm, random_ids(32), max_new_tokens=17, do_sample=True, temperature=1.3, seed=5, **options),
    ]


@pytest.mark.parametrize(
    "family",
    slow_but(NAN_FAMILIES, [*NAN_FAMILIES, "gpt_oss", "llama4", "bloom", *INDEXED]),
)
@pytest.mark.parametrize("is_tight", [False, True])
def test_free_blocks_full_of_nan_change_no_token(tokenizer: Any, family: str, is_tight: bool) -> None:
    model = family_model(FAST[family])
    fresh = llm_of(model, tokenizer)
    expected = [answer.token_ids for answer in ask(fresh, requests_of_all_kinds(fresh))]
    engine: Any = fresh._engine()
    block_bytes = sum(tensor[0].nbytes for pool in engine._parts.pools for tensor in pool.tensors)
    fresh.unload()
    llm = llm_of(model, tokenizer, kv_cache_memory=26 * block_bytes if is_tight else None)
    fill_with_nan(llm)
    requests = requests_of_all_kinds(llm)
    for _ in range(2):  # the second time with shared blocks
        assert [answer.token_ids for answer in ask(llm, requests)] == expected
    engine = llm._engine()
    frees_blocks = family == "mistral-window"  # as all of its layers have one: enough for the others
    assert (engine._scheduler.preempted > 0) == (is_tight and not frees_blocks)
    llm.unload()


class TestSpoiledSequences:
    GOOD = (5, 150, 20, 70)

    def test_one_cancelled_in_the_middle_of_its_prompt_leaves_nothing_to_others(
        self, spoiled: QuantizedHuggingFaceLLM
    ) -> None:
        good = [plan(spoiled, ids_of(count))[0] for count in self.GOOD]
        expected = [answer.token_ids for answer in ask(spoiled, [replace(r, shares_prefix=False) for r in good])]
        engine = spoiled._engine()
        with forwards(spoiled, slowly(0.005)) as seen:
            stream = engine.submit(plan(spoiled, [BAD] * 3000, max_new_tokens=6))
            seen.wait_for(2)
            stream.close()
            wait_until(lambda: engine._blocks.held == 0)
            assert seen.count < 6, "it was not cancelled in the middle"
        for _ in range(2):
            assert [answer.token_ids for answer in ask(spoiled, good)] == expected

    def test_the_beginning_that_it_has_in_common_with_others_stays_sound(
        self, spoiled: QuantizedHuggingFaceLLM
    ) -> None:
        """In the step that computes it, and afterwards in the cache."""
        common = ids_of(50)
        requests = [plan(spoiled, [*common, *more])[0] for more in (ids_of(3), [BAD] * 9, ids_of(14))]
        alone = [ask(spoiled, [replace(r, shares_prefix=False)])[0].token_ids for r in (requests[0], requests[2])]
        streams = [spoiled._engine().submit([request]) for request in (requests[1], requests[0], requests[2])]
        with pytest.raises(GenerationError, match="not numbers"):
            list(streams[0])
        assert [[i for chunk in stream for i in chunk.token_ids] for stream in streams[1:]] == alone
        assert cached_tokens(spoiled, [*common, *ids_of(5, seed=1)]) == [48]

    def test_its_own_blocks_are_not_found_again(self, spoiled: QuantizedHuggingFaceLLM) -> None:
        """The prompt runs again once the cause has gone."""
        prompt_ids = [*ids_of(20), BAD, *ids_of(30)]
        for _ in range(2):
            with pytest.raises(GenerationError, match="not numbers"):
                ids_after(spoiled, prompt_ids)
        wait_for_rest()
        engine: Any = spoiled._engine()
        weight = spoiled.pipeline.model.get_input_embeddings().weight
        weight.detach().numpy()[BAD] = 0.25  # which no counter of versions sees
        assert ids_after(spoiled, prompt_ids) == ids_after(spoiled, prompt_ids)
        assert engine._blocks.held == 0

    def test_blocks_that_running_sequences_hold_are_not_found_again(self, spoiled: QuantizedHuggingFaceLLM) -> None:
        engine: Any = spoiled._engine()
        blocks = engine._blocks
        sequence_blocks = [blocks.take() for _ in range(2)]
        root = blocks.new_prefix_id()
        blocks.register(sequence_blocks[0], root, [1] * 16)
        blocks.discard(sequence_blocks)
        assert blocks.find(root, [1] * 16) is None
        blocks.release(sequence_blocks)
        blocks.check_integrity()
        assert blocks.held == 0

    def test_a_failed_step_with_nan_leaves_the_next_requests_alone(self, spoiled: QuantizedHuggingFaceLLM) -> None:
        expected = ids_after(spoiled, ids_of(40))
        with forwards(spoiled, fail_at(2, RuntimeError("broken"))), pytest.raises(GenerationError):
            ids_after(spoiled, [BAD] * 1500)
        assert ids_after(spoiled, ids_of(40)) == expected

    def test_one_that_fails_while_others_run_leaves_them_alone(self, spoiled: QuantizedHuggingFaceLLM) -> None:
        expected = ids_after(spoiled, ids_of(3), max_new_tokens=60)
        with (
            forwards(spoiled, slowly(0.002)) as seen,
            Background(lambda: ids_after(spoiled, ids_of(3), max_new_tokens=60)) as other,
        ):
            for count in (3, 20, 33):
                seen.wait_for(seen.count + 2)
                with pytest.raises(GenerationError, match="not numbers"):
                    ids_after(spoiled, [*ids_of(count), BAD])
        assert other.result == expected


@pytest.mark.parametrize("engine", ["fast", "pipeline"])
def test_one_that_has_ended_before_fails_no_other_of_its_call(spoiled: QuantizedHuggingFaceLLM, engine: str) -> None:
    """`generate` goes on running a row that has ended, with its last token first."""
    llm = spoiled if engine == "fast" else on_pipeline(spoiled)
    requests = [
        *plan(llm, ids_of(9), mask=lambda: AllowOnly((BAD,)), eos_token_id=(BAD,)),
        *plan(llm, ids_of(20), mask=lambda: AllowOnly((31, 32)), eos_token_id=(BAD,)),
    ]
    answers = ask(llm, requests)
    assert [(len(answer.token_ids), answer.finish_reason) for answer in answers] == [(1, "stop"), (12, "length")]


def test_preempted_sequences_and_spoiled_ones_share_blocks_in_turns(tokenizer: Any, make_tiny: MakeLLM) -> None:
    model = tiny_model(len(tokenizer), seed=3)
    llm = llm_of(model, tokenizer, kv_cache_memory=2 * ONE_SEQUENCE)
    good = [plan(llm, ids_of(count), max_new_tokens=60)[0] for count in (20, 17, 30)]
    expected = [answer.token_ids for answer in ask(make_tiny(), good)]
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = torch.nan
    engine: Any = llm._engine()
    for _ in range(2):
        streams = []
        for request in good:
            streams.append(engine.submit([request]))
            streams.append(engine.submit(plan(llm, [*ids_of(18), BAD], max_new_tokens=60)))
        found = []
        for i, stream in enumerate(streams):
            if i % 2:
                with pytest.raises(GenerationError, match="not numbers"):
                    list(stream)
            else:
                found.append([token for chunk in stream for token in chunk.token_ids])
        assert found == expected
    assert engine._scheduler.preempted > 0
    wait_until(lambda: engine._blocks.held == 0)
    engine._blocks.check_integrity()
    llm.unload()
