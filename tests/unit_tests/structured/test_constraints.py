"""Constraints: their checks, their errors, their ends, and reasoning before them."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.request import plan_requests
from langchain_quantllm.errors import GenerationError, InvalidOptionError, MissingPackageError
from langchain_quantllm.options import GenerationOptions
from langchain_quantllm.structured import (
    Choice,
    Compiler,
    Constraint,
    Grammar,
    JSONObject,
    JSONSchema,
    Regex,
    ToolCalls,
)
from langchain_quantllm.structured.tool_formats import HERMES
from tests.support.chat_constraints import TOOLS, Free, Node, Point, Shape, Writer, calls_in

pytest.importorskip("xgrammar")

REFUSED = [
    (JSONSchema({"type": "banana"}), "banana"),
    (JSONSchema({"$ref": "#/$defs/missing"}), "leads nowhere"),
    (JSONSchema({"$ref": "http://example.com/a"}), "leads out"),
    (JSONSchema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
    (JSONSchema({"type": "string", "pattern": "["}), "Unclosed"),
    (JSONSchema({"type": "string", "pattern": "^(?!a)b$"}), "looks ahead"),
    (JSONSchema({"type": "string", "pattern": '^"$'}), "quotes"),
    (JSONSchema({"type": "object", "properties": {"a": 5}}), "not a schema"),
    (JSONSchema({"enum": []}), "nothing is valid"),
    (JSONSchema({"enum": ["a"], "type": "integer"}), "nothing is valid"),
    (JSONSchema({"allOf": [{"type": "integer"}, {"type": "string"}]}), "cannot both hold"),
    (JSONSchema({"allOf": [{"pattern": "^a"}, {"pattern": "b$"}]}), "cannot both hold"),
    (JSONSchema({"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 6}), "no multiple of 7"),
    (JSONSchema({"type": "object", "properties": {"a": False}, "required": ["a"]}), "no value"),
    (JSONSchema({"type": "object", "properties": {"a": {}}, "patternProperties": {"(": {}}}), "cannot be read"),
    (JSONSchema("{"), "Expecting"),
    (Regex("a("), "paren"),
    (Regex(r"(?=a)b"), "looks ahead"),
    (Grammar("root ::= other"), "other"),
    (ToolCalls(HERMES, ({"type": "function"},)), "function"),
]


class TestConstraints:
    @pytest.mark.parametrize(("constraint", "reason"), REFUSED, ids=lambda v: str(v)[:50])
    def test_constraints_that_cannot_be_enforced_say_so(
        self, compiler: Compiler, constraint: Constraint, reason: str
    ) -> None:
        with pytest.raises(InvalidOptionError, match=reason) as caught:
            compiler.mask_factory(constraint, 100)
        assert "cannot be enforced" in str(caught.value)
        assert "/project/" not in str(caught.value)

    def test_wrong_options_are_refused(self) -> None:
        with pytest.raises(InvalidOptionError, match="did you mean 'auto'"):
            ToolCalls(HERMES, TOOLS, "autos")
        with pytest.raises(InvalidOptionError, match="no tools"):
            ToolCalls(HERMES, ())
        with pytest.raises(InvalidOptionError, match="at least one"):
            Choice(())

    @pytest.mark.parametrize("pattern", [r"[a-f]{2,4}-\d+", r"^(yes|no)!$", r'"[^"]*";', r"(ab)*c"])
    def test_texts_match_a_regex(self, compiler: Compiler, pattern: str) -> None:
        for seed in range(20):
            assert re.fullmatch(pattern, Writer(compiler, Regex(pattern), max_new_tokens=60, seed=seed).rest())

    def test_texts_are_choices(self, compiler: Compiler) -> None:
        options = ("positive", "posit", "négatif", "a b\n<|im_start|>")
        found = {Writer(compiler, Choice(options), seed=seed).rest() for seed in range(20)}
        assert found <= set(options)
        assert len(found) > 1
        writer = Writer(compiler, Choice(options))
        writer.write("posit")
        assert writer.may_stop

    def test_texts_follow_a_grammar(self, compiler: Compiler) -> None:
        grammar = Grammar('root ::= "(" root ")" | [0-9]+')
        for seed in range(20):
            assert re.fullmatch(r"(\(*)\d+(\)*)", Writer(compiler, grammar, max_new_tokens=100, seed=seed).rest())

    @pytest.mark.parametrize("state", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "device"])
    def test_what_the_caller_s_thread_has_set_changes_no_mask(self, compiler: Compiler, small: Any, state: Any) -> None:
        constraint = JSONSchema(Shape.model_json_schema())
        expected = Writer(compiler, constraint, max_new_tokens=60, seed=1).rest()
        with state():
            other = Compiler(small, len(small), (small.eos_token_id,))
            other.mask_factory(constraint, 60)
        assert Writer(other, constraint, max_new_tokens=60, seed=1).rest() == expected

    def test_equal_constraints_are_compiled_once(self, compiler: Compiler) -> None:
        one = JSONSchema(Node.model_json_schema())
        assert one == JSONSchema(Node.model_json_schema())
        assert hash(one) == hash(JSONSchema(Node.model_json_schema()))
        assert len({one, JSONSchema({"type": "object"}), JSONObject(), Regex("a"), Choice(("a",))}) == 5
        assert JSONObject() != JSONObject(reasoning=("<think>", "</think>", False))
        assert hash(ToolCalls(HERMES, TOOLS)) == hash(ToolCalls(HERMES, list(TOOLS)))
        compiler.mask_factory(one, 10)
        count = len(compiler._compiled)
        compiler.mask_factory(JSONSchema(Node.model_json_schema()), 20)
        assert len(compiler._compiled) == count

    def test_the_cache_is_bounded(self, compiler: Compiler) -> None:
        for i in range(40):
            compiler.mask_factory(Choice((str(i),)), 10)
        assert len(compiler._compiled) <= 32

    def test_a_compiler_serves_many_threads(self, small: Any) -> None:
        compiler = Compiler(small, len(small), (small.eos_token_id,))
        texts: dict[int, str] = {}

        def work(i: int) -> None:
            schema = {"type": "object", "properties": {f"p{i}": {"type": "integer"}}, "required": [f"p{i}"]}
            texts[i] = Writer(compiler, JSONSchema(schema), seed=i).rest()

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [list(json.loads(texts[i])) for i in range(8)] == [[f"p{i}"] for i in range(8)]

    def test_a_missing_xgrammar_names_the_command(self, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xgrammar" else find(name))
        with pytest.raises(MissingPackageError, match=re.escape('pip install "langchain-quantllm[structured]"')):
            compiler.mask_factory(JSONObject(), 10)

    def test_a_token_that_is_not_allowed_raises(self, compiler: Compiler) -> None:
        writer = Writer(compiler, JSONObject())
        with pytest.raises(GenerationError, match="does not allow"):
            writer.mask.accept(writer.tokenizer.encode("x")[0])


class TestEnds:
    @pytest.mark.parametrize("constraint", [JSONSchema(Free.model_json_schema()), Choice(("yes", "no"))], ids=repr)
    def test_without_end_tokens_blanks_follow(self, small: Any, constraint: Constraint) -> None:
        writer = Writer(Compiler(small, len(small), ()), constraint, max_new_tokens=120)
        while len(writer.ids) < 120:
            writer.draw()
        assert writer.mask.ended
        text = writer.text.strip()
        assert text in ("yes", "no") or Free.model_validate_json(text)

    def test_end_tokens_of_the_request(self, compiler: Compiler, small: Any) -> None:
        for own in ((0,), (0, 5)):
            make = compiler.mask_factory(Choice(("yes",)), 10, own)
            assert make is not None
            writer = Writer(compiler, Choice(("yes",)))
            writer.mask = make()
            writer.write("yes")
            assert writer.allowed() == list(own)
            writer.put(own[-1])
            assert writer.allowed() != []  # a row with `ignore_eos` goes on
        make = compiler.mask_factory(Choice(("yes",)), 10, ())
        assert make is not None
        writer = Writer(compiler, Choice(("yes",)))
        writer.mask = make()
        writer.write("yes")
        assert small.decode(writer.allowed()).strip() == ""


THINK = ("<think>", "</think>")


class TestReasoning:
    @pytest.mark.parametrize("is_open", [False, True])
    def test_reasoning_comes_first(self, compiler: Compiler, is_open: bool) -> None:
        writer = Writer(compiler, Choice(("yes", "no"), reasoning=(*THINK, is_open)))
        writer.write('Hm {"x"' if is_open else '<think>Hm {"x"')
        assert not writer.may_stop
        assert len(writer.allowed()) > 0.9 * len(writer.tokenizer)
        writer.write("</think>\n\n")
        assert writer.rest().rpartition("\n\n")[2] in ("yes", "no")

    def test_reasoning_may_be_left_out(self, compiler: Compiler) -> None:
        writer = Writer(compiler, JSONSchema({"const": "yes"}, reasoning=(*THINK, False)))
        writer.write('"yes"')
        assert writer.may_stop

    @pytest.mark.parametrize("is_open", [False, True])
    def test_reasoning_leaves_room_for_the_answer(self, compiler: Compiler, is_open: bool) -> None:
        for seed in range(5):
            writer = Writer(compiler, JSONSchema(Point.model_json_schema(), reasoning=(*THINK, is_open)), seed=seed)
            if not is_open:
                writer.write("<think>")
            Point.model_validate_json(writer.rest().rpartition("</think>")[2])


class TestEngine:
    def test_constraints_hold_side_by_side_in_one_batch(self, any_smollm2: Path) -> None:
        llm = QuantizedHuggingFaceLLM(model_id=str(any_smollm2), quantization=None, dtype="float32", device="cpu")
        tokenizer = llm.pipeline.tokenizer
        prompt = tokenizer.encode("<|im_start|>user\nDescribe a blue triangle.<|im_end|>\n<|im_start|>assistant\n")
        options = GenerationOptions(max_new_tokens=120, do_sample=True, temperature=1.0, top_k=0, seed=3, n=2)
        limits = llm._engine(options).limits
        compiler = Compiler(tokenizer, limits.vocab_size, limits.eos_token_ids)
        constraints = [
            JSONSchema(Shape.model_json_schema()),
            Choice(("yes", "no")),
            ToolCalls(HERMES, TOOLS, "required", False),
        ]
        requests = [
            request
            for constraint in (None, *constraints)
            for request in plan_requests(
                prompt, options, limits, mask=None if constraint is None else compiler.mask_factory(constraint, 120)
            )
        ]
        texts, reasons = [""] * len(requests), [""] * len(requests)
        with llm._engine(options).submit(requests) as stream:
            for chunk in stream:
                texts[chunk.row] += chunk.text
                reasons[chunk.row] = chunk.finish_reason or ""
        assert reasons[2:] == ["stop"] * 6
        for text in texts[2:4]:
            Shape.model_validate_json(text)
        assert set(texts[4:6]) <= {"yes", "no"}
        assert [len(calls_in(text, HERMES)) for text in texts[6:]] == [1, 1]
