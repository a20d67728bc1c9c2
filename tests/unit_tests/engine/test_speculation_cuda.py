"""Verify steps as CUDA graphs, each enqueued before the result of the one before is known. Skipped without a GPU.

Products of several rows round otherwise than those of one. So texts are drawn at a low temperature: among 49,152 tokens
of about the same probability, one draw in some hundred lies so near a border that rounding decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine import speculation
from tests.support.engine import AllowOnly, ask, ids_of, plan
from tests.support.families import FAST, WITH_STATES, family_model, random_ids
from tests.support.models import llm_of, tiny_model
from tests.support.speculation import AllowAhead, OneWay, check_equal, check_same, running, with_draft

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.1, "seed": 5}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy with logprobs": {"logprobs": 3},
    "sampled": SAMPLED,
    "sampled from few": {**SAMPLED, "top_k": 40, "top_p": 0.8},
    "penalized": {**SAMPLED, "repetition_penalty": 1.4},
    "several samples": {**SAMPLED, "n": 3},
    "no early end": {**SAMPLED, "min_new_tokens": 15, "eos_token_id": tuple(range(0, 49152, 3))},
    "masked": {**SAMPLED, "mask": lambda: AllowAhead(AllowOnly.IDS)},
}


@pytest.fixture(scope="module", autouse=True)
def _without_limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation, "DRAFTS_ON_GPUS", True)
        patch.setattr(speculation, "MOST_MASKED_ON_GPUS", 1000)
        yield


@pytest.fixture(scope="module")
def llm(tokenizer: Any) -> Iterator[QuantizedHuggingFaceLLM]:
    llm = llm_of(tiny_model(len(tokenizer), seed=3).cuda(), tokenizer)
    yield llm
    llm.unload()


def pairs(llm: QuantizedHuggingFaceLLM, prompts: list[list[int]], **options: Any) -> Any:
    return [
        [request for prompt in prompts for request in plan(llm, prompt, speculation=value, **options)]
        for value in ("off", "ngram")
    ]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_graphs_of_verify_steps_write_what_single_steps_write(
    llm: QuantizedHuggingFaceLLM, options: dict[str, Any]
) -> None:
    assert llm.engine_info.graphs
    assert llm.engine_info.no_speculation_reason is None
    for count in (1, 3, 9):
        prompts = [ids_of(9 + 7 * i, seed=i) for i in range(count)]
        check_same(llm, *pairs(llm, prompts, max_new_tokens=60, **options))
    engine: Any = llm._engine()
    assert engine._runner.verify_steps.no_graph_reason is None
    assert len(engine._runner.verify_steps._forwards) >= 3


def test_forced_tokens_take_few_steps(llm: QuantizedHuggingFaceLLM) -> None:
    with running(llm):
        [answer] = ask(llm, plan(llm, ids_of(9), lambda: OneWay((7, 8, 9, 31, 49151)), max_new_tokens=100))
    assert answer.token_ids == [7, 8, 9, 31, 49151] * 20
    assert answer.usage is not None
    assert answer.usage.accepted_tokens >= 80


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_draft_model_changes_no_token(llm: QuantizedHuggingFaceLLM, options: dict[str, Any]) -> None:
    drafting = with_draft(llm)
    draft = drafting._options(None, {}).draft
    assert drafting.engine_info.no_draft_reason is None
    for count in (1, 5):
        prompts = [ids_of(9 + 7 * i, seed=i) for i in range(count)]
        plain, speculating = (
            [r for p in prompts for r in plan(drafting, p, speculation=kind, draft=key, max_new_tokens=60, **options)]
            for kind, key in (("off", None), ("draft", draft))
        )
        expected = ask(drafting, plain)
        with running(drafting):
            answers = ask(drafting, speculating)
        check_equal(answers, expected)
        assert sum(answer.usage.accepted_tokens for answer in answers if answer.usage is not None) > 0
    drafting.draft_model.unload()


@pytest.mark.parametrize("name", [name for name in FAST if name not in WITH_STATES])
def test_families(name: str, tokenizer: Any) -> None:
    llm = llm_of(family_model(FAST[name]).cuda(), tokenizer)
    try:
        if llm.engine_info.name == "fast" and llm.engine_info.no_speculation_reason is None:
            prompts = [random_ids(count) for count in (12, 41)]
            check_same(llm, *pairs(llm, prompts, max_new_tokens=40))
    finally:
        llm.unload()
