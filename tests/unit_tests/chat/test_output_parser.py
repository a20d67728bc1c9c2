"""The parsers of answers, on every family's format.

The answers are written by hand after the formats that the models' makers have published.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from langchain_quantllm.chat.harmony import HarmonyParser
from langchain_quantllm.chat.output_parser import AnswerParser
from langchain_quantllm.chat.pieces import Piece
from langchain_quantllm.chat.response_template import TemplateParser
from langchain_quantllm.chat.result import MessageBuilder
from langchain_quantllm.structured.tool_formats import (
    FORMATS,
    HARMONY,
    HERMES,
    REASONING,
    ToolFormat,
    format_of,
    reasoning_of,
)

FORMAT = {entry.name: entry for entry in FORMATS}
AMID_TEXT = [entry for entry in FORMATS if entry != HARMONY]  # whose answers are texts with calls in them
THINK = REASONING[0]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "hours": {"type": "array", "items": {"type": "integer"}},
                    "limit": {"anyOf": [{"type": "number"}, {"type": "null"}]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]

PARIS = ("get_weather", {"city": "Paris", "days": 3})
NOW = ("now", {})
BOTH = [PARIS, NOW]
P = '{"city": "Paris", "days": 3}'

HERMES_PARIS = '<tool_call>\n{"name": "get_weather", "arguments": ' + P + "}\n</tool_call>"
HERMES_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
XML = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)

GLM = (
    "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)

# name of the format, the answer, its text, its calls
ANSWERS: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", HERMES_PARIS, "", [PARIS]),
    ("hermes", f"Let me see.\n\n{HERMES_PARIS}\n{HERMES_NOW}", "Let me see.", BOTH),
    ("hermes", f"{HERMES_NOW}\nDone.", "Done.", [NOW]),
    ("hermes", HERMES_PARIS.removesuffix("\n</tool_call>"), "", [PARIS]),
    ("hermes", '<tool_call>[{"arguments":' + P + ',"name":"get_weather"},{"name":"now"}]</tool_call>', "", BOTH),
    ("hermes", '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>{"name": "get_weather", "parameters": ' + json.dumps(P) + "}</tool_call>", "", [PARIS]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}}\n</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>{"type": "function", "function": {"name": "now"}}</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>{"name": "other", "arguments": {"q": "a}\\"\\\\ </b>"}}</tool_call>', "",
     [("other", {"q": 'a}"\\ </b>'})]),
    ("hermes", XML, "", [PARIS]),
    ("llama3", '{"name": "get_weather", "parameters": ' + P + "}", "", [PARIS]),
    ("llama3", '<|python_tag|>{"name": "get_weather", "parameters": ' + P + '}; {"name": "now", "parameters": {}}', "",
     BOTH),
    ("llama3", '\n{"type": "function", "function": "now", "parameters": {}}', "", [NOW]),
    ("llama3", '{"name": "nothing", "parameters": {}}', '{"name": "nothing", "parameters": {}}', []),
    ("llama3", '{"title": "a", "n": [1]}', '{"title": "a", "n": [1]}', []),
    ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("llama3", HERMES_NOW, "", [NOW]),
    ("pythonic", '[get_weather(city="Paris", days=3), now()]', "", BOTH),
    ("pythonic", "[get_weather(city='P)\\'[', exact=true, limit=None, hours=[1, 2])]", "",
     [("get_weather", {"city": "P)'[", "exact": True, "limit": None, "hours": [1, 2]})]),
    ("pythonic", "[now(), other(a=1), ]", "", [NOW, ("other", {"a": 1})]),
    ("pythonic", "[1] As the source says, now() is", "[1] As the source says, now() is", []),
    ("pythonic", "[other(a=1)]", "[other(a=1)]", []),
    ("lfm2", '<|tool_call_start|>[get_weather(city="Paris", days=3), now()]<|tool_call_end|>', "", BOTH),
    ("lfm2", 'So: <|tool_call_start|>[get_weather(city="Paris", days=3)]<|tool_call_end|>Wait.', "So: Wait.", [PARIS]),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": ' + P + '}, {"name": "now", "arguments": {}}]', "",
     BOTH),
    ("mistral_tekken", '[TOOL_CALLS][{"name": "get_weather", "arguments": ' + P + "}]", "", [PARIS]),
    ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "abcdefghi"}]', "", [NOW]),
    ("mistral_args", "Hm. [TOOL_CALLS]get_weather[ARGS]" + P + "[TOOL_CALLS]now[ARGS]{}", "Hm.", BOTH),
    ("mistral_args", "[TOOL_CALLS]get_weather" + P, "", [PARIS]),
    ("mistral_args", "[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]" + P, "", [PARIS]),
    ("phi4", '<|tool_call|>[{"name": "get_weather", "arguments": ' + P + '}, {"name": "now"}]<|/tool_call|>', "", BOTH),
    ("phi4", '<|tool_call|>{"name": "now", "arguments": {}}<|/tool_call|>', "", [NOW]),
    ("granite", '<|tool_call|>[{"name": "get_weather", "arguments": ' + P + "}]", "", [PARIS]),
    ("granite", '<tool_call>[{"name": "get_weather", "arguments": ' + P + "}]", "", [PARIS]),
    ("deepseek_v3", DEEPSEEK[0] + V3.format("get_weather", P) + "\n" + V3.format("now", "{}") + DEEPSEEK[1], "", BOTH),
    ("deepseek_v31", "Ok." + DEEPSEEK[0] + V31.format("get_weather", P) + V31.format("now", "{}") + DEEPSEEK[1], "Ok.",
     BOTH),
    ("deepseek_v31", DEEPSEEK[0] + V31.format("get_weather", P) + DEEPSEEK[1], "", [PARIS]),
    ("cohere", '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": ' + P
     + '},\n    {"tool_call_id": "1", "tool_name": "now", "parameters": {}}\n]<|END_ACTION|>', "", BOTH),
    ("cohere", "<|START_RESPONSE|>Hello.<|END_RESPONSE|>", "Hello.", []),
    ("qwen_coder", "I look.\n" + XML + "\n<tool_call>\n<function=now>\n</function>\n</tool_call>", "I look.", BOTH),
    ("qwen_coder", XML.removeprefix("<tool_call>\n"), "", [PARIS]),
    ("qwen_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nA\n\nB < C\n</parameter>\n"
     "<parameter=hours>\n[1, 2]\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n"
     "<parameter=days>\nsome\n</parameter>\n</function>\n</tool_call>", "",
     [("get_weather", {"city": "A\n\nB < C", "hours": [1, 2], "exact": True, "days": "some"})]),
    ("qwen_coder", HERMES_PARIS, "", [PARIS]),
    ("glm", GLM, "", [PARIS]),
    ("glm", f"I look.\n{GLM}\n<tool_call>now\n</tool_call>", "I look.", BOTH),
    ("glm", f"I look.{GLM}I wait.", "I look.\nI wait.", [PARIS]),
    ("glm", "<tool_call>other\n<arg_key>q</arg_key>\n<arg_value>a < b\n</arg_value>\n</tool_call>", "",
     [("other", {"q": "a < b\n"})]),
    ("glm", HERMES_PARIS, "", [PARIS]),
    ("glm_4_7", GLM.replace("\n", "") + "<tool_call>now</tool_call>", "", BOTH),
    ("function_gemma", "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}<end_function_call>"
     "<start_function_call>call:now{}<end_function_call>", "", BOTH),
    ("gemma4", '<|tool_call>call:get_weather{city:<|"|>P, {x: "1"}<|"|>,hours:[1,2],exact:true}<tool_call|>', "",
     [("get_weather", {"city": 'P, {x: "1"}', "hours": [1, 2], "exact": True})]),
    ("gemma4", '<|tool_call>call:f{a:{b:[<|"|>c<|"|>,null]}}', "", [("f", {"a": {"b": ["c", None]}})]),
]  # fmt: skip

END_TAGS = [
    "</tool_call>", "</function>", "</parameter>", "</arg_value>", "<arg_key>", "<tool_call>", "[TOOL_CALLS]", "[ARGS]",
    "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<|/tool_call|>", "<|tool_call|>", "<|END_ACTION|>", "<tool_call|>",
    "<end_function_call>", "<|tool_call_end|>", "<|python_tag|>", "```", "</tools>", "</think>", "<|end|>", "<|call|>",
    "<|start|>", "<|message|>",
]  # fmt: skip
J = json.dumps
QWEN_CALL = "<tool_call>\n<function=get_weather>\n<parameter=city>\n{}\n</parameter>\n</function>\n</tool_call>"
GLM_CALL = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>{}</arg_value>\n</tool_call>"
WRITERS: dict[str, Callable[[str], str]] = {
    "hermes": lambda v: f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": {J(v)}}}}}\n</tool_call>',
    "llama3": lambda v: f'{{"name": "get_weather", "parameters": {{"city": {J(v)}}}}}',
    "pythonic": lambda v: f"[get_weather(city={J(v)})]",
    "lfm2": lambda v: f"<|tool_call_start|>[get_weather(city={J(v)})]<|tool_call_end|>",
    "mistral": lambda v: f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {{"city": {J(v)}}}}}]',
    "mistral_tekken": lambda v: f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {{"city": {J(v)}}}}}]',
    "mistral_args": lambda v: f'[TOOL_CALLS]get_weather[ARGS]{{"city": {J(v)}}}',
    "phi4": lambda v: f'<|tool_call|>[{{"name": "get_weather", "arguments": {{"city": {J(v)}}}}}]<|/tool_call|>',
    "granite": lambda v: f'<|tool_call|>[{{"name": "get_weather", "arguments": {{"city": {J(v)}}}}}]',
    "deepseek_v3": lambda v: DEEPSEEK[0] + V3.format("get_weather", J({"city": v})) + DEEPSEEK[1],
    "deepseek_v31": lambda v: DEEPSEEK[0] + V31.format("get_weather", J({"city": v})) + DEEPSEEK[1],
    "cohere": lambda v: (
        f'<|START_ACTION|>[{{"tool_name": "get_weather", "parameters": {{"city": {J(v)}}}}}]<|END_ACTION|>'
    ),
    "qwen_coder": QWEN_CALL.format,
    "glm": GLM_CALL.format,
    "glm_4_7": lambda v: GLM_CALL.replace("\n", "").format(v),
    "function_gemma": lambda v: f"<start_function_call>call:get_weather{{city:<escape>{v}<escape>}}<end_function_call>",
    "gemma4": lambda v: f'<|tool_call>call:get_weather{{city:<|"|>{v}<|"|>}}<tool_call|>',
    "harmony": lambda v: (
        f'<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{{"city": {J(v)}}}<|call|>'
    ),
}
"""How each family writes a call with one text."""

H_THINK = "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant"
H_CALL = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>" + P
HARMONY_ANSWERS: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    ("<|channel|>final<|message|>Hello.<|return|>", "Hello.", "", []),
    (f"{H_THINK}<|channel|>final<|message|>Hello.", "Hello.", "I look.", []),
    (f"{H_THINK}{H_CALL}<|call|>", "", "I look.", [PARIS]),
    (f"{H_THINK}{H_CALL}", "", "I look.", [PARIS]),
    (f"{H_THINK} to=functions.get_weather<|channel|>commentary json<|message|>{P}<|call|>", "", "I look.", [PARIS]),
    (f"<|channel|>commentary<|message|>First.<|end|><|start|>assistant{H_CALL}<|call|>", "First.", "", [PARIS]),
    (f"{H_THINK}<|channel|>analysis<|message|>Again.<|end|>", "", "I look.\nAgain.", []),
    (f"{H_CALL}<|call|><|start|>assistant<|channel|>commentary to=functions.now<|message|>{{}}<|call|>", "", "", BOTH),
    ("<|channel|>commentary<|message|>One.<|end|><|start|>assistant<|channel|>final<|message|>Two.", "One.\nTwo.", "",
     []),
    ("Hello.", "Hello.", "", []),
    (f"{H_THINK}<|channel|>final text<|message|>Hello.", "text\nHello.", "I look.", []),
    ('{"a": 1}', '{"a": 1}', "", []),
]  # fmt: skip
"""Answers, their text, their reasoning, and their calls."""

LENIENT: list[tuple[str, str, list[tuple[str, Any]]]] = [
    ('Here:\n```json\n{"name": "get_weather", "arguments": ' + P + "}\n```", "Here:", [PARIS]),
    ('```\n[{"name": "get_weather", "parameters": ' + P + '}, {"name": "now"}]\n```\nSo.', "So.", BOTH),
    ('{"name": "get_weather", "arguments": ' + P + "}\n", "", [PARIS]),
    ("```xml\n" + HERMES_PARIS + "\n```", "", [PARIS]),
    ('<tools>\n{"name": "get_weather", "arguments": ' + P + "}\n</tools>", "", [PARIS]),
]

TEXTS = [
    "Hello, world.\n",
    "  a [b] <c> `d` \n\n",
    '```json\n{"name": "Anna", "arguments": {}}\n```\n',
    '```json\n{"name": "now", "age": 3}\n```',
    '```json\n{"name": "now", "arguments": {}} // so\n```',
    '```json\n{"name": "now", "arguments": {"a": 1}\n```',
    '```python\nprint("<tool>")\n```\nand\n```json\n[1, 2]\n```',
    '```text\na\n```\n{"name": "now"}\n',
    '{"a": {"name": "now"}}',
    '{"name": "now", "arguments": {}} is a call.',
    '<tools>\n{"name": "elsewhere", "arguments": {}}\n</tools>',
    "[TOOL and <tool_cal and <｜tool▁call",
    '"name": "now"',
]


def parse(parser: Any, parts: list[str]) -> tuple[str, str, list[tuple[str, Any]], list[Piece]]:
    """Text, reasoning, calls and invalid pieces of an answer in parts."""
    pieces = [piece for part in parts for piece in parser.push(part)] + parser.finish()
    text, reasoning = ("".join(p.text for p in pieces if p.kind == kind) for kind in ("text", "reasoning"))
    invalid = [p for p in pieces if p.kind == "invalid"]
    calls: dict[int, list[str]] = {}
    for piece in pieces:
        if piece.kind == "call":
            assert piece.index not in calls
            calls[piece.index] = [piece.text, ""]
        elif piece.kind == "arguments":
            calls[piece.index][1] += piece.text
    for piece in invalid:
        calls.pop(piece.index, None)
    indices = [p.index for p in pieces if p.kind in ("call", "invalid") and p.index >= 0]
    assert sorted(set(indices)) == list(range(len(set(indices))))
    return text, reasoning, [(name, json.loads(arguments)) for name, arguments in calls.values()], invalid


def splits(answer: str, count: int = 8) -> list[list[str]]:
    """The answer whole, by character and at random borders."""
    out = [[answer], list(answer)]
    for seed in range(count):
        cuts = sorted(random.Random(seed).choices(range(len(answer) + 1), k=5))
        out.append([answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)])
    return out


def new(tool_format: ToolFormat = HERMES, **options: Any) -> AnswerParser:
    return AnswerParser(tool_format, TOOLS, **options)


def parser_of(name: str, **options: Any) -> Any:
    """The parser that reads a format."""
    return HarmonyParser(TOOLS) if name == "harmony" else new(FORMAT[name], **options)


def parse_any(name: str, parts: list[str], **options: Any) -> tuple[str, str, list[tuple[str, Any]], list[Piece]]:
    return parse(parser_of(name, **options), parts)


@pytest.mark.parametrize(("name", "answer", "text", "calls"), ANSWERS)
def test_answers_of_every_family_are_read(name: str, answer: str, text: str, calls: list[Any]) -> None:
    for parts in splits(answer):
        assert parse(new(FORMAT[name]), parts) == (text, "", calls, [])


@pytest.mark.parametrize(("answer", "text", "reasoning", "calls"), HARMONY_ANSWERS)
def test_answers_in_channels_are_read(answer: str, text: str, reasoning: str, calls: list[Any]) -> None:
    for parts in splits(answer):
        assert parse(HarmonyParser(TOOLS), parts) == (text, reasoning, calls, [])
        prompt = "<|start|>system<|message|>a<|channel|>b<|end|><|start|>assistant"
        assert parse(HarmonyParser(TOOLS, prefix=prompt), parts) == (text, reasoning, calls, [])
        if not calls:
            assert parse(HarmonyParser(), parts) == (text, reasoning, calls, [])


def test_a_message_in_a_channel_that_the_prompt_began_goes_on() -> None:
    begun = "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>analysis<|message|>Let me"
    for parts in splits(f" see.<|end|><|start|>assistant{H_CALL}"):
        assert parse(HarmonyParser(TOOLS, prefix=begun), parts) == ("", " see.", [PARIS], [])


@pytest.mark.parametrize("arguments", ["[1]", "{'a': 1}", '{"a": ', "none"])
def test_a_broken_call_in_a_channel_is_one_invalid_piece(arguments: str) -> None:
    header = H_CALL.removesuffix(P)
    for parts in splits(f"{H_THINK}{header}{arguments}<|call|><|start|>assistant<|channel|>final<|message|>So."):
        text, reasoning, calls, invalid = parse(HarmonyParser(TOOLS), parts)
        assert (text, reasoning, calls) == ("So.", "I look.", [])
        assert [piece.text for piece in invalid] == [arguments.strip()]


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
def test_calls_written_by_the_table_are_read(entry: ToolFormat) -> None:
    if entry.style != "json":
        return
    calls = [PARIS] if entry.name == "harmony" else BOTH
    written = [entry.begin(name) + json.dumps(arguments) + entry.call_end for name, arguments in calls]
    answer = entry.opening + entry.separator.join(written) + entry.closing
    assert parse_any(entry.name, [answer]) == ("", "", calls, [])


@pytest.mark.parametrize("entry", AMID_TEXT, ids=lambda entry: entry.name)
@pytest.mark.parametrize(("answer", "text", "calls"), LENIENT)
def test_small_models_write_calls_otherwise(entry: ToolFormat, answer: str, text: str, calls: list[Any]) -> None:
    for parts in splits(answer):
        assert parse(new(entry), parts) == (text, "", calls, [])


@pytest.mark.parametrize("entry", AMID_TEXT, ids=lambda entry: entry.name)
@pytest.mark.parametrize("answer", TEXTS)
def test_other_text_stays_as_it_is(entry: ToolFormat, answer: str) -> None:
    if not entry.trigger and answer.startswith('{"name": "now", "arguments": {}} is'):
        return  # where a call is the whole answer, its object is one at once
    for parts in splits(answer):
        assert parse(new(entry), parts) == (answer, "", [], [])


@pytest.mark.parametrize(("name", "answer", "text", "calls"), ANSWERS)
def test_answers_cut_anywhere_give_their_whole_calls(name: str, answer: str, text: str, calls: list[Any]) -> None:
    for end in range(len(answer)):
        cut = answer[:end]
        whole, by_character = parse(new(FORMAT[name]), [cut]), parse(new(FORMAT[name]), list(cut))
        assert whole == by_character
        assert len(whole[2]) <= len(calls)
        assert len(whole[3]) <= 1
        assert all(piece.error for piece in whole[3])
        assert whole[2] == calls[: len(whole[2])]
        if cut and text.startswith(cut):
            assert whole[0] == cut


BROKEN = [
    ("hermes", "A <tool_call>\n{'name': 'now'}\n</tool_call>\nB", "{'name': 'now'}"),
    ("hermes", "A <tool_call>\nnow()\n</tool_call>\nB", "now()"),
    ("hermes", 'A <tool_call>\n{"arguments": {}}\n</tool_call>\nB', '{"arguments": {}}'),
    ("hermes", 'A <tool_call>\n{"name": "now", "arguments": [1]}\n</tool_call>\nB', "[1]"),
    ("hermes", 'A <tool_call>\n{"name": "now", "arguments": {"a": 01}}\n</tool_call>\nB', '{"a": 01}'),
    ("hermes", 'A <tool_call>\n{"name": "now", "arguments": {"a": "x}\n</tool_call>\nB', '{"a": "x}'),
    ("hermes", 'A <tool_call>\n{"name": "now", "arguments": {"a": "x}</tool_call>B', '{"a": "x}'),
    ("hermes", 'A <tool_call>\n{"name": "now", "arguments": {"a": 1</tool_call>B', '{"a": 1'),
    ("hermes", 'A <tool_call>\n{"name": 3}\n</tool_call>\nB', '{"name": 3}'),
    ("hermes", 'A <tool_call>\n{"name": "now", "arguments": ' + "[" * 5000 + "]" * 5000 + "}\n</tool_call>\nB",
     "[" * 5000 + "]" * 5000),
    ("hermes", "A <tool_call>" + '{"function": ' * 3000 + "</tool_call>B", '{"function": ' * 2999 + '{"function":'),
    ("phi4", 'A <|tool_call|>[{"name": "now", "arguments": 3}]<|/tool_call|>B', "3"),
    ("phi4", "A <|tool_call|>[1]<|/tool_call|>B", "[1]"),
    ("cohere", 'A <|START_ACTION|>[{"parameters": {}}]<|END_ACTION|>B', '{"parameters": {}}]'),
    ("deepseek_v31", "A <｜tool▁call▁begin｜>now<｜tool▁sep｜>none<｜tool▁call▁end｜>B", "none"),
    ("deepseek_v31", "A <｜tool▁call▁begin｜>now<｜tool▁call▁end｜>B", "now"),
    ("qwen_coder", "A <tool_call>\n<function=now>\nx\n</function>\n</tool_call>B", "x\n</function>"),
    ("function_gemma", "A <start_function_call>call:now{a:<escape>b}<end_function_call>B", "{a:<escape>b}"),
    ("lfm2", "A <|tool_call_start|>[now(1)]<|tool_call_end|>B", "(1)]"),
    ("lfm2", "A <|tool_call_start|>[now(a=open)]<|tool_call_end|>B", "(a=open)]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answer", "written"), BROKEN)
def test_a_broken_call_is_one_invalid_piece(name: str, answer: str, written: str) -> None:
    for parts in splits(answer):
        text, _, calls, invalid = parse(new(FORMAT[name]), parts)
        assert (text, calls) == ("A\nB" if answer.endswith("\nB") else "A B", [])
        assert [piece.text for piece in invalid] == [written]
        assert invalid[0].error


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        ('{"name": "now"}\n{"name": "now", "argu', '{"name": "now", "argu'),
        ('```json\n{"name": "now"}\n{"na', '{"na'),
        ('[{"name": "now"}, {"name": "now", "arguments": {"a": "x', '{"name": "now", "arguments": {"a": "x'),
    ],
)
def test_of_a_list_that_was_cut_off_the_whole_calls_are_calls(answer: str, rest: str) -> None:
    for parts in splits(answer):
        text, _, calls, invalid = parse(new(), parts)
        assert (text, calls) == ("", [NOW])
        assert [(piece.index, piece.text, piece.error) for piece in invalid] == [(1, rest, "it is cut off")]


@pytest.mark.parametrize("name", [entry.name for entry in FORMATS])
def test_a_value_may_hold_any_end_tag(name: str) -> None:
    rng = random.Random(name)
    values = [f'grep "{tag}" a.txt; ls b' for tag in END_TAGS]
    values += [f"{tag}" for tag in END_TAGS] + [f"a\n{tag}\nb" for tag in END_TAGS]
    values += ["".join(rng.choices([*END_TAGS, " ", "\n", "a", "'", "{", "]"], k=8)) for _ in range(40)]
    for value in values:
        answer = WRITERS[name](value)
        read = [parse_any(name, parts) for parts in splits(answer, 3)]
        assert read == read[:1] * len(read)
        text, _, calls, invalid = read[0]
        if is_certain(name, value):
            assert (text, calls, invalid) == ("", [("get_weather", {"city": value})], []), value
        else:
            assert all(call == ("get_weather", {"city": value}) for call in calls), (value, calls)
            assert calls or invalid


def is_certain(name: str, value: str) -> bool:
    """Whether a value's end is certain in a format; those in XML escape nothing."""
    if "glm" in name:
        return "<arg_key>" not in value and not re.search(r"</arg_value>\s*</tool_call>", value)
    return name != "qwen_coder" or value.strip("\n") == value


