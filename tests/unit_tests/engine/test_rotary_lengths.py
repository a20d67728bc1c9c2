"""Rotary frequencies that follow from a text's length: each sequence of a batch gets those that it would get alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.engine.forward_context import ForwardContext, forward_context
from langchain_quantllm.engine.rotary_lengths import RotaryLengths
from langchain_quantllm.errors import UnsupportedError
from tests.support.families import FAST, ORIGINAL_CONTEXT, family_model, generated_ids, random_ids
from tests.support.models import llm_of
from tests.support.selection import slow_but
from tests.unit_tests.engine.test_families import Case, Visit, complete, run_visits

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = ["phi3-longrope", "phi3-longrope-partial", "phimoe-longrope", "llama-longrope", "minicpm3-longrope"]
TEXT = random_ids(300, seed=5)


@pytest.fixture(scope="module", params=slow_but(["phi3-longrope-partial", "llama-longrope"], LONG))
def case(request: pytest.FixtureRequest, tokenizer: Any) -> Iterator[Case]:
    model = family_model(FAST[request.param])
    llm = llm_of(model, tokenizer)
    yield Case(request.param, model, llm)
    llm.unload()


def assert_own_texts(case: Case, llm: QuantizedHuggingFaceLLM, visits: list[Visit]) -> int:
    """Run visits in one batch, and compare each one's tokens with `generate`, alone; returns the forwards."""
    answers, count = run_visits(llm, visits)
    for visit, answer in zip(visits, answers, strict=True):
        assert answer.error is None
        assert answer.token_ids == generated_ids(case.model, visit.prompt_ids, visit.new_tokens), len(visit.prompt_ids)
    return count


@pytest.mark.parametrize("tokens", [ORIGINAL_CONTEXT - 9, ORIGINAL_CONTEXT, ORIGINAL_CONTEXT + 1])
def test_a_text_goes_on_beyond_the_original_length_as_in_generate(case: Case, tokens: int) -> None:
    assert case.llm.engine_info.name == "fast", case.llm.engine_info.reason
    prompt_ids = random_ids(tokens)
    expected = generated_ids(case.model, prompt_ids, 40)
    assert len(set(expected)) > 4
    assert complete(case.llm, prompt_ids, 40).token_ids == expected


BESIDE = [
    Visit(random_ids(110), 60),  # grows beyond the length of 128
    Visit(random_ids(20), 90),
    Visit(TEXT, 24, after=4),  # is longer, and comes in chunks
    Visit(random_ids(127), 12, after=8),
    Visit(random_ids(128), 1, after=10),
    Visit(random_ids(160), 30, after=16),
    Visit(random_ids(100), 28, after=20),
    Visit(random_ids(100, seed=1), 29, after=20),
]


def test_short_and_long_texts_in_one_batch_keep_their_frequencies(case: Case) -> None:
    count = assert_own_texts(case, case.llm, BESIDE)
    assert count < 0.75 * sum(visit.new_tokens for visit in BESIDE)  # else they ran one after another


def test_preempted_texts_go_on_as_before(case: Case, tokenizer: Any) -> None:
    info = case.llm.engine_info
    token_bytes = info.kv_cache_bytes // (info.kv_cache_tokens + 16)
    llm = llm_of(case.model, tokenizer, kv_cache_memory=22 * 16 * token_bytes)
    visits = [
        Visit(random_ids(100, seed=2), 60),
        Visit(random_ids(90, seed=3), 60),
        Visit(random_ids(110, seed=4), 50, after=2),
        Visit(random_ids(150, seed=5), 40, after=4),
    ]
    assert_own_texts(case, llm, visits)
    engine = llm._engine(None)
    assert isinstance(engine, ContinuousEngine)
    assert engine._scheduler.preempted > 0
    llm.unload()


def test_prompts_within_the_original_length_share_no_blocks_with_longer_ones(case: Case) -> None:
    llm = QuantizedHuggingFaceLLM(pipeline=case.llm.pipeline)
    ids = random_ids(180, seed=8)
    for count, cached in ((100, 0), (140, 0), (120, 96), (180, 128), (128, 112)):
        answer = complete(llm, ids[:count], 8)
        assert answer.token_ids == generated_ids(case.model, ids[:count], 8), count
        assert answer.usage is not None
        assert answer.usage.cached_tokens == cached, count


def test_a_text_that_has_grown_is_found_by_the_next_prompt_where_its_keys_are_the_same(case: Case) -> None:
    llm = QuantizedHuggingFaceLLM(pipeline=case.llm.pipeline)
    prompt_ids = random_ids(120, seed=9)
    text = complete(llm, prompt_ids, 40).token_ids
    longer = [*prompt_ids, *text, *random_ids(5)]
    answer = complete(llm, longer, 8)
    assert answer.token_ids == generated_ids(case.model, longer, 8)
    # The Phis compute all anew for a long text; others keep the first keys, rotated for a short one.
    assert answer.usage is not None
    assert answer.usage.cached_tokens == (144 if "phi" in case.name else 0)


def test_samples_of_one_prompt_grow_beyond_the_original_length(case: Case) -> None:
    llm = QuantizedHuggingFaceLLM(pipeline=case.llm.pipeline, prefix_caching=False)
    prompt_ids = random_ids(120, seed=11)
    expected = generated_ids(case.model, prompt_ids, 20)
    assert_own_texts(case, llm, [Visit(prompt_ids, 20), Visit(prompt_ids, 20, after=1)])
    assert complete(llm, prompt_ids, 20).token_ids == expected


def test_calls_of_the_model_between_requests_change_nothing(case: Case) -> None:
    ids = random_ids(60, seed=12)
    first = complete(case.llm, ids, 12)
    generated_ids(case.model, random_ids(200), 4)  # leaves the model with the factors of a long text
    second = complete(case.llm, ids, 12)
    assert first.token_ids == second.token_ids == generated_ids(case.model, ids, 12)
    assert second.usage is not None
    assert second.usage.cached_tokens == 48  # the model counts as unchanged


def test_the_frequencies_of_a_forward_are_those_of_each_tokens_text() -> None:
    model = family_model(FAST["phi3-longrope-partial"])
    rotary = next(module for module in model.modules() if hasattr(module, "inv_freq"))
    positions = torch.tensor([[5, 120, 130, 5]])
    x = torch.zeros(1, 4, 64)
    short = rotary(x, positions[:, :2].clone())
    long = rotary(x, positions)
    lengths = RotaryLengths(model, 512)
    with forward_context(ForwardContext(text_lengths=torch.tensor([128, 121, 131, 129], dtype=torch.int32))):
        ours = rotary(x, position_ids=positions)
    for mine, within, beyond in zip(ours, short, long, strict=True):
        torch.testing.assert_close(mine[:, :2], within)
        torch.testing.assert_close(mine[:, 2:], beyond[:, 2:])
    lengths.close()
    assert "forward" not in vars(rotary)


def test_dynamic_frequencies_of_a_context_beyond_the_original_one_are_refused() -> None:
    model = family_model(FAST["llama-dynamic-rope"])
    RotaryLengths(model, 512).close()
    with pytest.raises(UnsupportedError, match="'dynamic' rotary positions change with every length beyond 512"):
        RotaryLengths(model, 513)
