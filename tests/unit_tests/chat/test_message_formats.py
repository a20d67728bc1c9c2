"""Messages of every form, as other programs and strangers make them: a prompt, or an error that names the message."""

from __future__ import annotations

import datetime
import random
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, ChatMessage, FunctionMessage, HumanMessage, SystemMessage, ToolMessage
from transformers import AutoTokenizer

from langchain_quantllm import ChatQuantizedHuggingFace
from langchain_quantllm.chat.messages import template_messages
from langchain_quantllm.chat.template import ChatTemplate
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from tests.support.chat_templates import TEMPLATES
from tests.support.models import pipeline_of, tiny_model


def raw(kind: Any, **fields: Any) -> Any:
    """Make a message without pydantic's checks, as unpickling and other programs do."""
    return kind.model_construct(**{"content": "", "additional_kwargs": {}, "name": None, **fields})


def calling(args: Any, **fields: Any) -> Any:
    return raw(AIMessage, tool_calls=[{"name": "f", "args": args, "id": "1", **fields}], invalid_tool_calls=[])


@pytest.mark.parametrize(
    ("message", "content"),
    [
        (raw(HumanMessage, content=None), ""),
        (raw(HumanMessage, content=("a", "b")), "a\nb"),
        (raw(HumanMessage, content=["a", {"type": "text", "text": "b"}]), "a\nb"),
        (raw(HumanMessage, content=[{"type": ["text"], "text": "b"}]), "b"),
        (raw(ToolMessage, content=[{"type": "json", "json": {"a": 1}}], tool_call_id=None), '{"a": 1}'),
        (ToolMessage([{"type": "json", "json": [1]}], tool_call_id="x"), "[1]"),
    ],
)
def test_contents_that_have_a_text(message: Any, content: str) -> None:
    assert template_messages([HumanMessage("q"), message])[1]["content"] == content


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (HumanMessage([{"type": "hologram", "data": 1}]), "message 1 holds .*hologram.* not a known content block"),
        (HumanMessage([{"type": "text", "text": None}]), "message 1 holds .*not a known content block"),
        (raw(HumanMessage, content=[b"a"]), "message 1 holds .*not a known content block"),
        (raw(HumanMessage, content=7), "message 1 holds '7'"),
        (raw(ToolMessage, content=[{"type": "json", "json": {1, 2}}], tool_call_id="1"), "message 1, a ToolMessage"),
        (calling({"a": {1}}), "message 1 calls 'f' with arguments that are not JSON"),
        (calling({"a": b"b"}), "message 1 calls 'f' with arguments that are not JSON"),
        (calling({"a": datetime.date(2020, 1, 1)}), "message 1 calls 'f' with arguments that are not JSON"),
        (raw(AIMessage, tool_calls=[{"id": "1"}], invalid_tool_calls=[]), "message 1, a AIMessage, cannot be read"),
        (raw(AIMessage, tool_calls=["f"], invalid_tool_calls=[]), "message 1, a AIMessage, cannot be read"),
    ],
)
def test_the_error_names_the_message(message: Any, says: str) -> None:
    with pytest.raises(InvalidOptionError, match=says):
        template_messages([HumanMessage("q"), message])


def test_arguments_that_json_can_hold_are_kept() -> None:
    args = {"a": (1, 2), 3: None, "n": float("inf")}
    assert template_messages([calling(args)])[0]["tool_calls"][0]["function"]["arguments"] == {
        "a": [1, 2],
        "3": None,
        "n": float("inf"),
    }
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for args in (loop, {"a": deep}):
        with pytest.raises(InvalidOptionError, match="message 0 calls 'f'"):
            template_messages([calling(args)])


