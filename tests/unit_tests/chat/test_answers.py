"""Answers of whole chat models, in the formats of families: a scripted model writes them after small templates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage

from langchain_quantllm import ChatQuantizedHuggingFace
from tests.support.models import pipeline_of, scripted_model

CONTEXT = 384
HI = [HumanMessage("hi")]
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}"
)
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


class Scripted:
    """A model that writes the answer that it is told, and the chats over it."""

    def __init__(self, tokenizer: Any, ends: list[str]) -> None:
        self.tokenizer = tokenizer
        self.model = scripted_model(len(tokenizer), [0], 1, context_tokens=CONTEXT)
        end_ids = tokenizer.convert_tokens_to_ids(ends)
        self.model.config.eos_token_id = self.model.generation_config.eos_token_id = end_ids
        self.pipeline = pipeline_of(self.model, tokenizer)
        self.shared = ChatQuantizedHuggingFace(pipeline=self.pipeline).load()  # keeps engine and grammars between chats

    def chat(self, template: str) -> Any:
        return ChatQuantizedHuggingFace(
            pipeline=self.pipeline, chat_template=template, temperature=0, max_new_tokens=100
        )

    def ask(self, template: str, answer: str, messages: Sequence[BaseMessage] = HI, *, tools: bool = True) -> AIMessage:
        """Invoke the model, which writes an answer and then its end token; its stream must say the same."""
        chat = self.chat(template)
        ids = [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        begin = chat.get_num_tokens_from_messages(messages, tools=[weather] if tools else None) - 1
        with torch.no_grad():
            self.model.lm_head.weight.zero_()
            for at, token_id in enumerate(ids):
                self.model.lm_head.weight[token_id, begin + at] = 1.0
        model = chat.bind_tools([weather]) if tools else chat
        message = model.invoke(messages)
        streamed = reduce(add, model.stream(messages))
        for name in ("content", "additional_kwargs"):
            assert getattr(streamed, name) == getattr(message, name)
        assert calls_of(streamed) == calls_of(message)
        assert streamed.response_metadata["finish_reason"] == message.response_metadata["finish_reason"]
        assert isinstance(message, AIMessage)
        return message


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> Scripted:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    return Scripted(tokenizer, [tokenizer.eos_token])


@pytest.fixture(scope="module")
def channels(smollm2: Path) -> Scripted:
    """Has gpt-oss's special tokens; a call ends an answer like its own end token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    tokenizer.add_special_tokens({"additional_special_tokens": CHANNEL_MARKS})
    tokenizer.eos_token = "<|return|>"
    return Scripted(tokenizer, ["<|return|>", "<|call|>"])


def calls_of(message: AIMessage) -> list[tuple[str, Any]]:
    return [(call["name"], call["args"]) for call in message.tool_calls]


def reasoning_of(message: AIMessage) -> str:
    return message.additional_kwargs.get("reasoning_content", "")


@pytest.mark.parametrize("template", [THINKS, MAY_THINK])
@pytest.mark.parametrize("end", ["", "\n</think>\n\n"])
def test_a_call_is_found_behind_reasoning_that_is_closed_or_not(plain: Scripted, template: str, end: str) -> None:
    opened = "<think>\n" if template is MAY_THINK else ""
    message = plain.ask(template, f"{opened}I look it up.\n{end}{CALL}")
    assert (message.content, reasoning_of(message), calls_of(message)) == ("", "I look it up.", OSLO)
    assert message.response_metadata["finish_reason"] == "tool_calls"


def test_a_call_that_reasoning_mentions_is_none(plain: Scripted) -> None:
    message = plain.ask(THINKS, f"Not {CALL}, no.\n</think>\n\nIt snows.")
    assert (message.content, reasoning_of(message), calls_of(message)) == ("It snows.", f"Not {CALL}, no.", [])