CUT = "the end of its parameter 'city' is not certain"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qwen_coder", "a\n</parameter>\n</function>\n</tool_call>\nb"),
        ("qwen_coder", "a\n</parameter>\n<parameter=days>\n3"),
        ("qwen_coder", "a\n<parameter=days>\n3"),
        ("qwen_coder", QWEN_CALL.format("x")),
        ("qwen_coder", f"Like\n{QWEN_CALL.format('x')}\nor so."),
        ("glm", "a</arg_value>\n</tool_call>b"),
        ("glm", GLM_CALL.format("x")),
        ("glm", f"Like\n{GLM_CALL.format('x')}\nor so."),
    ],
)
def test_a_value_whose_end_is_not_certain_makes_an_invalid_call(name: str, value: str) -> None:
    """Such a text can be read in two ways; one of them is a call with half of the value."""
    for parts in splits(WRITERS[name](value) + "\nDone."):
        text, _, calls, invalid = parse(new(FORMAT[name]), parts)
        if "days" in value and "</parameter>" in value:  # the format itself says that these are two parameters
            assert (text, calls) == ("Done.", [("get_weather", {"city": "a", "days": 3})])
            continue
        assert calls == []
        assert CUT in invalid[0].error
        assert "Done." in text


def test_a_parameter_twice_makes_an_invalid_call() -> None:
    value = "a\n</parameter>\n<parameter=city>\nb"
    for parts in splits(QWEN_CALL.format(value)):
        _, _, calls, invalid = parse(new(FORMAT["qwen_coder"]), parts)
        assert calls == []
        assert invalid[0].error == "it has the parameter 'city' twice"


