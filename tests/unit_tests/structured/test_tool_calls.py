"""Constrained tool calls in every format: alone and amid text, valid and in time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from langchain_quantllm.chat.output_parser import AnswerParser
from langchain_quantllm.chat.result import MessageBuilder
from langchain_quantllm.structured import Compiler, ToolCalls
from langchain_quantllm.structured.tool_formats import FORMATS, HERMES, ToolFormat
from tests.support.chat_constraints import TOOLS, Point, Shape, Writer, calls_in, check_schema, function

pytest.importorskip("xgrammar")

WRITABLE = ("json", "qwen_xml", "glm_xml")
JSON_FORMATS = [entry for entry in FORMATS if entry.style == "json"]
XML_FORMATS = [entry for entry in FORMATS if entry.style in ("qwen_xml", "glm_xml")]
XML_PROPERTIES: dict[str, Any] = {
    "text": {"type": "string"},
    "more": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "n": {"type": "integer"},
    "at": Point.model_json_schema(),
    "kind": {"enum": ["a b", "c"]},
    "names": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
}
XML_TOOL = function(
    "f", {"type": "object", "properties": XML_PROPERTIES, "required": ["text", "n", "at", "kind", "names"]}
)


def read_calls(tools: ToolFormat, text: str) -> list[tuple[str, Any]]:
    """Read calls as a chat model does; fails where one is invalid, or other text is beside them."""
    parser, builder = AnswerParser(tools, [XML_TOOL]), MessageBuilder()
    builder.add([*parser.push(text), *parser.finish()])
    message = builder.message()
    assert (message.content, message.invalid_tool_calls) == ("", [])
    return [(call["name"], call["args"]) for call in message.tool_calls]


class TestTools:
    @pytest.mark.parametrize("parallel", [False, True])
    @pytest.mark.parametrize("tools", JSON_FORMATS, ids=lambda f: f.name)
    def test_required_calls_stand_alone(self, compiler: Compiler, tools: ToolFormat, parallel: bool) -> None:
        constraint = ToolCalls(tools, TOOLS, "required", parallel)
        found = [calls_in(Writer(compiler, constraint, 300, seed).rest(), tools) for seed in range(6)]
        assert parallel or max(map(len, found)) == 1

    @pytest.mark.parametrize("tools", [f for f in JSON_FORMATS if f.trigger], ids=lambda f: f.name)
    def test_automatic_calls_stand_amid_text(self, compiler: Compiler, tools: ToolFormat) -> None:
        writer = Writer(compiler, ToolCalls(tools, TOOLS), 400)
        writer.write('I "think" {that} [this] helps: ')
        assert writer.may_stop
        assert len(writer.allowed()) > 0.9 * len(writer.tokenizer)
        call = tools.opening + tools.begin("get_weather")
        writer.write(call)
        assert not writer.may_stop
        writer.write('{"city": "Köln"}' + tools.call_end + tools.closing)
        writer.write("\nfree again")
        assert writer.may_stop

    def test_one_automatic_call_where_several_are_not_wanted(self, compiler: Compiler) -> None:
        writer = Writer(compiler, ToolCalls(HERMES, TOOLS, parallel=False))
        writer.write("Hi " + HERMES.begin("now") + "{}" + HERMES.call_end)
        assert writer.allowed() == [writer.tokenizer.eos_token_id]

    def test_a_call_in_the_midst_of_text_is_closed(self, compiler: Compiler) -> None:
        for seed in range(10):
            writer = Writer(compiler, ToolCalls(HERMES, TOOLS), 120, seed)
            writer.write("Well: " + HERMES.begin("draw"))
            while not writer.may_stop:
                assert len(writer.ids) < 120, writer.text
                writer.draw()
            text = writer.text.split('arguments": ')[1].split("}\n</tool_call>")[0]
            Shape.model_validate_json(text)

    @pytest.mark.parametrize("tools", XML_FORMATS, ids=lambda f: f.name)
    def test_calls_in_xml_are_valid_and_read_as_they_are_written(self, compiler: Compiler, tools: ToolFormat) -> None:
        for seed in range(10):
            text = Writer(compiler, ToolCalls(tools, [XML_TOOL], "required", False), 400, seed).rest()
            assert text.startswith(tools.begin("f"))
            assert text.endswith(tools.call_end)
            ((name, values),) = read_calls(tools, text)
            assert name == "f"
            assert {"text", "n", "at", "kind", "names"} <= values.keys() <= XML_PROPERTIES.keys()
            check_schema(XML_TOOL["function"]["parameters"], values)

    @pytest.mark.parametrize("tools", XML_FORMATS, ids=lambda f: f.name)
    @pytest.mark.parametrize("mode", ["auto", "required"])
    def test_a_value_in_xml_may_hold_tags_of_calls(self, compiler: Compiler, tools: ToolFormat, mode: str) -> None:
        tags = ["</tool_call>", "</function>", "<tool_call>", '"<parameter=x>"', "<think>"]
        # The format without lines leaves no way to tell a quoted end tag of a value from one that ends it.
        tags += [{"glm": "</arg_value>, ", "qwen_coder": "</parameter>"}.get(tools.name, "")]
        value = f"grep {' '.join(tags)} a.txt; ls"
        begin, end = {
            "glm": ("<arg_key>text</arg_key>\n<arg_value>", "</arg_value>\n"),
            "glm_4_7": ("<arg_key>text</arg_key><arg_value>", "</arg_value>"),
            "qwen_coder": ("<parameter=text>\n", "\n</parameter>\n"),
        }[tools.name]
        text = tools.begin("f") + begin + value + end + tools.call_end
        tool = function("f", {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]})
        writer = Writer(compiler, ToolCalls(tools, [tool], mode), 200)
        writer.write(text)
        assert writer.may_stop
        assert read_calls(tools, text) == [("f", {"text": value})]

    @pytest.mark.parametrize("is_open", [False, True])
    def test_automatic_calls_may_be_left_out_amid_reasoning(self, compiler: Compiler, is_open: bool) -> None:
        marks = ("<think>", "</think>", is_open)
        constraint = ToolCalls(HERMES, TOOLS, reasoning=marks)
        writer = Writer(compiler, constraint)
        writer.write(("" if is_open else "<think>") + "It snows, and <tool_call> is a tag")
        assert writer.may_stop
        writer.write("</think>\n\n" + HERMES.begin("get_weather"))
        assert not writer.may_stop
        writer.write('{"city": "Oslo"}' + HERMES.call_end)
        assert writer.may_stop
        required = Writer(compiler, replace(constraint, mode="required"))
        required.write(("" if is_open else "<think>") + "It snows.")
        assert not required.may_stop

    def test_formats_that_cannot_be_written_are_free_or_hermes(self, compiler: Compiler) -> None:
        for tools in FORMATS:
            if tools.style not in WRITABLE or not tools.trigger:
                assert compiler.mask_factory(ToolCalls(tools, TOOLS), 100) is None
        other = next(f for f in FORMATS if f.style not in WRITABLE)
        assert calls_in(Writer(compiler, ToolCalls(other, TOOLS, "required"), 300).rest(), HERMES)

    def test_marks_are_written_as_special_tokens(self, wide: Compiler, qwen: Any) -> None:
        begin, end = qwen.convert_tokens_to_ids(["<tool_call>", "</tool_call>"])
        writer = Writer(wide, ToolCalls(HERMES, TOOLS, "required"), 300)
        writer.put(begin)
        writer.write('\n{"name": "now", "arguments": {}}\n')
        writer.put(end)
        assert writer.may_stop
        assert begin not in writer.allowed()
        writer = Writer(wide, ToolCalls(HERMES, TOOLS), 300)
        writer.write("Hi ")
        writer.put(begin)
        assert "\n" in {qwen.decode([i]) for i in writer.allowed()}
        assert not writer.may_stop

    @pytest.mark.parametrize("name", ["mistral_tekken", "mistral_args"])
    @pytest.mark.parametrize("mode", ["auto", "required"])
    def test_marks_added_to_a_tokenizer_are_special_tokens(self, smollm2: Path, name: str, mode: str) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
        tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]", "[OTHER]"]})
        mark, args, other = tokenizer.convert_tokens_to_ids(["[TOOL_CALLS]", "[ARGS]", "[OTHER]"])
        tools = next(f for f in FORMATS if f.name == name)
        writer = Writer(Compiler(tokenizer, len(tokenizer) + 100, (2,)), ToolCalls(tools, TOOLS, mode), 200)
        writer.put(mark)
        if name == "mistral_args":
            writer.write("get_weather")
            writer.put(args)
        else:
            writer.write('[{"name": "get_weather", "arguments": ')
        writer.write('{"city": "K')
        assert not {mark, args, other} & set(writer.allowed())
