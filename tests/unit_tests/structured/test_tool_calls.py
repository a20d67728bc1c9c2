"""Constrained tool calls in every format: alone and amid text, valid and in time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from langchain_quantllm.structured import Compiler, ToolCalls
from langchain_quantllm.structured.tool_formats import FORMATS, HERMES, ToolFormat
from tests.support.chat_constraints import TOOLS, Point, Shape, Writer, calls_in, function

pytest.importorskip("xgrammar")

JSON_FORMATS = [entry for entry in FORMATS if entry.style == "json"]


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

    def test_calls_in_xml_are_valid(self, compiler: Compiler) -> None:
        tools = next(f for f in FORMATS if f.style == "qwen_xml")
        parameters = {
            "type": "object",
            "properties": {"text": {"type": "string"}, "n": {"type": "integer"}, "at": Point.model_json_schema()},
            "required": ["text", "n", "at"],
        }
        for seed in range(10):
            text = Writer(compiler, ToolCalls(tools, [function("f", parameters)], "required", False), 150, seed).rest()
            assert text.startswith(tools.begin("f"))
            assert text.endswith(tools.call_end)
            values = dict(re.findall(r"<parameter=(\w+)>(.*?)</parameter>", text, re.DOTALL))
            assert list(values) == ["text", "n", "at"]
            int(values["n"])
            Point.model_validate_json(values["at"])

    def test_formats_that_cannot_be_written_are_free_or_hermes(self, compiler: Compiler) -> None:
        for tools in FORMATS:
            if tools.style not in ("json", "qwen_xml") or not tools.trigger:
                assert compiler.mask_factory(ToolCalls(tools, TOOLS), 100) is None
        other = next(f for f in FORMATS if f.style not in ("json", "qwen_xml"))
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