def test_texts_around_calls_stay_apart() -> None:
    call = HERMES_NOW
    for answer, text in [
        (f"First I look.\n\n{call}\nThen I write.", "First I look.\n\nThen I write."),
        (f"First.{call}Then.", "First.\nThen."),
        (f"First. {call}\n{call}\n\nThen.\n{call}\n", "First.\n\nThen."),
        (f"\n\n{call}\nThen.\n", "Then.\n"),
        (f"  First.\n{call}", "  First."),
    ]:
        for parts in splits(answer):
            assert parse(new(), parts)[0] == text


def test_a_single_object_that_was_cut_off_is_text() -> None:
    for parts in splits('{"name": "now", "argu'):
        assert parse(new(), parts)[0] == '{"name": "now", "argu'


def test_a_call_after_a_broken_one() -> None:
    for parts in splits('<tool_call>\n{"name": "now", "arg\n' + HERMES_PARIS):
        _, _, calls, invalid = parse(new(), parts)
        assert calls == [PARIS]
        assert [(piece.index, piece.text) for piece in invalid] == [(0, '{"name": "now", "arg')]


def test_a_call_comes_as_it_is_written() -> None:
    parser = new()
    parts = ["I ", "see ", "<tool", '_call>{"name": "now"', ', "arguments": {', '"a"', ": 1", "}", "}"]
    kinds = [[(piece.kind, piece.text) for piece in parser.push(part)] for part in parts]
    assert kinds == [
        [("text", "I")], [("text", " see")], [], [("call", "now")], [("arguments", "{")], [("arguments", '"a"')],
        [("arguments", ": 1")], [("arguments", "}")], [],
    ]  # fmt: skip


