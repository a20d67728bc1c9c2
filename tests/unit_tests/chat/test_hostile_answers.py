"""Answers that a stranger wrote: random compositions of the tags of all formats, and tags again and again."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from langchain_quantllm.chat import pieces
from langchain_quantllm.chat.notations import MAX_DEPTH
from langchain_quantllm.chat.response_template import TemplateParser
from langchain_quantllm.chat.result import MessageBuilder
from langchain_quantllm.chat.scanner import Scanner
from langchain_quantllm.structured.tool_formats import FORMATS, REASONING
from tests.unit_tests.chat.test_output_parser import (
    END_TAGS,
    PROMPT,
    Tokenizer,
    XMLTokenizer,
    new,
    parse,
    parser_of,
)

NAMES = [entry.name for entry in FORMATS]
PARTS = [
    *END_TAGS, "<think>", "<tools>", "<function=", "<function=now>", "<parameter=a>", "<parameter=", "</arg_key>",
    "<arg_value>", "<|tool_call_start|>", "<start_function_call>", "call:now{", "<escape>", '<|"|>', "<|tool_call>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "function", "<|START_ACTION|>",
    "<|START_RESPONSE|>", "<|END_RESPONSE|>", "[CALL_ID]", "<|channel|>", "<|constrain|>", "<|return|>",
    "to=functions.now", "analysis", "final", "commentary", "json", "```json\n", "[TOOL_CALLS] [", "[now(", "now",
    "now(a=1)", '{"name": "now"', '"arguments": ', '{"name": "now", "arguments": {}}', '{"a": 1}', '"', "'", "{", "}",
    "[", "]", "(", ")", ",", ":", "\n", " ", "\n\n", "; ", "\\", "[THINK]", "[/THINK]", "<|START_THINKING|>",
    "<|END_THINKING|>",
]  # fmt: skip


def composition(rng: random.Random) -> tuple[str, list[str]]:
    """An answer of tags and words, and its words, each of which is in it once."""
    words, parts = [], []
    for number in range(rng.randint(3, 16)):
        if rng.random() < 0.3:
            words.append(f"w{number}q")
            parts.append(rng.choice(["", " ", "\n"]) + words[-1])
        else:
            parts.append(rng.choice(PARTS))
    return "".join(parts), words


def check_composition(name: str, rng: random.Random) -> None:
    answer, words = composition(rng)
    reasoning = rng.choice([None, *REASONING])
    options: dict[str, Any] = {"reasoning": reasoning, "in_reasoning": bool(reasoning) and rng.random() < 0.4}
    options = {} if name == "harmony" else options
    parts = in_parts(answer, rng)
    parser = parser_of(name, **options)
    given = [*parser.push(answer), *parser.finish()]
    whole = parse(parser_of(name, **options), [answer])
    assert whole == parse(parser_of(name, **options), parts), answer
    assert whole == parse(parser_of(name, **options), list(answer)), answer
    text, thought, calls, invalid = whole
    names = [piece.text for piece in given if piece.kind == "call"]
    found = " ".join([text, thought, *names, *(json.dumps(a) for _, a in calls), *(piece.text for piece in invalid)])
    assert [word for word in words if word not in found] == [], (answer, whole)
    builder = MessageBuilder()
    builder.add(given)
    message = builder.message()
    assert len(message.tool_calls) == len(calls)
    assert len(message.invalid_tool_calls) == len(invalid)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_of_any_answer_nothing_is_lost_and_its_parts_read_like_the_whole(name: str, count: int) -> None:
    rng = random.Random(f"{name} {count}")
    for _ in range(count):
        check_composition(name, rng)


def in_parts(answer: str, rng: random.Random) -> list[str]:
    """Cut an answer anywhere."""
    cuts = sorted(rng.choices(range(len(answer) + 1), k=rng.randint(1, 8)))
    return [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]


@pytest.mark.parametrize("tokenizer", [Tokenizer(), XMLTokenizer()], ids=["json", "xml"])
@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_response_templates_read_the_parts_of_any_answer_like_the_whole(tokenizer: Any, count: int) -> None:
    rng = random.Random(count)
    for _ in range(count):
        answer, words = composition(rng)
        prompt = rng.choice([PROMPT, PROMPT + "<think>\n", ""])
        whole = parse(TemplateParser(tokenizer, prompt), [answer])
        for parts in (in_parts(answer, rng), list(answer)):
            assert whole == parse(TemplateParser(tokenizer, prompt), parts), answer
        text, thought, calls, invalid = whole
        if type(tokenizer) is Tokenizer:  # the other one's patterns leave out what is between the arguments
            found = " ".join([text, thought, json.dumps(calls), *(piece.text for piece in invalid)])
            assert [word for word in words if word not in found] == [], (answer, whole)


QWEN = "<tool_call>\n<function=now>\n<parameter=a>\n"
REPEATED = [
    "<tool_call>", "<tool_cal", "</tool_call>", "[", '{"a":', "<think>", "<think></think>", '"', QWEN,
    QWEN + "x\n</parameter>\n</function>\nx\n", "</parameter>\n</function>\n", "<parameter=a>",
    QWEN + "x</parameter></function></tool_call>y", QWEN.replace("=a", "=hours") + "[[[\n</parameter>\n",
    "<tool_call>now\n<arg_key>a</arg_key>\n<arg_value>x</arg_value>\n</tool_call>y",
    "<tool_call>now\n<arg_key>a</arg_key>\n<arg_value>", "<arg_value>x</arg_value>",
    '<tool_call>{"name": "now", "arguments": {"a": "', '<tool_call>{"name": "now", "arguments": [',
    "<|tool_call_start|>[now(a=", "<tool_call>[now(a='", """<|tool_call_start|>[now(a="'""", "[now(",
    "<start_function_call>call:now{a:<escape>", '<|tool_call>call:now{a:<|"|>', "<start_function_call>call:now{",
    "[TOOL_CALLS]", "[TOOL_CALLS]now[ARGS]{", "[TOOL_CALLS]now ", "```json\n", '```json\n{"name": "now", ', "<tools>",
    '<tools>{"name": "now", "arguments": {"a": "', "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now", "<|python_tag|>", '<|python_tag|>{"name": "now"',
    '{"name": "now", "parameters": {}};', "<|channel|>", "<|start|>assistant<|channel|>analysis<|message|>",
    "<|channel|>commentary to=functions.now<|message|>{", "<|start|>", " ", "\n", "<|START_ACTION|>[{", "\\",
    '{"a": "\\"', "<think><tool_call>{}</think>",
]  # fmt: skip
"""What hostile answers repeat."""


class CountingScanner(Scanner):
    """Counts the characters that it passes, each as often as it does."""

    passed = 0
    _place = 0

    @property
    def at(self) -> int:  # type: ignore[override]
        return self._place

    @at.setter
    def at(self, place: int) -> None:
        CountingScanner.passed += max(0, place - self._place)
        self._place = place


def passed(name: str, answer: str, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> float:
    """The characters that a parser passes for each one of an answer."""
    monkeypatch.setattr(pieces, "Scanner", CountingScanner)
    parser = parser_of(name, **({} if name == "harmony" else {"reasoning": REASONING[0]}))
    CountingScanner.passed = 0
    for part in parts:
        parser.push(part)
    parser.finish()
    return CountingScanner.passed / len(answer)


@pytest.mark.parametrize("unit", REPEATED)
def test_the_work_grows_with_the_length_only(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cost by the square, some format would pass each character some hundreds of times."""
    answer = unit * (3000 // len(unit))
    for name in NAMES:
        assert passed(name, answer, [answer], monkeypatch) < 20, name
    for name in ("hermes", "qwen_coder", "glm", "mistral_args", "deepseek_v31", "lfm2", "llama3", "harmony"):
        assert passed(name, answer[:1000], list(answer[:1000]), monkeypatch) < 20, name


@pytest.mark.slow
@pytest.mark.parametrize("unit", REPEATED)
def test_the_work_on_a_long_answer_grows_with_its_length_only(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = unit * (30_000 // len(unit))
    for name in ("hermes", "qwen_coder", "glm", "mistral_args", "deepseek_v31", "lfm2", "llama3", "harmony"):
        assert passed(name, answer, [answer], monkeypatch) < 20, name
        assert passed(name, answer[:5_000], list(answer[:5_000]), monkeypatch) < 20, name


@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH + 1, 900, 100_000])
@pytest.mark.parametrize("name", ["hermes", "mistral_args", "qwen_coder", "harmony"])
def test_arguments_nested_too_deeply_make_an_invalid_call(name: str, depth: int) -> None:
    value = "[" * depth + "]" * depth
    answer = {
        "hermes": f'<tool_call>\n{{"name": "now", "arguments": {{"a": {value}}}}}\n</tool_call>',
        "mistral_args": f'[TOOL_CALLS]now[ARGS]{{"a": {value}}}',
        "qwen_coder": f"<tool_call>\n<function=get_weather>\n<parameter=hours>\n{value}\n</parameter>\n</function>\n"
        "</tool_call>",
        "harmony": f'<|channel|>commentary to=functions.now<|message|>{{"a": {value}}}<|call|>',
    }[name]
    parser, builder = parser_of(name), MessageBuilder()
    chunk = builder.add([*parser.push(answer), *parser.finish()])
    message = builder.message()
    if depth < MAX_DEPTH:
        assert len(message.tool_calls) == 1
        return
    texts = [call["args"] for call in message.invalid_tool_calls] or list(message.tool_calls[0]["args"].values())
    assert value in texts[0]  # Python reads no JSON of 100,000 brackets, so in XML it is a text
    assert message.invalid_tool_calls or name == "qwen_coder"
    assert chunk is not None
    assert len(chunk.tool_calls) == len(message.tool_calls)


def test_a_call_with_members_beside_its_arguments_is_invalid() -> None:
    answer = '<tool_call>\n{"name": "get_weather", "city": "Paris"}\n</tool_call>'
    _, _, calls, invalid = parse(new(), [answer])
    assert calls == []
    assert "'city'" in invalid[0].error
    assert '"Paris"' in invalid[0].text
