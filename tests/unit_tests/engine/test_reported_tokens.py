"""Log probabilities of tokens that a request names."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.generate import GenerateEngine
from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.result import Answers
from langchain_quantllm.errors import InvalidOptionError
from tests.support.engine import PROMPTS, ask, plan

NAMED = (4771, 1770, 17)  # among them tokens that are far from likely


def _named(requests: list[Request], ids: tuple[int, ...] = NAMED) -> list[Request]:
    return [dataclasses.replace(request, reported_ids=ids) for request in requests]


def _expected(llm: QuantizedHuggingFaceLLM, ids: list[int]) -> Any:
    with torch.no_grad():
        return llm.pipeline.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def test_named_tokens_are_reported_in_place_of_the_likeliest_beside_rows_that_name_none(
    llm: QuantizedHuggingFaceLLM,
) -> None:
    prompts = [llm.pipeline.tokenizer(text)["input_ids"] for text in PROMPTS]
    requests = [
        *_named(plan(llm, prompts[0], logprobs=0, max_new_tokens=1)),
        *plan(llm, prompts[1], logprobs=2, max_new_tokens=1),
        *plan(llm, prompts[2], max_new_tokens=1),
        *_named(plan(llm, prompts[3], logprobs=4, max_new_tokens=1), NAMED[::-1][:2]),
    ]
    answers = ask(llm, requests)
    for i, ids in ((0, NAMED), (3, NAMED[::-1][:2])):
        (report,) = answers[i].logprobs
        row = _expected(llm, prompts[i])
        assert [token for token, _ in report.top] == list(ids)
        # float32 over 30 layers of sums in another order
        assert [p for _, p in report.top] == pytest.approx(row[list(ids)].tolist(), abs=1e-3)
    assert [i for i, _ in answers[1].logprobs[0].top] == _expected(llm, prompts[1]).topk(2).indices.tolist()
    assert answers[2].logprobs == []


def test_the_pipeline_engine_reports_named_tokens_as_well(llm: QuantizedHuggingFaceLLM) -> None:
    ids = llm.pipeline.tokenizer(PROMPTS[0])["input_ids"]
    requests = _named(plan(llm, ids, logprobs=0, max_new_tokens=1))
    engine = GenerateEngine(llm.pipeline)
    answers = Answers(requests)
    with engine.submit(requests) as stream:
        for chunk in stream:
            answers.add(chunk)
    engine.close()
    assert [p for _, p in answers.rows[0].logprobs[0].top] == pytest.approx(
        _expected(llm, ids)[list(NAMED)].tolist(), abs=1e-3
    )


def test_a_named_token_outside_of_the_vocabulary_is_refused_before_it_reaches_the_batch(
    tiny_llm: QuantizedHuggingFaceLLM,
) -> None:
    with pytest.raises(InvalidOptionError, match="reported must lie below"):
        tiny_llm._engine().submit(_named(plan(tiny_llm, [1, 2, 3], logprobs=0), (10**6,)))