@pytest.mark.parametrize("parser", [AnswerParser(None, TOOLS), AnswerParser(HERMES)])
def test_without_tools_all_is_text(parser: AnswerParser) -> None:
    assert [piece.text for piece in parser.push("a \n")] == ["a \n"]
    assert [piece.text for piece in parser.push(HERMES_NOW)] == [HERMES_NOW]
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("answer", "inside", "text", "reasoning", "calls"),
    [
        ("<think>\nHm.\n\nSo.\n</think>\n\nHello.\n", False, "Hello.\n", "Hm.\n\nSo.", []),
        ("\n<think>Hm.</think>\n\n  a", False, "  a", "Hm.", []),
        ("Hm.\n</think>\n\nHello.", True, "Hello.", "Hm.", []),
        ("<think>\nHm.\n</think>Hello.", True, "Hello.", "Hm.", []),
        ("Hm. </think> Hello.", False, "Hm. </think> Hello.", "", []),
        ("It writes <think> first.", False, "It writes <think> first.", "", []),
        ("<think>\n\n</think>\n\nHello.", False, "Hello.", "", []),
        ("<think>Hm.</think>\n<think>\nSo.\n</think>\nHello.", False, "Hello.", "Hm.\nSo.", []),
        ("<think>\nHm. <tool_call>\nx</think>Hello.", False, "Hello.", "Hm. <tool_call>\nx", []),
        ("<think>Hm.</think>\n\n" + HERMES_PARIS, False, "", "Hm.", [PARIS]),
        ('<think>Hm.</think>\n\n{"name": "now"}', False, "", "Hm.", [NOW]),
        ("Hello.", False, "Hello.", "", []),
    ],
)
def test_reasoning_stands_at_the_beginning(
    answer: str, inside: bool, text: str, reasoning: str, calls: list[Any]
) -> None:
    for parts in splits(answer):
        assert parse(new(reasoning=THINK, in_reasoning=inside), parts) == (text, reasoning, calls, [])
        if not calls and "tool_call" not in answer:
            plain = AnswerParser(None, reasoning=THINK, in_reasoning=inside)
            assert parse(plain, parts) == (text, reasoning, [], [])


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", [entry.name for entry in FORMATS if entry.trigger and entry.name != "harmony"])
def test_a_call_in_reasoning_that_is_never_closed_is_a_call(name: str, inside: bool) -> None:
    """In reasoning that is closed later, the same text is a mention of a call."""
    call = next(answer for known, answer, text, calls in ANSWERS if known == name and calls and not text)
    calls = next(calls for known, answer, text, calls in ANSWERS if known == name and calls and not text)
    opened = "" if inside else "<think>\n"
    for parts in splits(f"{opened}I look it up.\n{call}"):
        parser = new(FORMAT[name], reasoning=THINK, in_reasoning=inside)
        assert parse(parser, parts) == ("", "I look it up.", calls, [])
    for parts in splits(f"{opened}Like\n{call}\nor so?\n</think>\n\nNo."):
        parser = new(FORMAT[name], reasoning=THINK, in_reasoning=inside)
        assert parse(parser, parts) == ("No.", f"Like\n{call}\nor so?", [], [])
    for parts in splits(f"{opened}Like {call}\n</think>\n{call}\nSo."):
        parser = new(FORMAT[name], reasoning=THINK, in_reasoning=inside)
        assert parse(parser, parts) == ("So.", f"Like {call}", calls, [])


