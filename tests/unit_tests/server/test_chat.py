"""`/v1/chat/completions`, with OpenAI's client and LangChain's class for it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from langchain_quantllm import ChatQuantizedHuggingFace
from tests.support.chat_images import chat_of
from tests.support.serving import Running, serving
from tests.support.vision import make_vision_checkpoint, picture, png

pytestmark = pytest.mark.enable_socket

MODEL = "acme/tiny"
QUESTION: list[Any] = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Where is Oslo?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Get the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 6}},
            "required": ["city"],
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}


class Place(BaseModel):
    """A place."""

    name: str = Field(max_length=6)
    is_city: bool


def ask(client: openai.OpenAI, messages: Any = QUESTION, **options: Any) -> Any:
    given = {"max_tokens": 8, "temperature": 0, **options}
    return client.chat.completions.create(model=MODEL, messages=messages, **given)


def langchain_chat(server: Running, **options: Any) -> ChatOpenAI:
    given = {"max_tokens": 80, "temperature": 0, "max_retries": 0, **options}
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", model=MODEL, **given)


def test_an_answer_is_that_of_the_class(client: openai.OpenAI, tiny_chat: ChatQuantizedHuggingFace) -> None:
    expected = tiny_chat.invoke([SystemMessage("Be short."), HumanMessage("Where is Oslo?")], max_tokens=8)
    made = ask(client)
    assert made.choices[0].message.content == expected.content
    assert (made.choices[0].message.role, made.choices[0].finish_reason) == ("assistant", "length")
    assert made.usage.prompt_tokens == expected.usage_metadata["input_tokens"]  # type: ignore[index]
    again = ask(client, max_tokens=openai.NOT_GIVEN, max_completion_tokens=8)
    assert again.choices[0].message.content == expected.content
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_a_stream_of_deltas_joins_to_the_whole(client: openai.OpenAI) -> None:
    events = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == ask(client).choices[0].message.content
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    assert events[-1].usage.completion_tokens == 8
    assert len(events) > 5


def test_several_answers_share_a_prompt_and_a_stream(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 5}
    texts = [choice.message.content for choice in ask(client, **options).choices]
    assert len(set(texts)) == 3
    parts = ["", "", ""]
    for event in ask(client, stream=True, **options):
        parts[event.choices[0].index] += event.choices[0].delta.content or ""
    assert parts == texts


def test_log_probabilities_name_tokens_their_bytes_and_alternatives(client: openai.OpenAI) -> None:
    [choice] = ask(client, logprobs=True, top_logprobs=2).choices
    assert len(choice.logprobs.content) == 8
    for each in choice.logprobs.content:
        assert len(each.top_logprobs) == 2
        assert each.bytes is None or bytes(each.bytes).decode() == each.token
        assert each.logprob == pytest.approx(each.top_logprobs[0].logprob)  # greedy
    parts = [p for e in ask(client, logprobs=True, stream=True) for p in (e.choices[0].logprobs or [])]
    found = [p for name, value in parts if name == "content" for p in value]
    assert [p.token for p in found] == [p.token for p in choice.logprobs.content]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_has_arguments_of_its_schema(client: openai.OpenAI, choice: Any) -> None:
    tools = [WEATHER] if choice == "required" else [CLOCK, WEATHER]
    made = ask(client, tools=tools, tool_choice=choice, max_tokens=80).choices[0]
    assert made.finish_reason == "tool_calls"
    assert made.message.content is None
    call = made.message.tool_calls[0]
    assert call.function.name == "weather"
    assert list(json.loads(call.function.arguments)) == ["city"]


def test_a_streamed_call_joins_to_the_whole_one(client: openai.OpenAI) -> None:
    wanted: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 80}
    whole = ask(client, parallel_tool_calls=False, **wanted).choices[0].message.tool_calls
    deltas = [e.choices[0] for e in ask(client, stream=True, parallel_tool_calls=False, **wanted)]
    calls = [call for choice in deltas for call in choice.delta.tool_calls or ()]
    assert {call.index for call in calls} == {0}
    assert [call.function.name for call in calls if call.function.name] == ["weather"]
    assert json.loads("".join(call.function.arguments for call in calls)) == json.loads(whole[0].function.arguments)
    assert len([call.id for call in calls if call.id]) == 1
    assert deltas[-1].finish_reason == "tool_calls"
    assert len(calls) > 2


def test_no_tool_is_called_under_the_choice_none(client: openai.OpenAI) -> None:
    made = ask(client, tools=[WEATHER], tool_choice="none").choices[0]
    assert made.message.tool_calls is None
    assert made.message.content == ask(client).choices[0].message.content


def test_results_of_calls_go_on_in_the_conversation(client: openai.OpenAI, tiny_chat: ChatQuantizedHuggingFace) -> None:
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    same = [
        HumanMessage("Weather?"),
        AIMessage("", tool_calls=[{"name": "weather", "args": {"city": "Oslo"}, "id": "c1"}]),
        ToolMessage("rain", tool_call_id="c1"),
    ]
    expected = tiny_chat.bind_tools([WEATHER], tool_choice="none").invoke(same, max_tokens=8)
    assert ask(client, turns, tools=[WEATHER], tool_choice="none").choices[0].message.content == expected.content
    # A call that an answer broke off is text of the conversation.
    function["arguments"] = '{"city": "Os'
    assert ask(client, turns).choices[0].finish_reason == "length"


def test_an_answer_has_the_form_of_a_schema(client: openai.OpenAI) -> None:
    schema = {"name": "place", "schema": Place.model_json_schema(), "strict": True}
    made = ask(client, response_format={"type": "json_schema", "json_schema": schema}, max_tokens=80)
    Place.model_validate_json(made.choices[0].message.content)
    made = ask(client, response_format={"type": "json_object"}, max_tokens=200)
    assert isinstance(json.loads(made.choices[0].message.content), dict)
    made = ask(client, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert made.choices[0].message.content in ("yes", "no")


def test_the_parse_method_of_the_client_gives_objects(client: openai.OpenAI) -> None:
    made = client.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=Place, max_tokens=80)
    assert isinstance(made.choices[0].message.parsed, Place)


def test_langchains_class_for_openai_invokes_streams_and_calls(
    server: Running, tiny_chat: ChatQuantizedHuggingFace
) -> None:
    chat = langchain_chat(server, max_tokens=8)
    expected = tiny_chat.invoke("Where is Oslo?", max_tokens=8)
    answer = chat.invoke("Where is Oslo?")
    assert answer.content == expected.content
    assert answer.usage_metadata["input_tokens"] == expected.usage_metadata["input_tokens"]  # type: ignore[index]
    assert "".join(chunk.text for chunk in chat.stream("Where is Oslo?")) == expected.content
    chat = langchain_chat(server)
    [call, *_] = chat.bind_tools([WEATHER], tool_choice="weather").invoke("Weather in Oslo?").tool_calls
    assert (call["name"], list(call["args"])) == ("weather", ["city"])
    assert isinstance(chat.with_structured_output(Place).invoke("Oslo"), Place)


async def test_langchains_class_for_openai_runs_beside_the_event_loop(server: Running) -> None:
    chat = langchain_chat(server, max_tokens=4)
    answers = await chat.abatch(["One", "Two", "One"])
    assert answers[0].content == answers[2].content
    parts = [chunk.text async for chunk in chat.astream("One")]
    assert "".join(parts) == answers[0].content


def test_an_image_comes_in_a_data_url_and_nothing_is_fetched(tmp_path: Path) -> None:
    chat = chat_of(make_vision_checkpoint(tmp_path / "llava", "llava"))
    image = {"type": "image", "base64": png(picture(0)), "mime_type": "image/png"}
    expected = chat.invoke([HumanMessage([image, {"type": "text", "text": "What is this?"}])], max_tokens=8)

    def turn(url: str) -> Any:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
        return [{"role": "user", "content": parts}]

    secret = tmp_path / "secret.png"
    secret.write_bytes(base64.b64decode(png(picture(0))))
    with serving(chat, name=MODEL) as server, server.client() as client:
        made = ask(client, turn(f"data:image/png;base64,{png(picture(0))}"))
        assert made.choices[0].message.content == expected.content
        for url in (f"{server.url}/health", "https://example.com/a.png", secret.as_uri(), str(secret)):
            with pytest.raises(openai.BadRequestError, match="the image of message 0"):
                ask(client, turn(url))
        with pytest.raises(openai.BadRequestError, match="data URL must look like"):
            ask(client, turn("data:image/png,x"))
    chat.unload()


def test_reasoning_stands_beside_the_answer(tokenizer: Any) -> None:
    from tests.support.models import pipeline_of, scripted_model

    template = "{{ messages[0]['content'] }}{% if false %}<think></think>{% endif %}"
    script = tokenizer("<think>Hm, so.</think>It is.")["input_ids"]
    prompt = "Where?"
    model = scripted_model(len(tokenizer), [*script, 2], len(tokenizer(prompt)["input_ids"]))
    chat = ChatQuantizedHuggingFace(
        pipeline=pipeline_of(model, tokenizer), chat_template=template, model_id=MODEL, eos_token_id=2
    )
    with serving(chat) as server, server.client() as client:
        turns = [{"role": "user", "content": prompt}]
        message = ask(client, turns, max_tokens=60).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm, so.", "It is.")
        deltas = [event.choices[0].delta for event in ask(client, turns, max_tokens=60, stream=True)]
        assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Hm, so."
        assert "".join(d.content or "" for d in deltas) == "It is."
    chat.unload()
