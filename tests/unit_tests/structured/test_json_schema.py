"""Constrained JSON: every text of allowed tokens is valid under its schema, and ends before its tokens run out."""

from __future__ import annotations

import itertools
import json
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from pydantic import BaseModel

from langchain_quantllm.structured import Compiler, JSONObject, JSONSchema
from tests.support.chat_constraints import (
    Drawing,
    Folder,
    Free,
    Loose,
    Node,
    Plant,
    Point,
    Settings,
    Shape,
    Times,
    Writer,
    check_schema,
)

pytest.importorskip("xgrammar")

MODELS = [Point, Shape, Drawing, Node, Times, Settings, Loose, Free]
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a", "undeclared"]},
    {
        "allOf": [
            {"properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
            {"properties": {"a": {"maximum": 7}, "b": {"type": ["string", "null"]}}, "required": ["b"]},
        ],
        "type": "object",
    },
    {"$defs": {"n": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/n", "minimum": 5}, "minItems": 2},
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "string", "format": "date"}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    {"enum": [1, "zwei", None, {"drei": [3]}]},
    {
        "type": "object",
        "properties": {"l": {"type": "string", "pattern": "^[a-c]+$", "maxLength": 3}},
        "required": ["l"],
    },
    {"type": "object", "patternProperties": {"^k_": {"type": "number", "minimum": 0.5, "maximum": 0.75}}},
    {"type": "object", "properties": {"up": {"$ref": "#"}, "n": {"type": "integer"}}, "required": ["n"]},
    {"type": "integer", "minimum": 0.5, "maximum": 3.5},
    {"type": "array", "items": {"type": "string", "minLength": 2, "maxLength": 2}, "minItems": 1},
    {"type": "string", "minLength": 3, "maxLength": 100},
    {"type": "string", "pattern": "^a(b[01]{1,2})?(c|d+)?$"},
]


def closed(**keywords: Any) -> dict[str, Any]:
    return {"type": "object", **keywords}


LESS_THAN_A_KEYWORD_SAYS: list[tuple[dict[str, Any], str, str]] = [
    ({"type": "string", "enum": ["a", 3]}, '"a"', "3"),
    ({"type": ["string", "null"], "enum": ["a", None, 4]}, "null", "4"),
    ({"type": "integer", "enum": [1, 2, 3], "minimum": 2}, "3", "1"),
    ({"enum": ["a", "bb", "bc"], "minLength": 2, "pattern": "c$"}, '"bc"', '"bb"'),
    ({"type": "object", "enum": [{"a": 1}, 3]}, '{"a":1}', "3"),
    ({"allOf": [{"enum": [1, "a"]}, {"type": "string"}]}, '"a"', "1"),
    ({"allOf": [{"const": 1}, {"enum": [1, 2]}]}, "1", "2"),
    ({"allOf": [{"type": ["integer", "null"]}, {"type": ["number", "string"]}]}, "3", "null"),
    ({"allOf": [{"multipleOf": 2}, {"multipleOf": 3}], "type": "integer"}, "12", "3"),
    ({"allOf": [{"prefixItems": [{"type": "integer"}]}, {"items": {"minimum": 3}}], "minItems": 1}, "[3]", "[2]"),
    ({"type": "string", "anyOf": [{"type": "integer"}, {"const": "a"}]}, '"a"', "3"),
    (
        {"allOf": [closed(properties={"a": {}}, additionalProperties=False), {"properties": {"b": {}}}]},
        '{"a":1}',
        '{"b":1}',
    ),
    (
        closed(properties={"ka": {"enum": [1, "x"]}}, patternProperties={"^k": {"type": "integer"}}),
        '{"ka":1}',
        '{"ka":"x"}',
    ),
    (closed(patternProperties={"^k.$": {"type": "integer"}}, additionalProperties=True), '{"k1":1}', '{"k1":"x"}'),
    (closed(properties={"aa": {}, "aaa": {}}, propertyNames={"maxLength": 2}), '{"aa":1}', '{"aaa":1}'),
    ({"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 30_000}, "29995", "5001"),
    ({"type": "integer", "multipleOf": 2.5, "exclusiveMinimum": -6, "exclusiveMaximum": 10}, "-5", "3"),
    ({"type": "integer", "multipleOf": 2.5}, "-15", "3"),
]
"""Schemas whose keywords say something together, with a text that is valid and one that is not."""


class TestSchemas:
    @pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
    def test_texts_are_valid_under_pydantic_models(self, compiler: Compiler, model: type[BaseModel]) -> None:
        schema = model.model_json_schema()
        texts = [Writer(compiler, JSONSchema(schema), seed=seed).rest() for seed in range(20)]
        for text in texts:
            assert "\ufffd" not in text
            check_schema(schema, json.loads(text))
            model.model_validate_json(text)
        assert len(set(texts)) > 8

    @pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: next(iter(s)) + str(len(str(s))))
    def test_texts_are_valid_under_single_keywords(self, compiler: Compiler, schema: dict[str, Any]) -> None:
        for seed in range(20):
            check_schema(schema, json.loads(Writer(compiler, JSONSchema(schema), seed=seed).rest()))

    @pytest.mark.parametrize(("schema", "good", "bad"), LESS_THAN_A_KEYWORD_SAYS, ids=lambda v: str(v)[:60])
    def test_keywords_hold_beside_each_other(
        self, compiler: Compiler, schema: dict[str, Any], good: str, bad: str
    ) -> None:
        check_schema(schema, json.loads(good))
        writer = Writer(compiler, JSONSchema(schema))
        writer.write(good)
        assert writer.may_stop
        with pytest.raises(jsonschema.ValidationError):
            check_schema(schema, json.loads(bad))
        writer = Writer(compiler, JSONSchema(schema))
        assert not writer.can_end_with(bad)

    def test_a_branch_that_contradicts_the_rest_is_left_out(self, compiler: Compiler) -> None:
        """It is so in a definition that several refer to, too."""
        schema = {
            "$defs": {"text": {"type": "string", "enum": [1]}, "n": {"type": "integer"}},
            "type": "array",
            "prefixItems": [{"anyOf": [{"$ref": "#/$defs/text"}, {"$ref": "#/$defs/n"}, {"type": "null"}]}] * 2,
            "items": False,
            "minItems": 2,
        }
        for seed in range(8):
            check_schema(schema, json.loads(Writer(compiler, JSONSchema(schema), seed=seed).rest()))

    @pytest.mark.parametrize("model", [Shape, Node, Free], ids=lambda m: m.__name__)
    def test_a_vocabulary_narrower_than_the_logits(self, wide: Compiler, model: type[BaseModel]) -> None:
        for seed in range(8):
            model.model_validate_json(Writer(wide, JSONSchema(model.model_json_schema()), seed=seed).rest())

    def test_json_object_gives_objects(self, compiler: Compiler) -> None:
        for seed in range(20):
            assert isinstance(json.loads(Writer(compiler, JSONObject(), seed=seed).rest()), dict)

    def test_the_order_of_properties_is_the_schema_s(self, compiler: Compiler) -> None:
        schema = {"type": "object", "properties": {"z": {"const": 1}, "a": {"const": 2}}, "required": ["a", "z"]}
        assert list(json.loads(Writer(compiler, JSONSchema(schema)).rest())) == ["z", "a"]

    @pytest.mark.parametrize("good", ["2024-02-29", "2023-12-31", "1999-04-30"])
    def test_days_that_exist(self, compiler: Compiler, good: str) -> None:
        writer = Writer(compiler, JSONSchema({"type": "string", "format": "date"}))
        writer.write(f'"{good}"')
        assert writer.may_stop

    def test_a_text_that_a_model_would_write_passes(self, compiler: Compiler) -> None:
        text = '{"name": "Dreieck\\n \\"x\\"", "n": [1, -2.5e3], "ok": true, "größe": null, "日本": "😀"}'
        writer = Writer(compiler, JSONObject())
        writer.write(text)
        assert writer.may_stop
        assert json.loads(writer.text) == json.loads(text)

    @pytest.mark.parametrize("special", ["<|im_start|>", "<|endoftext|>"])
    def test_strings_hold_no_special_tokens(self, compiler: Compiler, small: Any, special: str) -> None:
        writer = Writer(compiler, JSONSchema({"type": "string"}))
        writer.write('"a')
        assert small.convert_tokens_to_ids(special) not in writer.allowed()
        writer.write(" <|im")

    @pytest.mark.parametrize(("backslashes", "escapes"), [(0, False), (1, True), (2, False), (3, True)])
    def test_no_escapes_of_code_points(self, compiler: Compiler, small: Any, backslashes: int, escapes: bool) -> None:
        """One of them may be half of a character, which no UTF-8 has."""
        writer = Writer(compiler, JSONSchema({"type": "string"}))
        writer.write('"' + "\\" * backslashes)
        assert any(small.decode([i]).startswith("u") for i in writer.allowed()) is not escapes

    @pytest.mark.parametrize("schema", [{"maxLength": 4}, {"maxLength": 100}, {"pattern": "^[^a]*$"}, {}], ids=str)
    @pytest.mark.parametrize("text", [b"\xe0\x9f", b"\xed\xa0", b"\xf0\x84", b"\xf4\x90"], ids=bytes.hex)
    def test_bytes_that_are_no_character(self, compiler: Compiler, schema: dict[str, Any], text: bytes) -> None:
        """A decoder writes one sign for each of them, with which a string becomes longer than it may be."""
        writer = Writer(compiler, JSONSchema({"type": "string", **schema}))
        writer.write('"')
        ids = compiler._vocabulary.ids
        writer.put(ids[text[:1]])
        assert ids[text[1:]] not in writer.allowed()
        assert ids[b"\x90" if text[0] in b"\xed\xf0" else b"\xa0" if text[0] == 0xE0 else b"\x8f"] in writer.allowed()

    @pytest.mark.parametrize("model", [Node, Folder], ids=lambda m: m.__name__)
    def test_a_text_that_nests_as_deep_as_it_can_is_closed(self, compiler: Compiler, model: type[BaseModel]) -> None:
        """Where an array has to begin, a token that opens the next object with it would never come to an end."""
        schema = JSONSchema(model.model_json_schema())
        tokens = None
        for seed in range(4):
            writer = Writer(compiler, schema, max_new_tokens=200, seed=seed)
            tokens = tokens or [token.count(b"[") + token.count(b"{") for token in compiler._vocabulary.tokens]
            while not writer.may_stop:
                assert len(writer.ids) < 200, writer.text
                allowed = writer.allowed()
                deepest = max(tokens[i] for i in allowed)
                writer.put(writer.random.choice([i for i in allowed if tokens[i] == deepest]))
            model.model_validate_json(writer.text)

    @pytest.mark.parametrize("opening", ['{"name": "tree", "parts": [', '{"name":"a","parts":['])
    def test_objects_that_need_more_to_end_than_to_begin_are_closed(self, compiler: Compiler, opening: str) -> None:
        for budget in (120, 200, 256, 400):
            writer = Writer(compiler, JSONSchema(Plant.model_json_schema()), max_new_tokens=budget)
            tokens = itertools.cycle(writer.tokenizer.encode(opening, add_special_tokens=False))
            while (token := next(tokens)) in writer.allowed():
                writer.put(token)
            assert writer.text.count("{") > budget // 60
            Plant.model_validate_json(writer.rest())

    def test_a_text_is_closed_before_its_tokens_run_out(self, compiler: Compiler) -> None:
        for seed in range(10):
            text = Writer(compiler, JSONSchema(Free.model_json_schema()), max_new_tokens=90, seed=seed).rest()
            Free.model_validate_json(text)