def test_a_broken_call_in_reasoning_that_is_never_closed_is_invalid() -> None:
    for parts in splits('Hm.\n<tool_call>\n{"name": "now", "arguments": {"a": 1\n</tool_call>\nSo.'):
        text, reasoning, calls, invalid = parse(new(reasoning=THINK, in_reasoning=True), parts)
        assert (text, reasoning, calls) == ("So.", "Hm.", [])
        assert [piece.text for piece in invalid] == ['{"a": 1']


def test_random_pieces_of_formats_never_raise() -> None:
    rng = random.Random(0)
    words = [word for _, answer, _, _ in ANSWERS for word in answer.replace("<", " <").split(" ")]
    for _ in range(1500):
        answer = " ".join(rng.choices(words, k=6))
        entry = rng.choice(FORMATS)
        whole = parse(new(entry, reasoning=THINK), [answer])
        assert whole == parse(new(entry, reasoning=THINK), list(answer))


LONG_ANSWERS: dict[str, tuple[str, str, str]] = {
    "text": ("hermes", "", "word ``` [1] {x} "),
    "space": ("hermes", "a", " \n" * 8),
    "space in a call": ("hermes", "<tool_call>", " " * 16),
    "reasoning": ("hermes", THINK.begin, "word. "),
    "line ends in reasoning": ("hermes", THINK.begin, "\n" * 16),
    "arguments": ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "', "word \\n "),
    "calls": ("hermes", "", HERMES_NOW + "\n"),
    "an invalid call": ("hermes", '<tool_call>{"name": "now", "arguments": ', "word "),
    "no call": ("hermes", "<tool_call>", "word "),
    "JSON": ("llama3", '{"name": "none", "a": [', "1, "),
    "XML": ("qwen_coder", "<tool_call>\n<function=now>\n<parameter=a>\n", "word "),
    "fences": ("hermes", "", "```json\n{}\n```\n"),
}
"""Formats, with answers' beginnings and what comes again and again."""