def test_halves_of_characters_do_not_reach_the_tokenizer(tokenizer: Any) -> None:
    chat = ChatQuantizedHuggingFace(pipeline=pipeline_of(tiny_model(len(tokenizer)), tokenizer), max_new_tokens=1)
    cut, whole = chat.invoke("a \ud83d"), chat.invoke("a \ufffd")
    assert cut.usage_metadata["input_tokens"] == whole.usage_metadata["input_tokens"]
    assert cut.content == whole.content
    assert chat.get_num_tokens_from_messages([HumanMessage("\ud83d\ude00")]) == chat.get_num_tokens_from_messages(
        [HumanMessage("\U0001f600")]
    )
    assert chat.get_num_tokens("\ud83d") == chat.get_num_tokens("\ufffd")


def test_huge_names_and_ids_are_rendered(tokenizer: Any) -> None:
    name = "n" * 100_000
    messages = [HumanMessage("q", name=name), calling({}, name=name, id=name), ToolMessage("r", tool_call_id=name)]
    for template in TEMPLATES.values():
        assert "r" in ChatTemplate(tokenizer, template).render(template_messages(messages))[0]


def random_value(chance: random.Random, depth: int = 0) -> Any:
    leaves = [
        None,
        1,
        -2.5,
        float("nan"),
        True,
        "text",
        "",
        "\ud800",
        b"bytes",
        {1, 2},
        object(),
        10**400,
        "<|im_end|>",
    ]
    kinds = [
        "text",
        "image",
        "image_url",
        "tool_result",
        "tool_use",
        "reasoning",
        "json",
        "refusal",
        "audio",
        "x",
        3,
        [],
    ]
    how = chance.randrange(6)
    if depth > 2 or how < 2:
        return chance.choice(leaves)
    if how == 2:
        return [random_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    block = {"type": chance.choice(kinds)}
    names = ["text", "image_url", "url", "base64", "content", "tool_use_id", "json", "source", "id", "input", "refusal"]
    for _ in range(chance.randrange(4)):
        block[chance.choice(names)] = random_value(chance, depth + 1)
    return block


def random_message(chance: random.Random) -> Any:
    value = lambda: random_value(chance)  # noqa: E731
    kind = chance.choice([HumanMessage, SystemMessage, AIMessage, ToolMessage, ChatMessage, FunctionMessage])
    fields: dict[str, Any] = {"content": value()}
    fields["name"] = chance.choice([None, "n", value()])
    fields["additional_kwargs"] = chance.choice([{}, {}, {"reasoning_content": value()}, value()])
    if kind is AIMessage:
        call = chance.choice(
            [{"name": "f", "args": {"x": value()}, "id": "1"}, {"name": value(), "args": value()}, value()]
        )
        wrong = chance.choice([{"name": "f", "args": "{", "id": "1"}, value()])
        fields |= {"tool_calls": [call][: chance.randrange(2)], "invalid_tool_calls": [wrong][: chance.randrange(2)]}
    fields |= {"tool_call_id": chance.choice(["1", value()])} if kind is ToolMessage else {}
    fields |= {"role": chance.choice(["user", "critic", value()])} if kind is ChatMessage else {}
    return raw(kind, **fields)


def check_random_messages(tokenizer: Any, count: int, seed: int) -> int:
    """Render random messages; returns the number of prompts."""
    chance = random.Random(seed)
    templates = [ChatTemplate(tokenizer, template) for template in TEMPLATES.values()]
    rendered = 0
    for _ in range(count):
        messages = [HumanMessage("q"), *(random_message(chance) for _ in range(chance.randint(1, 3)))]
        try:
            template_messages(messages, images=True)
            prompt, _ = chance.choice(templates).render(template_messages(messages))
        except (InvalidOptionError, UnsupportedError) as error:
            says = str(error)
        else:
            says = prompt and "message"
            rendered += 1
        assert "message" in says
    return rendered


def test_random_messages_raise_no_raw_error(smollm2: Path) -> None:
    assert check_random_messages(AutoTokenizer.from_pretrained(smollm2), 150, seed=1) > 10


@pytest.mark.slow
def test_thousands_of_random_messages_raise_no_raw_error(smollm2: Path) -> None:
    assert check_random_messages(AutoTokenizer.from_pretrained(smollm2), 3000, seed=2) > 200
