"""Log probabilities of tokens that a request names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.generate import GenerateEngine
from langchain_quantllm.engine.request import Request, plan_requests
from langchain_quantllm.engine.result import Answers
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.options import GenerationOptions
from tests.support.engine import PROMPTS, ask, plan
from tests.support.models import llm_of, tiny_model

NAMED = (4771, 1770, 17)  # among them tokens that are far from likely


def _named(requests: list[Request], ids: tuple[int, ...] = NAMED) -> list[Request]:
    return [dataclasses.replace(request, reported_ids=ids) for request in requests]


def _expected(llm: QuantizedHuggingFaceLLM, ids: list[int]) -> Any:
    with torch.no_grad():
        return llm.pipeline.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)


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


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16])
def short(request: pytest.FixtureRequest, short_smollm2: Path) -> QuantizedHuggingFaceLLM:
    dtype = str(request.param).removeprefix("torch.")
    return QuantizedHuggingFaceLLM(model_id=str(short_smollm2), dtype=dtype, device="cpu", progress=False)


class TestIn16Bits:
    @staticmethod
    def _exact(llm: QuantizedHuggingFaceLLM, prompts: list[list[int]]) -> list[list[float]]:
        """Compute the logits of the named tokens of the model's own hidden states, in float32."""
        model, rows = llm.pipeline.model, []
        for ids in prompts:
            with torch.no_grad():
                hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            rows.append((hidden.float() @ model.lm_head.weight[list(NAMED)].float().T).tolist())
        return rows

    def test_differences_of_named_tokens_are_finer_than_the_model_s_logits(
        self, short: QuantizedHuggingFaceLLM
    ) -> None:
        prompts = [short.pipeline.tokenizer(f"{text} {i}")["input_ids"] for text in PROMPTS for i in range(6)]
        requests = [r for ids in prompts for r in _named(plan(short, ids, logprobs=0, max_new_tokens=1))]
        found = [[p for _, p in answer.logprobs[0].top] for answer in ask(short, requests)]
        exact = self._exact(short, prompts)
        differences = [row[0] - row[1] for row in found]
        # hidden states in 16 bits differ a little between two orders of sums, and move both logits together
        assert differences == pytest.approx([row[0] - row[1] for row in exact], abs=0.05)
        assert len(set(differences)) == len(differences)
        with torch.no_grad():
            own = [short.pipeline.model(torch.tensor([ids])).logits[0, -1].float() for ids in prompts]
        rounded = [float(row[NAMED[0]] - row[NAMED[1]]) for row in own]
        errors = [
            sum(abs(one - (row[0] - row[1])) for one, row in zip(values, exact, strict=True))
            for values in (differences, rounded)
        ]
        assert errors[0] < errors[1]

    def test_a_model_that_changes_its_logits_keeps_its_own(self, tokenizer: Any) -> None:
        model = tiny_model(len(tokenizer)).bfloat16()
        llm = llm_of(model, tokenizer)
        ids = tokenizer(PROMPTS[0])["input_ids"]
        handle = model.lm_head.register_forward_hook(lambda module, args, out: 3 * torch.tanh(out / 3))
        (answer,) = ask(llm, _named(plan(llm, ids, logprobs=0, max_new_tokens=1)))
        expected = _expected(llm, ids)[list(NAMED)]
        handle.remove()
        assert [p for _, p in answer.logprobs[0].top] == pytest.approx(expected.tolist(), abs=0.06)

    def test_the_model_is_left_as_it_was(self, short: QuantizedHuggingFaceLLM) -> None:
        ids = short.pipeline.tokenizer(PROMPTS[0])["input_ids"] * 12
        (first,) = ask(short, _named(plan(short, ids, logprobs=0, max_new_tokens=2)))
        (again,) = ask(short, _named(plan(short, ids, logprobs=0, max_new_tokens=2)))
        assert not short.pipeline.model.lm_head._forward_pre_hooks
        assert again.usage is not None
        assert again.usage.cached_tokens > 0  # a hook that stayed would have emptied the cache
        assert len(first.logprobs) == len(again.logprobs) == 2

    def test_batch_invariant_requests_get_the_same_bits_alone_and_beside_others(self, short_smollm2: Path) -> None:
        llm = QuantizedHuggingFaceLLM(
            model_id=str(short_smollm2), device="cpu", batch_invariant=True, prefix_caching=False, progress=False
        )
        prompts = [llm.pipeline.tokenizer(text)["input_ids"] for text in PROMPTS]
        options = GenerationOptions(max_new_tokens=1, logprobs=0, eos_token_id=())
        engine = llm._engine(options)
        made = [_named(plan_requests(ids, options, engine.limits, shares_prefix=False)) for ids in prompts]

        def reports(requests: list[Request]) -> list[Any]:
            answers = Answers(requests)
            with engine.submit(requests) as stream:
                for chunk in stream:
                    answers.add(chunk)
            return [answer.logprobs[0].top for answer in answers.rows]

        assert reports([one for (one,) in made]) == [reports(one)[0] for one in made]