@pytest.mark.parametrize(("name", "begin", "part"), LONG_ANSWERS.values(), ids=LONG_ANSWERS)
def test_time_grows_with_the_length_only(name: str, begin: str, part: str) -> None:
    """An answer 16 times as long takes some 16 times as long; with a cost by its square, some hundred times."""

    def seconds(characters: int) -> float:
        answer = begin + part * (characters // len(part))
        parser, builder, began = new(FORMAT[name], reasoning=THINK), MessageBuilder(), time.process_time()
        for at in range(0, len(answer), 4):
            builder.add(parser.push(answer[at : at + 4]))
        builder.add(parser.finish())
        assert builder.message() is not None
        return time.process_time() - began

    assert seconds(160_000) < 60 * min(seconds(10_000) for _ in range(5))


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "hermes"),
        ("{{ messages }}", "hermes"),
        ('<tool_call>\\n{"name": <function-name>, "arguments": <args>}', "hermes"),
        ('{"name": function name, "parameters": dictionary of argument name and its value}', "llama3"),
        ("Respond in the format [func_name1(params_name1=params_value1, params_name2=...)]", "pythonic"),
        ("'[TOOL_CALLS]' + name + '[ARGS]'", "mistral_args"),
        ('"[TOOL_CALLS] ["', "mistral"),
        ("'<|tool|>' + message['tools'] + '<|/tool|>'", "phi4"),
        ("<|start_of_role|>system respond with <|tool_call|> followed by", "granite"),
        ("<｜tool▁calls▁begin｜> '```json'", "deepseek_v3"),
        ("<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("<|START_ACTION|>", "cohere"),
        ('<tool_call>\n<function=f>\n<parameter=a>, no "arguments"', "qwen_coder"),
        ("<|tool_call>call:", "gemma4"),
        ("<start_function_call>call:", "function_gemma"),
        ("<tool_call>{name}\n<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>", "glm"),
        ("<tool_call>{name}<arg_key>{k}</arg_key><arg_value>{v}</arg_value>", "glm_4_7"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "harmony"),
    ],
)
def test_the_format_that_a_template_wants(template: str | None, name: str) -> None:
    assert format_of(template).name == name


