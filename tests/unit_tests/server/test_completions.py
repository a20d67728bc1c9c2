"""`/v1/completions`, `/tokenize` and `/detokenize`, as OpenAI's client sees them."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest

from langchain_quantllm import QuantizedHuggingFaceLLM
from tests.support.serving import Running

pytestmark = pytest.mark.enable_socket

MODEL, PROMPT = "acme/tiny", "The capital of France is"


def complete(client: openai.OpenAI, prompt: Any = PROMPT, **options: Any) -> Any:
    return client.completions.create(model=MODEL, prompt=prompt, **{"max_tokens": 8, "temperature": 0, **options})


def streamed(client: openai.OpenAI, prompt: Any = PROMPT, **options: Any) -> list[Any]:
    return list(complete(client, prompt, stream=True, **options))


def test_a_completion_is_that_of_the_class(client: openai.OpenAI, tiny: QuantizedHuggingFaceLLM) -> None:
    made = complete(client)
    assert made.choices[0].text == tiny.invoke(PROMPT, max_new_tokens=8)
    assert (made.model, made.object, made.choices[0].finish_reason) == (MODEL, "text_completion", "length")
    ids = tiny.get_token_ids(PROMPT)
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(ids), 8)
    assert made.usage.total_tokens == len(ids) + 8


def test_a_completion_has_sixteen_tokens_unless_it_says(client: openai.OpenAI) -> None:
    assert client.completions.create(model=MODEL, prompt=PROMPT).usage.completion_tokens == 16  # type: ignore[union-attr]


def test_token_ids_are_a_prompt_like_their_text(client: openai.OpenAI, tiny: QuantizedHuggingFaceLLM) -> None:
    ids = tiny.get_token_ids(PROMPT)
    made = complete(client, ids, extra_body={"return_token_ids": True}).choices[0]
    assert made.text == complete(client).choices[0].text
    assert made.prompt_token_ids == ids
    assert tiny.pipeline.tokenizer.decode(made.token_ids) == made.text
    assert len(made.token_ids) == 8


def test_no_text_depends_on_speculation(client: openai.OpenAI) -> None:
    text = "one two three four, one two three four, one two"
    made = {
        value: complete(client, text, max_tokens=24, extra_body={"speculation": value})
        for value in ("off", "forced", "ngram")
    }
    assert len({answer.choices[0].text for answer in made.values()}) == 1
    assert made["off"].usage.completion_tokens_details is None


def test_a_stream_joins_to_the_whole(client: openai.OpenAI) -> None:
    wanted: dict[str, Any] = {"logprobs": 2, "extra_body": {"return_token_ids": True}}
    whole = complete(client, **wanted).choices[0]
    parts = [event.choices[0] for event in streamed(client, **wanted)]
    assert "".join(part.text for part in parts) == whole.text
    assert [i for part in parts for i in part.token_ids] == whole.token_ids
    assert [part.prompt_token_ids for part in parts if hasattr(part, "prompt_token_ids")] == [whole.prompt_token_ids]
    for name in ("tokens", "text_offset"):
        assert [v for part in parts for v in getattr(part.logprobs, name)] == getattr(whole.logprobs, name)
    found = [v for part in parts for v in part.logprobs.token_logprobs]
    assert found == pytest.approx(whole.logprobs.token_logprobs, abs=1e-4)
    assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert len(parts) > 3


def test_a_stream_ends_with_the_usage_if_it_is_asked_for(client: openai.OpenAI) -> None:
    *events, last = streamed(client, stream_options={"include_usage": True})
    assert all(event.usage is None for event in events)
    assert last.choices == []
    assert last.usage.completion_tokens == 8


def test_prompts_come_in_their_order_with_n_texts_each(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "One, two,", "A"]
    options: dict[str, Any] = {"n": 2, "seed": 7, "temperature": 1.0}
    made = complete(client, prompts, **options)
    assert [choice.index for choice in made.choices] == list(range(6))
    alone = [choice.text for prompt in prompts for choice in complete(client, prompt, **options).choices]
    assert [choice.text for choice in made.choices] == alone
    assert len(set(alone)) == 6
    texts = [""] * 6
    for event in streamed(client, prompts, **options):
        texts[event.choices[0].index] += event.choices[0].text
    assert texts == alone


def test_lists_of_token_ids_are_several_prompts(client: openai.OpenAI, tiny: QuantizedHuggingFaceLLM) -> None:
    prompts = [tiny.get_token_ids(text) for text in (PROMPT, "One")]
    assert [c.text for c in complete(client, prompts).choices] == [
        c.text for c in complete(client, [PROMPT, "One"]).choices
    ]


def test_log_probabilities_are_those_of_the_class(client: openai.OpenAI, tiny: QuantizedHuggingFaceLLM) -> None:
    result = tiny.generate([PROMPT], max_new_tokens=8, logprobs=2)
    expected = result.generations[0][0].generation_info["logprobs"]["content"]  # type: ignore[index]
    found = complete(client, logprobs=2).choices[0].logprobs
    assert found.tokens == [each["token"] for each in expected]
    assert found.token_logprobs == pytest.approx([each["logprob"] for each in expected], abs=1e-4)
    for top, each in zip(found.top_logprobs, expected, strict=True):
        assert {each["token"], *(t["token"] for t in each["top_logprobs"])} == set(top)
    by_id = complete(client, logprobs=2, extra_body={"return_tokens_as_token_ids": True}).choices[0].logprobs
    assert by_id.tokens == [f"token_id:{each['token_id']}" for each in expected]
    assert complete(client, logprobs=0).choices[0].logprobs.top_logprobs is None


def test_a_text_ends_before_a_stop_string_and_at_a_stop_token(client: openai.OpenAI) -> None:
    whole = complete(client, extra_body={"return_token_ids": True}).choices[0]
    cut = whole.text[3:6]
    made = complete(client, stop=[cut]).choices[0]
    assert (made.text, made.finish_reason) == (whole.text.partition(cut)[0], "stop")
    third = whole.token_ids[2]
    made = complete(client, extra_body={"stop_token_ids": [third], "return_token_ids": True}).choices[0]
    assert made.finish_reason == "stop"
    assert made.token_ids == whole.token_ids[: whole.token_ids.index(third) + 1]


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"grammar": 'root ::= "a" | "b"'}, "a|b"),
        ({"json": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}}, r"\{.*\}"),
    ],
)
def test_structured_outputs_hold_the_text_to_a_form(client: openai.OpenAI, form: Any, pattern: str) -> None:
    made = complete(client, max_tokens=40, temperature=1.0, seed=1, extra_body={"structured_outputs": form}).choices[0]
    assert re.fullmatch(pattern, made.text, re.DOTALL)
    assert made.finish_reason == "stop"
    if "json" in form:
        assert isinstance(json.loads(made.text)["a"], bool)


def test_a_schema_may_be_the_response_format_of_a_completion(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert isinstance(
        json.loads(complete(client, max_tokens=40, extra_body={"response_format": wanted}).choices[0].text)["a"], bool
    )


def test_the_models_are_listed_with_their_context(client: openai.OpenAI) -> None:
    [card] = client.models.list().data
    assert (card.id, card.max_model_len) == (MODEL, 8192)  # type: ignore[attr-defined]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.models.retrieve("gpt")


def test_texts_become_token_ids_and_texts_again(server: Running, tiny: QuantizedHuggingFaceLLM) -> None:
    text = "Grüße, 日本! <|im_end|>"
    found = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == tiny.pipeline.tokenizer(text)["input_ids"]
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 8192
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}


def test_the_tokens_of_a_conversation_are_those_of_its_call(server: Running, client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    found = server.post("/tokenize", {"messages": messages}).json()
    made = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=1, extra_body={"return_token_ids": True}
    )
    assert found["tokens"] == made.prompt_token_ids  # type: ignore[attr-defined]
