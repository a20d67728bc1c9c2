"""Attentions of uncommon kinds in the running batch, one family of each: the tokens of the model alone, whatever runs.

The parametrized tests of `test_families` try all families, more slowly.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from tests.support.engine import ask, plan
from tests.support.families import FAST, family_model, generated_ids, likeliest_ids, random_ids
from tests.support.models import llm_of
from tests.support.selection import slow_but

pytestmark = pytest.mark.usefixtures("one_thread")

NEW_TOKENS = 20
SHARED = random_ids(36, seed=4)
PROMPTS = [random_ids(3), [*SHARED, *random_ids(4)], random_ids(50), [*SHARED, *random_ids(9)], random_ids(16)]
UNCOMMON = ("openai-gpt", "gpt_neo", "xglm", "git", "diffllama", "jetmoe")


def requests_of(llm: Any) -> list[Any]:
    return [plan(llm, prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("name", slow_but(["openai-gpt", "gpt_neo", "jetmoe"], UNCOMMON))
def test_tokens_are_the_model_s_own_in_a_batch_with_known_beginnings_and_in_a_small_cache(
    name: str, tokenizer: Any
) -> None:
    model = family_model(FAST[name])
    llm = llm_of(model, tokenizer)
    assert llm.engine_info.name == "fast", llm.engine_info.reason
    info = llm.engine_info
    token_bytes = info.kv_cache_bytes // (info.kv_cache_tokens + BLOCK_TOKENS)
    for is_second in (False, True):
        answers = ask(llm, requests_of(llm))
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert len(answer.token_ids) == NEW_TOKENS
            assert answer.token_ids == likeliest_ids(model, prompt, answer.token_ids)
        if is_second:
            cached = [answer.usage.cached_tokens if answer.usage else None for answer in answers]
            assert cached == [(len(prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS for prompt in PROMPTS]
    expected = [answer.token_ids for answer in answers]
    assert expected[2] == generated_ids(model, PROMPTS[2], NEW_TOKENS)
    assert min(len(set(ids)) for ids in expected) > 3
    llm.unload()
    small = llm_of(model, tokenizer, kv_cache_memory=9 * BLOCK_TOKENS * token_bytes)
    assert [answer.token_ids for answer in ask(small, requests_of(small))] == expected
    engine: Any = small._engine()
    assert engine._scheduler.preempted > 0
    assert engine._blocks.held == 0
    small.unload()


def test_values_of_diffllama_are_kept_twice_and_others_as_by_the_model(tokenizer: Any) -> None:
    """Each head of keys has both of the values that its two attentions would see."""
    of_token = {}
    for name in ("diffllama", "llama-grouped"):
        llm = llm_of(family_model(FAST[name]), tokenizer)
        of_token[name] = llm.engine_info.kv_cache_bytes // (llm.engine_info.kv_cache_tokens + BLOCK_TOKENS)
        llm.unload()
    assert of_token["diffllama"] * 2 == of_token["llama-grouped"] * 3


def test_the_user_s_own_calls_keep_the_model_s_attention(tokenizer: Any) -> None:
    model = family_model(FAST["gpt_neo"])
    ids = torch.tensor([random_ids(30)])
    with torch.no_grad():
        expected = model(ids, output_attentions=True)
        llm = llm_of(model, tokenizer)
        assert llm.engine_info.name == "fast"
        found = model(ids, output_attentions=True)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.attentions[1], expected.attentions[1])  # which the engine's forwards have not
    llm.unload()
    assert all("forward" not in vars(module) for module in model.modules())
