"""Answers of whole chat models, in the formats of families: a scripted model writes them after small templates."""

from __future__ import annotations

from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest
import transformers
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage

from langchain_quantllm import ChatQuantizedHuggingFace
from tests.support.models import pipeline_of, scripted_model

HI = [HumanMessage("hi")]
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
TOOLS = "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
HERMES_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>\n{\"name\": ' + (c.function.name | tojson) + ', \"arguments\": '"
    " + (c.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}"
)
GLM_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + '\n' }}"
    "{% for k, v in c.function.arguments.items() %}{{ '<arg_key>' + k + '</arg_key>\n<arg_value>' + v | string"
    " + '</arg_value>\n' }}{% endfor %}{{ '</tool_call>' }}{% endfor %}"
)
END = "{{ '<|im_end|>\n' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ASK_THINKING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
THINKS = TOOLS + TURNS + HERMES_CALLS + END + ASK_THINKING
MAY_THINK = TOOLS + TURNS + HERMES_CALLS + END + ASK + "{# </think> #}"
GLM = TOOLS + TURNS + GLM_CALLS + END + ASK
CHANNELS = (
    "{% if tools %}{{ '<|start|>developer<|message|>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|end|>' }}"
    "{% endif %}{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ '<|start|>assistant<|channel|>commentary to=functions.' + c.function.name + ' <|constrain|>json<|message|>'"
    " + (c.function.arguments | tojson) + '<|call|>' }}{% endfor %}{% elif m.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% else %}"
    "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
CHANNEL_MARKS = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
GLM_CALL = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>"
CHANNEL_CALL = '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}'
OSLO = [("weather", {"city": "Oslo"})]


def weather(city: str) -> str:
    """Get the weather in a city."""
    return city


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def channels(smollm2: Path) -> Any:
    """A tokenizer with gpt-oss's special tokens, in which a call ends an answer like any other."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    tokenizer.add_special_tokens({"additional_special_tokens": CHANNEL_MARKS})
    tokenizer.eos_token = "<|return|>"
    return tokenizer


def ask(
    tokenizer: Any, template: str, answer: str, messages: list[BaseMessage] = HI, *, tools: bool = True, **options: Any
) -> AIMessage:
    """Invoke a model that writes an answer and then its end token; its stream must say the same."""
    ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|call|>"] if "<|call|>" in answer else [])]
    ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def chat(prompt_tokens: int) -> ChatQuantizedHuggingFace:
        model = scripted_model(len(tokenizer), ids, prompt_tokens, context_tokens=512)
        model.config.eos_token_id = model.generation_config.eos_token_id = ends
        pipeline = pipeline_of(model, tokenizer)
        return ChatQuantizedHuggingFace(
            pipeline=pipeline, chat_template=template, temperature=0, max_new_tokens=100, **options
        )

    prompt_tokens = chat(1).get_num_tokens_from_messages(messages, tools=[weather] if tools else None)
    model: Any = chat(prompt_tokens).bind_tools([weather]) if tools else chat(prompt_tokens)
    message = model.invoke(messages)
    streamed = reduce(add, model.stream(messages))
    for name in ("content", "additional_kwargs"):
        assert getattr(streamed, name) == getattr(message, name)
    assert calls_of(streamed) == calls_of(message)
    assert streamed.response_metadata["finish_reason"] == message.response_metadata["finish_reason"]
    return message


def calls_of(message: AIMessage) -> list[tuple[str, Any]]:
    return [(call["name"], call["args"]) for call in message.tool_calls]


def reasoning_of(message: AIMessage) -> str:
    return message.additional_kwargs.get("reasoning_content", "")


@pytest.mark.parametrize("template", [THINKS, MAY_THINK])
@pytest.mark.parametrize("end", ["", "\n</think>\n\n"])
def test_a_call_is_found_behind_reasoning_that_is_closed_or_not(tokenizer: Any, template: str, end: str) -> None:
    opened = "<think>\n" if template is MAY_THINK else ""
    message = ask(tokenizer, template, f"{opened}I look it up.\n{end}{CALL}")
    assert (message.content, reasoning_of(message), calls_of(message)) == ("", "I look it up.", OSLO)
    assert message.response_metadata["finish_reason"] == "tool_calls"


def test_a_call_that_reasoning_mentions_is_none(tokenizer: Any) -> None:
    message = ask(tokenizer, THINKS, f"Not {CALL}, no.\n</think>\n\nIt snows.")
    assert (message.content, reasoning_of(message), calls_of(message)) == ("It snows.", f"Not {CALL}, no.", [])


@pytest.mark.parametrize("tools", [False, True])
def test_an_answer_may_end_in_reasoning_that_the_template_opened(tokenizer: Any, tools: bool) -> None:
    message = ask(tokenizer, THINKS, "It snows.", tools=tools)
    assert (message.content, reasoning_of(message), message.tool_calls) == ("", "It snows.", [])
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] == len(tokenizer("It snows.")["input_ids"]) + 1


def test_a_forced_call_is_written_after_reasoning_is_closed(tokenizer: Any) -> None:
    pytest.importorskip("xgrammar")
    model = scripted_model(len(tokenizer), [tokenizer.eos_token_id], 1, context_tokens=512)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    chat: Any = ChatQuantizedHuggingFace(pipeline=pipeline_of(model, tokenizer), chat_template=THINKS, seed=1)
    message = chat.bind_tools([weather], tool_choice="any").invoke(HI, max_new_tokens=80, temperature=1.0)
    assert [call["name"] for call in message.tool_calls] == ["weather"]


def test_text_around_a_call_stays_apart_and_goes_back_into_the_template(tokenizer: Any) -> None:
    message = ask(tokenizer, MAY_THINK, f"First I look.\n\n{CALL}\nThen I write.")
    assert (message.content, calls_of(message)) == ("First I look.\n\nThen I write.", OSLO)
    again = ask(tokenizer, MAY_THINK, "It snows.", [*HI, message, HumanMessage("and?")])
    assert again.content == "It snows."


@pytest.mark.parametrize(
    ("begun", "answer", "content", "reasoning"),
    [
        ("<think>\nLet me", " see.\n</think>\n\nIt snows.", "It snows.", " see."),
        ("<think>\nLet me", " see.", "", " see."),
        ("<think>\nLet me see.\n</think>\n\nIt", " snows.", " snows.", ""),
        ("It <think>", " snows.", " snows.", ""),
        ("It", " snows.", " snows.", ""),
    ],
)
@pytest.mark.parametrize("tools", [False, True])
def test_a_begun_answer_goes_on_where_it_is(
    tokenizer: Any, begun: str, answer: str, content: str, reasoning: str, tools: bool
) -> None:
    user = HumanMessage("What does <think> mean?")
    message = ask(tokenizer, MAY_THINK, answer, [user, AIMessage(begun)], tools=tools)
    assert (message.content, reasoning_of(message)) == (content, reasoning)
    assert message.response_metadata["finish_reason"] == "stop"


def test_a_call_in_reasoning_that_a_begun_answer_opened(tokenizer: Any) -> None:
    message = ask(tokenizer, MAY_THINK, f" see.\n{CALL}", [*HI, AIMessage("<think>\nLet me")])
    assert (message.content, reasoning_of(message), calls_of(message)) == ("", " see.", OSLO)


def test_calls_of_glm(tokenizer: Any) -> None:
    message = ask(tokenizer, GLM, f"I look.\n{GLM_CALL}")
    assert (message.content, calls_of(message)) == ("I look.", OSLO)
    again = ask(tokenizer, GLM, "It snows.", [*HI, message, HumanMessage("and?")])
    assert again.content == "It snows."


def test_answers_in_channels(channels: Any) -> None:
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    for tools in (False, True):
        message = ask(channels, CHANNELS, f"{thought}<|channel|>final<|message|>It snows.", tools=tools)
        assert (message.content, reasoning_of(message), message.tool_calls) == ("It snows.", "Hm.", [])
    message = ask(channels, CHANNELS, f"{thought}{CHANNEL_CALL}<|call|>")
    assert (message.content, reasoning_of(message), calls_of(message)) == ("", "Hm.", OSLO)
    assert message.response_metadata["finish_reason"] == "tool_calls"
    again = ask(channels, CHANNELS, "<|channel|>final<|message|>It snows.", [*HI, message, HumanMessage("and?")])
    assert again.content == "It snows."


@pytest.mark.parametrize(("template", "is_channels"), [(GLM, False), (CHANNELS, True)])
def test_forced_calls_of_glm_and_in_channels(request: pytest.FixtureRequest, template: str, is_channels: bool) -> None:
    pytest.importorskip("xgrammar")
    tokenizer = request.getfixturevalue("channels" if is_channels else "tokenizer")
    end = tokenizer.eos_token_id
    model = scripted_model(len(tokenizer), [end], 1, context_tokens=512)
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    chat: Any = ChatQuantizedHuggingFace(pipeline=pipeline_of(model, tokenizer), chat_template=template)
    for seed in range(4):
        forced = chat.bind_tools([weather], tool_choice="weather")
        message = forced.invoke(HI, max_new_tokens=80, temperature=1.0, seed=seed)
        assert message.invalid_tool_calls == []
        (call,) = message.tool_calls
        assert call["name"] == "weather"
        assert isinstance(call["args"]["city"], str)
        structured = chat.with_structured_output(
            {"title": "a", "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        )
        assert isinstance(structured.invoke(HI, max_new_tokens=80, temperature=1.0, seed=seed)["n"], int)
