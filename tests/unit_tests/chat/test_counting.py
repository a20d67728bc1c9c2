"""Counting the tokens of conversations and of their parts, and trimming by that count."""

from __future__ import annotations

import random
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from langchain_core.messages.utils import count_tokens_approximately

from langchain_quantllm import ChatQuantizedHuggingFace
from tests.support.chat_templates import TEMPLATES, random_conversation
from tests.support.models import pipeline_of, tiny_model

CALL = AIMessage("I look.", tool_calls=[{"name": "weather", "args": {"city": "Oslo"}, "id": "call_1"}])
RESULT = ToolMessage("snow " * 10, tool_call_id="call_1")
HISTORY: list[BaseMessage] = [
    SystemMessage("Be brief."),
    HumanMessage("hi"),
    AIMessage("Hi Bob!"),
    HumanMessage("weather?"),
    CALL,
    RESULT,
    AIMessage("Snow. " * 40),
    HumanMessage("thanks"),
]


def weather(city: str) -> str:
    """Get the weather in a city."""
    return "snow"


@pytest.fixture(scope="module")
def pipeline(tokenizer: Any) -> Any:
    return pipeline_of(tiny_model(len(tokenizer)), tokenizer)


@pytest.fixture(scope="module", params=TEMPLATES)
def chat(request: pytest.FixtureRequest, pipeline: Any) -> ChatQuantizedHuggingFace:
    return ChatQuantizedHuggingFace(pipeline=pipeline, chat_template=TEMPLATES[request.param], max_new_tokens=1)


def test_no_message_has_no_token(chat: ChatQuantizedHuggingFace) -> None:
    assert chat.get_num_tokens_from_messages([]) == 0


def test_the_count_is_that_of_the_prompt(chat: ChatQuantizedHuggingFace) -> None:
    for messages in (HISTORY, HISTORY[4:], HISTORY[:1]):
        assert chat.get_num_tokens_from_messages(messages) == chat.invoke(messages).usage_metadata["input_tokens"]


@pytest.mark.parametrize("name", ["alternating", "llama-3"])
def test_the_count_has_the_tools_in_it(pipeline: Any, name: str) -> None:
    chat = ChatQuantizedHuggingFace(pipeline=pipeline, chat_template=TEMPLATES[name], max_new_tokens=1)
    for messages in (HISTORY, HISTORY[4:]):
        counted = chat.get_num_tokens_from_messages(messages, tools=[weather])
        answer = chat.bind_tools([weather], tool_choice="none").invoke(messages)
        assert counted > chat.get_num_tokens_from_messages(messages) == answer.usage_metadata["input_tokens"]
        answer = chat.bind_tools([weather]).invoke(messages)
        assert counted == answer.usage_metadata["input_tokens"]


def test_every_part_of_a_conversation_has_a_count_and_more_messages_have_more(chat: ChatQuantizedHuggingFace) -> None:
    counts = [chat.get_num_tokens_from_messages(HISTORY[at:]) for at in range(len(HISTORY))]
    longer = [HISTORY[:at] for at in range(1, len(HISTORY) + 1)]
    assert counts[0] > counts[4] > counts[6] > counts[7] > 0
    assert all(chat.get_num_tokens_from_messages(messages) > 0 for messages in longer)


@pytest.mark.parametrize("strategy", ["first", "last"])
@pytest.mark.parametrize("allow_partial", [False, True])
def test_conversations_are_trimmed_to_a_count(
    chat: ChatQuantizedHuggingFace, strategy: Any, allow_partial: bool
) -> None:
    options: dict[str, Any] = {"allow_partial": allow_partial, "strategy": strategy, "token_counter": chat}
    for most in (1, 40, 90):
        for extra in ({}, {"include_system": True, "start_on": "human"}) if strategy == "last" else ({},):
            trimmed = trim_messages(HISTORY, max_tokens=most, **options, **extra)
            # A system message to be kept stays even where there is no room for it. LangChain counts the messages from
            # the last one backwards, so a turn that is filled in may come on top.
            assert chat.get_num_tokens_from_messages(trimmed) <= most + 16 or len(trimmed) == 1
            assert all(message.type in {m.type for m in HISTORY} for message in trimmed)
    assert trim_messages(HISTORY, max_tokens=10_000, **options) == HISTORY


def test_one_long_message_is_trimmed(chat: ChatQuantizedHuggingFace) -> None:
    long = [HumanMessage("word\n" * 200)]
    trimmed = trim_messages(long, max_tokens=100, token_counter=chat, strategy="last", allow_partial=True)
    assert 0 < chat.get_num_tokens_from_messages(trimmed) <= 100


def test_random_conversations_are_counted_as_they_are_sent(chat: ChatQuantizedHuggingFace) -> None:
    chance = random.Random(5)
    for _ in range(3):
        messages, _, _ = random_conversation(chance)
        assert chat.get_num_tokens_from_messages(messages) == chat.invoke(messages).usage_metadata["input_tokens"]


def test_what_a_template_never_takes_is_counted_by_its_texts(pipeline: Any) -> None:
    chat = ChatQuantizedHuggingFace(pipeline=pipeline, chat_template="{{ raise_exception('no') }}")
    short, long = chat.get_num_tokens_from_messages(HISTORY[:2]), chat.get_num_tokens_from_messages(HISTORY)
    assert 0 < short < long
    assert long >= chat.get_num_tokens("Snow. " * 40)


@pytest.mark.parametrize("name", ["alternating", "needs a user", "mistral", "gemma"])
def test_long_threads_are_summarized_by_the_models_own_count(pipeline: Any, name: str) -> None:
    chat = ChatQuantizedHuggingFace(pipeline=pipeline, chat_template=TEMPLATES[name], max_new_tokens=4)
    middleware = SummarizationMiddleware(
        chat,
        trigger=("tokens", 60),
        keep=("tokens", 40),
        token_counter=chat.get_num_tokens_from_messages,
        trim_tokens_to_summarize=100,
    )
    agent = create_agent(chat, [], middleware=[middleware])
    state = agent.invoke({"messages": [*HISTORY[1:], HumanMessage("and tomorrow?")]})
    first = state["messages"][0]
    assert first.additional_kwargs.get("lc_source") == "summarization"
    assert count_tokens_approximately(state["messages"]) < count_tokens_approximately(HISTORY)
    assert state["messages"][-2].content == "and tomorrow?"
    assert state["messages"][-1].type == "ai"
