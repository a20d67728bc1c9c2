"""Schemas, expressions and grammars of strangers: compiled or refused in one sentence, soon, and alone."""

from __future__ import annotations

import json
import random
import threading
import time
from typing import Any

import pytest
import torch

from langchain_quantllm.errors import GenerationError, InvalidOptionError
from langchain_quantllm.structured import Choice, Compiler, Grammar, JSONSchema, Regex, ToolCalls
from langchain_quantllm.structured import mask as mask_module
from langchain_quantllm.structured.tool_formats import HERMES
from tests.support.chat_constraints import Writer
from tests.support.random_schemas import mutated_schema

pytest.importorskip("xgrammar")


def references(levels: int, width: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {
        f"d{i}": {"type": "object", "properties": {f"p{j}": {"$ref": f"#/$defs/d{i + 1}"} for j in range(width)}}
        for i in range(levels)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{levels}": {"type": "integer"}}}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


TOO_MUCH: list[tuple[str, Any, str]] = [
    ("minItems", lambda: JSONSchema({"type": "array", "minItems": 10**9}), "minItems is 1000000000; at most 10000"),
    ("infinite", lambda: JSONSchema('{"type": "integer", "minimum": 1e400}'), "number inf"),
    ("nan", lambda: JSONSchema({"minimum": float("nan")}), "number nan"),
    ("digits", lambda: JSONSchema({"minimum": 10**5000}), "16610 bits; numbers lie between"),
    ("far", lambda: JSONSchema({"type": "number", "minimum": 1e200}), "between -1e15 and 1e15"),
    ("deep", lambda: JSONSchema(nested(10_000)), "nested more than 64 deep"),
    ("deep text", lambda: JSONSchema("[" * 100_000), "nested more than 64 deep"),
    ("names", lambda: JSONSchema({"properties": {1: {}}}), "the name 1 in it is no text"),
    ("no JSON", lambda: JSONSchema({"enum": [{1, 2}]}), "is a set, which JSON does not have"),
    ("wide", lambda: JSONSchema({"enum": list(range(30_000))}), "more than 20,000 values"),
    ("long", lambda: JSONSchema({"enum": ["x" * 5000]}), "5,000 characters; at most 2,000"),
    ("many", lambda: JSONSchema({"properties": {f"p{i}": {} for i in range(1001)}}), "1001 properties; at most 1000"),
    ("choices", lambda: Choice([f"{i}" * 9 for i in range(5000)]), "more than 60,000 characters"),
    ("choice", lambda: Choice(["x" * 2_000_000]), "2,000,000 characters; at most 2,000"),
    ("repetitions", lambda: Regex("a{1000000000}"), "1000000000 characters"),
    ("ambiguous", lambda: Regex("([^x]{0,10}){0,10}"), "too ambiguous or repetitive"),
    ("pattern", lambda: JSONSchema({"pattern": ".{0,300}.{0,300}"}), "too ambiguous or repetitive"),
    ("grammar", lambda: Grammar("root ::= a{0,10}\na ::= [^x]{0,10}"), "repeats a part 10 times that itself"),
    ("counts", lambda: Grammar('root ::= "a"{1000000}'), "1000000 times; at most 1000"),
    ("backtracking", lambda: JSONSchema({"enum": ["a" * 40 + "!"], "pattern": "^(a+)+$"}), "nothing is valid"),
    (
        "products",
        lambda: JSONSchema({"allOf": [{"anyOf": [{"minimum": i + n} for i in range(30)]} for n in range(8)]}),
        "900 pairs of branches; at most 500",
    ),
    ("circle", lambda: JSONSchema({"$ref": "#/a", "a": {"allOf": [{"$ref": "#/a"}]}}), "leads back to itself"),
    (
        "itself",
        lambda: JSONSchema({"$ref": "#/a", "a": {"anyOf": [{"$ref": "#/a"}, {"const": 1}]}}),
        "leads back to itself",
    ),
    (
        "endless",
        lambda: JSONSchema({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        "without an end",
    ),
    (
        "tool",
        lambda: ToolCalls(HERMES, ({"type": "function", "function": {"name": "f", "parameters": nested(99)}},)),
        "64 deep",
    ),
]


class TestLimits:
    @pytest.mark.parametrize(("name", "make", "reason"), TOO_MUCH, ids=[name for name, _, _ in TOO_MUCH])
    def test_too_much_is_refused_within_a_second(self, compiler: Compiler, name: str, make: Any, reason: str) -> None:
        began = time.process_time()
        with pytest.raises(InvalidOptionError, match=reason) as caught:
            compiler.mask_factory(make(), 64)
        assert time.process_time() - began < 1
        assert len(str(caught.value)) < 1000

    def test_references_that_stand_for_billions_of_values_compile(self, compiler: Compiler) -> None:
        began = time.process_time()
        writer = Writer(compiler, JSONSchema(references(7, 30)), max_new_tokens=120)
        assert time.process_time() - began < 2
        assert isinstance(json.loads(writer.rest()), dict)

    def test_numbers_are_finite_and_readable(self, compiler: Compiler) -> None:
        """Of a model that writes digits wherever it may."""
        for schema in ({"type": "number"}, {"type": "integer"}, {"type": "number", "minimum": 0}, {}):
            writer = Writer(compiler, JSONSchema(schema), max_new_tokens=300)
            while not (writer.may_stop and len(writer.ids) > 40):
                allowed = writer.allowed()
                texts = {i: writer.tokenizer.decode([i]) for i in allowed}
                wanted = [i for i in allowed if texts[i].isdigit()]
                if not wanted:
                    wanted = [i for i in allowed if texts[i] in ("e", "E", ".")]
                if not wanted:
                    break
                writer.put(writer.random.choice(wanted))
            number = json.loads(writer.text)
            assert abs(number) < 1e120
            assert number == number

    @pytest.mark.parametrize(
        "pattern", [r"^\S+@\S+$", "^.*;.*;$", r"^[^a-z]+ab[^a-z]+c$"], ids=["one mark", "two marks", "letters"]
    )
    def test_a_string_whose_pattern_asks_for_more_is_ended(self, compiler: Compiler, pattern: str) -> None:
        for seed in range(3):
            text = Writer(
                compiler, JSONSchema({"type": "string", "pattern": pattern}), seed=seed, max_new_tokens=150
            ).rest()
            assert json.loads(text)


class TestOthers:
    def test_a_slow_schema_delays_no_other(self, small: Any) -> None:
        compiler = Compiler(small, len(small), (small.eos_token_id,))
        known = Choice(("yes", "no"))
        compiler.mask_factory(known, 10)
        slow = JSONSchema({"type": "array", "items": {"enum": [f"{'word' * 12} {i}" for i in range(900)]}})
        running: list[float] = []

        def compile_slow() -> None:
            began = time.perf_counter()
            compiler.mask_factory(slow, 10)
            running.append(time.perf_counter() - began)

        threads = [threading.Thread(target=compile_slow) for _ in range(3)]
        for thread in threads:
            thread.start()
        waits = []
        while any(thread.is_alive() for thread in threads):
            began = time.perf_counter()
            compiler.mask_factory(known, 10)
            compiler.mask_factory(Choice((f"maybe {len(waits) % 25}",)), 10)
            waits.append(time.perf_counter() - began)
        for thread in threads:
            thread.join()
        assert len(waits) > 3  # others were compiled meanwhile
        assert sorted(waits)[len(waits) // 2] < max(running) / 3
        assert len({id(compiler._compiled[slow].result())}) == 1

    def test_threads_that_ask_for_a_wrong_schema_each_have_an_error_of_their_own(self, compiler: Compiler) -> None:
        wrong = JSONSchema({"enum": ["a", "b", "c"], "type": "integer", "title": "wrong"})
        errors: list[InvalidOptionError] = []

        def ask() -> None:
            try:
                compiler.mask_factory(wrong, 10)
            except InvalidOptionError as error:
                errors.append(error)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(error) for error in errors}) == 6
        assert wrong not in compiler._compiled

    def test_a_row_whose_masks_take_too_long_fails(self, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
        writer = Writer(compiler, JSONSchema({"type": "string"}))
        writer.write('"a')
        monkeypatch.setattr(mask_module, "SLOW_S", 0.0)
        monkeypatch.setattr(mask_module, "SLOW_TOKEN_S", 1e-9)
        with pytest.raises(GenerationError, match="simpler constraint"):
            writer.mask.fill(torch.full((1, -(-compiler._vocab_size // 32)), -1, dtype=torch.int32))


def check_strangers(compiler: Compiler, seeds: range) -> tuple[int, int, float]:
    """Compile mutated schemas; return how many compiled, how many were refused, and the longest time of the CPU."""
    compiled = refused = 0
    slowest = 0.0
    sentences: list[str] = []
    compiler.mask_factory(Choice(("warm",)), 10)
    for seed in seeds:
        schema = mutated_schema(random.Random(seed))
        began = time.process_time()
        try:
            make = compiler.mask_factory(JSONSchema(schema), 50)
            assert make is not None
            make()
            compiled += 1
        except InvalidOptionError as error:
            refused += 1
            sentences.append(str(error))
        slowest = max(slowest, time.process_time() - began)
    assert [text for text in sentences if len(text) > 1000 or "\n" in text] == []
    return compiled, refused, slowest


class TestStrangers:
    def test_mutated_schemas_compile_or_are_refused(self, compiler: Compiler) -> None:
        compiled, refused, slowest = check_strangers(compiler, range(100))
        assert compiled > 20
        assert refused > 20
        assert slowest < 5  # of all threads together

    @pytest.mark.slow
    def test_thousands_of_them(self, compiler: Compiler) -> None:
        compiled, refused, slowest = check_strangers(compiler, range(100, 2100))
        assert compiled + refused == 2000
        assert compiled > 400
        assert slowest < 5