def test_the_reasoning_that_a_template_names() -> None:
    assert reasoning_of("x </think>") == THINK
    assert reasoning_of("[THINK]") == REASONING[1]
    assert reasoning_of("nothing") is None


class Tokenizer:
    """Has transformers' parser of a response template, as tokenizers give it."""

    all_special_tokens = ("<|im_start|>", "<|im_end|>")
    response_template = {  # noqa: RUF012
        "fields": {
            "thinking": {"open": "<think>", "close": "</think>"},
            "tool_calls": {
                "open": "<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": "<|im_end|>"},
        },
        "start_anchor": "<|im_start|>assistant\n",
    }

    def get_response_parser(self, *, prefix: str, tools: Any = None) -> Any:
        from transformers.utils.chat_parsing import ResponseParser

        return ResponseParser(self.response_template, prefix=prefix, tools=tools)


class XMLTokenizer(Tokenizer):
    """Has calls whose arguments are in tags, of which transformers takes those that it finds."""

    response_template = {  # noqa: RUF012
        "fields": {
            "thinking": {"open": "<think>", "close": "</think>"},
            "tool_calls": {
                "open_pattern": r"<tool_call>\s*<function=(?P<name>[\w.]+)>\s*",
                "close": "</function>\n</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n(?P<value>.*?)\n</parameter>"},
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"close": "<|im_end|>"},
        },
        "start_anchor": "<|im_start|>assistant\n",
    }