@pytest.mark.parametrize("tools", [False, True])
def test_an_answer_may_end_in_reasoning_that_the_template_opened(plain: Scripted, tools: bool) -> None:
    message = plain.ask(THINKS, "It snows.", tools=tools)
    assert (message.content, reasoning_of(message), message.tool_calls) == ("", "It snows.", [])
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.usage_metadata is not None
    assert message.usage_metadata["output_tokens"] == len(plain.tokenizer("It snows.")["input_ids"]) + 1


def test_a_forced_call_is_written_after_reasoning_is_closed(plain: Scripted) -> None:
    pytest.importorskip("xgrammar")
    chat = plain.chat(THINKS)
    message = chat.bind_tools([weather], tool_choice="any").invoke(HI, max_new_tokens=80, temperature=1.0)
    assert [call["name"] for call in message.tool_calls] == ["weather"]


def test_text_around_a_call_stays_apart_and_goes_back_into_the_template(plain: Scripted) -> None:
    message = plain.ask(MAY_THINK, f"First I look.\n\n{CALL}\nThen I write.")
    assert (message.content, calls_of(message)) == ("First I look.\n\nThen I write.", OSLO)
    again = plain.ask(MAY_THINK, "It snows.", [*HI, message, HumanMessage("and?")])
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
    plain: Scripted, begun: str, answer: str, content: str, reasoning: str, tools: bool
) -> None:
    user = HumanMessage("What does <think> mean?")
    message = plain.ask(MAY_THINK, answer, [user, AIMessage(begun)], tools=tools)
    assert (message.content, reasoning_of(message)) == (content, reasoning)
    assert message.response_metadata["finish_reason"] == "stop"


def test_a_call_in_reasoning_that_a_begun_answer_opened(plain: Scripted) -> None:
    message = plain.ask(MAY_THINK, f" see.\n{CALL}", [*HI, AIMessage("<think>\nLet me")])
    assert (message.content, reasoning_of(message), calls_of(message)) == ("", " see.", OSLO)


def test_calls_of_glm(plain: Scripted) -> None:
    message = plain.ask(GLM, f"I look.\n{GLM_CALL}")
    assert (message.content, calls_of(message)) == ("I look.", OSLO)
    again = plain.ask(GLM, "It snows.", [*HI, message, HumanMessage("and?")])
    assert again.content == "It snows."


THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"


@pytest.mark.parametrize("tools", [False, True])
def test_answers_in_channels(channels: Scripted, tools: bool) -> None:
    message = channels.ask(CHANNELS, f"{THOUGHT}<|channel|>final<|message|>It snows.", tools=tools)
    assert (message.content, reasoning_of(message), message.tool_calls) == ("It snows.", "Hm.", [])


def test_calls_in_channels(channels: Scripted) -> None:
    message = channels.ask(CHANNELS, f"{THOUGHT}{CHANNEL_CALL}<|call|>")
    assert (message.content, reasoning_of(message), calls_of(message)) == ("", "Hm.", OSLO)
    assert message.response_metadata["finish_reason"] == "tool_calls"
    prompt = channels.chat(CHANNELS).get_num_tokens_from_messages([*HI, message, HumanMessage("and?")])
    assert prompt > channels.chat(CHANNELS).get_num_tokens_from_messages([*HI, HumanMessage("and?")])


@pytest.mark.parametrize("template", [GLM, CHANNELS], ids=["GLM", "channels"])
def test_forced_calls_of_glm_and_in_channels(plain: Scripted, channels: Scripted, template: str) -> None:
    pytest.importorskip("xgrammar")
    chat = (channels if template is CHANNELS else plain).chat(template)
    schema = {"title": "a", "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    for seed in range(2):
        options = {"max_new_tokens": 80, "temperature": 1.0, "seed": seed}
        message = chat.bind_tools([weather], tool_choice="weather").invoke(HI, **options)
        assert message.invalid_tool_calls == []
        (call,) = message.tool_calls
        assert call["name"] == "weather"
        assert isinstance(call["args"]["city"], str)
        assert isinstance(chat.with_structured_output(schema).invoke(HI, **options)["n"], int)
