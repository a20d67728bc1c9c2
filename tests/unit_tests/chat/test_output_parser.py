"""The parsers of answers, on every family's format.

The answers are written by hand after the formats that the models' makers have published.
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from langchain_quantllm.chat.output_parser import AnswerParser
from langchain_quantllm.chat.pieces import Piece
from langchain_quantllm.chat.response_template import TemplateParser
from langchain_quantllm.chat.result import MessageBuilder
from langchain_quantllm.structured.tool_formats import FORMATS, HERMES, REASONING, ToolFormat, format_of, reasoning_of

FORMAT = {entry.name: entry for entry in FORMATS}
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
    ("lfm2", 'So: <|tool_call_start|>[get_weather(city="Paris", days=3)]<|tool_call_end|>Wait.', "So: Wait.", [PARIS]),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": ' + P + '}, {"name": "now", "arguments": {}}]', "",
     BOTH),
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
    ("function_gemma", "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}<end_function_call>"
     "<start_function_call>call:now{}<end_function_call>", "", BOTH),
    ("gemma4", '<|tool_call>call:get_weather{city:<|"|>P, {x: "1"}<|"|>,hours:[1,2],exact:true}<tool_call|>', "",
     [("get_weather", {"city": 'P, {x: "1"}', "hours": [1, 2], "exact": True})]),
    ("gemma4", '<|tool_call>call:f{a:{b:[<|"|>c<|"|>,null]}}', "", [("f", {"a": {"b": ["c", None]}})]),
]  # fmt: skip

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


def splits(answer: str) -> list[list[str]]:
    """The answer whole, by character and at random borders."""
    out = [[answer], list(answer)]
    for seed in range(8):
        cuts = sorted(random.Random(seed).choices(range(len(answer) + 1), k=5))
        out.append([answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)])
    return out


def new(tool_format: ToolFormat = HERMES, **options: Any) -> AnswerParser:
    return AnswerParser(tool_format, TOOLS, **options)


@pytest.mark.parametrize(("name", "answer", "text", "calls"), ANSWERS)
def test_answers_of_every_family_are_read(name: str, answer: str, text: str, calls: list[Any]) -> None:
    for parts in splits(answer):
        assert parse(new(FORMAT[name]), parts) == (text, "", calls, [])


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
def test_calls_written_by_the_table_are_read(entry: ToolFormat) -> None:
    if entry.style != "json":
        return
    written = [entry.begin(name) + json.dumps(arguments) + entry.call_end for name, arguments in BOTH]
    answer = entry.opening + entry.separator.join(written) + entry.closing
    assert parse(new(entry), [answer]) == ("", "", BOTH, [])


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
@pytest.mark.parametrize(("answer", "text", "calls"), LENIENT)
def test_small_models_write_calls_otherwise(entry: ToolFormat, answer: str, text: str, calls: list[Any]) -> None:
    for parts in splits(answer):
        assert parse(new(entry), parts) == (text, "", calls, [])


@pytest.mark.parametrize("entry", FORMATS, ids=lambda entry: entry.name)
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
        ("<think>\nHm. " + HERMES_NOW, False, "", "Hm. " + HERMES_NOW, []),
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

    template = {  # noqa: RUF012
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

        return ResponseParser(self.template, prefix=prefix, tools=tools)


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
        assert (text, reasoning, calls) == ("AB", "Hm.", [PARIS])
        assert [piece.index for piece in invalid] == [0]
        assert invalid[0].text == inner


def test_response_templates_cut_anywhere() -> None:
    answer = f"<think>Hm.</think>So. {HERMES_PARIS}"
    for end in range(len(answer)):
        for parts in ([answer[:end]], list(answer[:end])):
            _, _, calls, invalid = parse(TemplateParser(Tokenizer(), PROMPT, TOOLS), parts)
            assert len(calls) + len(invalid) <= 1