PROMPT = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        (PROMPT, "Hello.\n", ("Hello.", "", [], [])),
        (PROMPT, f"<think>\nHm.\n</think>\n\nSo.\n{HERMES_PARIS}\n{HERMES_NOW}<|im_end|>", ("So.", "Hm.", BOTH, [])),
        (PROMPT + "<think>\n", f"Hm.</think>{HERMES_NOW}", ("", "Hm.", [NOW], [])),
    ],
)
def test_response_templates_give_the_same_pieces(prompt: str, answer: str, expected: Any) -> None:
    for parts in splits(answer):
        assert parse(TemplateParser(Tokenizer(), prompt, TOOLS), parts) == expected


@pytest.mark.parametrize("inner", ["{broken", '{"arguments": {}}', '{"name": "now", "arguments": 3}', "[1]"])
def test_response_templates_with_broken_calls(inner: str) -> None:
    answer = f"<think>Hm.</think>A<tool_call>{inner}</tool_call>{HERMES_PARIS}B"
    for parts in splits(answer):
        text, reasoning, calls, invalid = parse(TemplateParser(Tokenizer(), PROMPT + "", TOOLS), parts)
        assert (text, reasoning, calls) == ("A\nB", "Hm.", [PARIS])
        assert [piece.index for piece in invalid] == [0]
        assert invalid[0].text == inner


def test_response_templates_cut_anywhere() -> None:
    answer = f"<think>Hm.</think>So. {HERMES_PARIS}"
    for end in range(len(answer)):
        for parts in ([answer[:end]], list(answer[:end])):
            _, _, calls, invalid = parse(TemplateParser(Tokenizer(), PROMPT, TOOLS), parts)
            assert len(calls) + len(invalid) <= 1


def test_response_templates_make_no_call_of_one_whose_end_is_missing() -> None:
    """transformers reads the arguments that are there, and would call the tool without the others."""
    begun = "<tool_call>\n<function=now>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n"
    answer = f"So. {begun}</function>\n</tool_call>"
    for end in range(len(answer) + 1):
        for parts in ([answer[:end]], list(answer[:end])):
            text, _, calls, invalid = parse(TemplateParser(XMLTokenizer(), PROMPT, TOOLS), parts)
            assert calls == ([("now", {"a": "1", "b": "2"})] if end == len(answer) else [])
            if answer[:end].count(">") > 1 and end < len(answer):
                assert [piece.error for piece in invalid] == ["it is cut off"]
            assert text.startswith("So.") or end < 3


def test_response_templates_let_a_call_end_where_its_mark_is_an_end_token() -> None:
    class Ended(XMLTokenizer):
        all_special_tokens = ("</function>\n</tool_call>",)

    answer = "<tool_call><function=now><parameter=a>\n1\n</parameter>\n"
    assert parse(TemplateParser(Ended(), PROMPT, TOOLS), [answer])[2] == [("now", {"a": "1"})]
