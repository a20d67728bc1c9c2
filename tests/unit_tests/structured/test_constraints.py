"""Constrained decoding: whatever is drawn from the allowed tokens is valid, and ends before its tokens run out."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import threading
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import pytest
import torch
import transformers
from pydantic import AnyUrl, BaseModel, ConfigDict, Field, TypeAdapter

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
from langchain_quantllm.structured.tool_formats import FORMATS, HERMES, ToolFormat

pytest.importorskip("xgrammar")


class Color(Enum):
    RED = "red"
    GREEN = "vert foncé"
    BLUE = '日本 "blau"'


class Point(BaseModel):
    x: float = Field(ge=-1.5, lt=2.5)
    y: int = Field(gt=0, le=1000)


class Shape(BaseModel):
    """A shape."""

    name: str = Field(description="what it is called", min_length=1, max_length=12)
    color: Color
    points: list[Point] = Field(min_length=1, max_length=3)
    größe: float | None = None


class Circle(BaseModel):
    kind: Literal["circle"]
    radius: Annotated[float, Field(gt=0)]


class Square(BaseModel):
    kind: Literal["square"]
    side: int


class Drawing(BaseModel):
    parts: list[Annotated[Circle | Square, Field(discriminator="kind")]]
    main: Circle | Square | None = None


class Node(BaseModel):
    value: int
    label: str = "none"
    left: Node | None = None
    children: list[Node] = []


class Folder(BaseModel):
    name: str = Field(pattern=r"^[a-z]{1,8}$")
    inner: list[Folder]


class Times(BaseModel):
    day: date
    at: datetime
    clock: time
    long: timedelta
    key: UUID
    site: AnyUrl


class Settings(BaseModel):
    title: str = "x"
    description: str | None = None
    tags: list[str] = Field(default=[], max_length=4)
    level: Literal[1, 2, 3] = 1
    limits: dict[str, int] = {}
    pair: tuple[int, str] = (1, "a")
    code: str = Field(default="A1", pattern=r"^[A-Z]\d{1,3}$")
    even: int = Field(default=2, multiple_of=2)


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int
    anything: Any
    data: dict[str, Any]


class Free(BaseModel):
    text: str
    more: list[str]
    flags: list[bool]
    number: float
    last: str


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


@pytest.fixture(scope="module")
def small(smollm2: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def compiler(small: Any) -> Compiler:
    return Compiler(small, len(small), (small.eos_token_id,))


@pytest.fixture(scope="module")
def qwen(qwen_coder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(qwen_coder)


@pytest.fixture(scope="module")
def wide(qwen: Any) -> Compiler:
    """A compiler of a model whose logits are wider than its tokenizer."""
    return Compiler(qwen, 152064, (qwen.eos_token_id,))


class Writer:
    """Draws tokens as an engine does, uniformly over what is allowed."""

    def __init__(self, compiler: Compiler, constraint: Constraint, max_new_tokens: int = 200, seed: int = 0) -> None:
        make = compiler.masks(constraint, max_new_tokens)
        assert make is not None
        self.mask: Any = make()
        self.compiler = compiler
        self.tokenizer = compiler._tokenizer
        self.ids: list[int] = []
        self.random = random.Random(seed)
        self.max_new_tokens = max_new_tokens

    def bits(self) -> torch.Tensor:
        bits = torch.full((1, -(-self.compiler._vocab_size // 32)), -1, dtype=torch.int32)
        if not self.mask.fill(bits):
            bits.fill_(-1)
        return bits

    def allowed(self) -> list[int]:
        return list(map(int, self.flags().nonzero()[0]))

    def flags(self) -> Any:
        flags = np.unpackbits(self.bits().numpy().view(np.uint8), bitorder="little")
        return flags[: self.compiler._vocab_size]

    def draw(self) -> int:
        token_id = int(self.random.choice(self.flags().nonzero()[0]))
        self.mask.accept(token_id)
        self.ids.append(token_id)
        return token_id

    def put(self, *token_ids: int) -> None:
        for token_id in token_ids:
            assert self.flags()[token_id], self.tokenizer.decode([*self.ids, token_id])
            self.mask.accept(token_id)
            self.ids.append(token_id)

    def write(self, text: str) -> None:
        self.put(*self.tokenizer.encode(text, add_special_tokens=False))

    def can_end_with(self, text: str) -> bool:
        try:
            self.write(text)
        except AssertionError:
            return False
        return self.may_stop

    @property
    def may_stop(self) -> bool:
        return bool(self.flags()[self.tokenizer.eos_token_id])

    def rest(self) -> str:
        """Draw to the end."""
        while True:
            assert len(self.ids) < self.max_new_tokens, self.tokenizer.decode(self.ids)
            if self.draw() == self.tokenizer.eos_token_id:
                return self.text

    @property
    def text(self) -> str:
        ids = [i for i in self.ids if i != self.tokenizer.eos_token_id]
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def check_schema(schema: dict[str, Any], value: Any) -> None:
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker(["date", "uuid"])).validate(value)


class TestSchemas:
    @pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
    def test_models(self, compiler: Compiler, model: type[BaseModel]) -> None:
        schema = model.model_json_schema()
        texts = [Writer(compiler, JSONSchema(schema), seed=seed).rest() for seed in range(20)]
        for text in texts:
            assert "\ufffd" not in text
            check_schema(schema, json.loads(text))
            model.model_validate_json(text)
        assert len(set(texts)) > 8

    @pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: next(iter(s)) + str(len(str(s))))
    def test_keywords(self, compiler: Compiler, schema: dict[str, Any]) -> None:
        for seed in range(20):
            check_schema(schema, json.loads(Writer(compiler, JSONSchema(schema), seed=seed).rest()))

    @pytest.mark.parametrize(("schema", "good", "bad"), LESS_THAN_A_KEYWORD_SAYS, ids=lambda v: str(v)[:60])
    def test_keywords_beside_each_other(self, compiler: Compiler, schema: dict[str, Any], good: str, bad: str) -> None:
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

    def test_any_object(self, compiler: Compiler) -> None:
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

    def test_what_is_cut_short_by_its_budget_is_closed(self, compiler: Compiler) -> None:
        for seed in range(10):
            text = Writer(compiler, JSONSchema(Free.model_json_schema()), max_new_tokens=90, seed=seed).rest()
            Free.model_validate_json(text)


REFUSED = [
    (JSONSchema({"type": "banana"}), "banana"),
    (JSONSchema({"$ref": "#/$defs/missing"}), "leads nowhere"),
    (JSONSchema({"$ref": "http://example.com/a"}), "leads out"),
    (JSONSchema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum"),
    (JSONSchema({"type": "string", "pattern": "["}), "Unclosed"),
    (JSONSchema({"type": "string", "pattern": "^(?!a)b$"}), "looks ahead"),
    (JSONSchema({"type": "string", "pattern": '^"$'}), "quotes"),
    (JSONSchema({"type": "object", "properties": {"a": 5}}), "no schema"),
    (JSONSchema({"enum": []}), "nothing is valid"),
    (JSONSchema({"enum": ["a"], "type": "integer"}), "nothing is valid"),
    (JSONSchema({"allOf": [{"type": "integer"}, {"type": "string"}]}), "cannot both hold"),
    (JSONSchema({"allOf": [{"pattern": "^a"}, {"pattern": "b$"}]}), "cannot both hold"),
    (JSONSchema({"type": "integer", "multipleOf": 7, "minimum": 1, "maximum": 6}), "no multiple of 7"),
    (JSONSchema(closed(properties={"a": False}, required=["a"])), "no value"),
    (JSONSchema(closed(properties={"a": {}}, patternProperties={"(": {}})), "cannot be read"),
    (JSONSchema("{"), "Expecting"),
    (Regex("a("), "paren"),
    (Regex(r"(?=a)b"), "looks ahead"),
    (Grammar("root ::= other"), "other"),
    (ToolCalls(HERMES, ({"type": "function"},)), "function"),
]


class TestConstraints:
    @pytest.mark.parametrize(("constraint", "reason"), REFUSED, ids=lambda v: str(v)[:50])
    def test_refused(self, compiler: Compiler, constraint: Constraint, reason: str) -> None:
        with pytest.raises(InvalidOptionError, match=reason) as caught:
            compiler.masks(constraint, 100)
        assert "cannot be enforced" in str(caught.value)
        assert "/project/" not in str(caught.value)

    def test_options_of_their_own(self) -> None:
        with pytest.raises(InvalidOptionError, match="did you mean 'auto'"):
            ToolCalls(HERMES, TOOLS, "autos")
        with pytest.raises(InvalidOptionError, match="no tools"):
            ToolCalls(HERMES, ())
        with pytest.raises(InvalidOptionError, match="at least one"):
            Choice(())

    @pytest.mark.parametrize("pattern", [r"[a-f]{2,4}-\d+", r"^(yes|no)!$", r'"[^"]*";', r"(ab)*c"])
    def test_regex(self, compiler: Compiler, pattern: str) -> None:
        for seed in range(20):
            assert re.fullmatch(pattern, Writer(compiler, Regex(pattern), max_new_tokens=60, seed=seed).rest())

    def test_choice(self, compiler: Compiler) -> None:
        options = ("positive", "posit", "négatif", "a b\n<|im_start|>")
        found = {Writer(compiler, Choice(options), seed=seed).rest() for seed in range(20)}
        assert found <= set(options)
        assert len(found) > 1
        writer = Writer(compiler, Choice(options))
        writer.write("posit")
        assert writer.may_stop

    def test_grammar(self, compiler: Compiler) -> None:
        grammar = Grammar('root ::= "(" root ")" | [0-9]+')
        for seed in range(20):
            assert re.fullmatch(r"(\(*)\d+(\)*)", Writer(compiler, grammar, max_new_tokens=100, seed=seed).rest())

    def test_equal_ones_are_one(self, compiler: Compiler) -> None:
        one = JSONSchema(Node.model_json_schema())
        assert one == JSONSchema(Node.model_json_schema())
        assert hash(one) == hash(JSONSchema(Node.model_json_schema()))
        assert len({one, JSONSchema({"type": "object"}), JSONObject(), Regex("a"), Choice(("a",))}) == 5
        assert JSONObject() != JSONObject(reasoning=("<think>", "</think>", False))
        assert hash(ToolCalls(HERMES, TOOLS)) == hash(ToolCalls(HERMES, list(TOOLS)))
        compiler.masks(one, 10)
        count = len(compiler._compiled)
        compiler.masks(JSONSchema(Node.model_json_schema()), 20)
        assert len(compiler._compiled) == count

    def test_the_cache_is_bounded(self, compiler: Compiler) -> None:
        for i in range(40):
            compiler.masks(Choice((str(i),)), 10)
        assert len(compiler._compiled) <= 32

    def test_from_many_threads(self, small: Any) -> None:
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

    def test_without_xgrammar(self, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xgrammar" else find(name))
        with pytest.raises(MissingPackageError, match=re.escape('pip install "langchain-quantllm[structured]"')):
            compiler.masks(JSONObject(), 10)

    def test_a_token_that_is_not_allowed(self, compiler: Compiler) -> None:
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
            make = compiler.masks(Choice(("yes",)), 10, own)
            assert make is not None
            writer = Writer(compiler, Choice(("yes",)))
            writer.mask = make()
            writer.write("yes")
            assert writer.allowed() == list(own)
            writer.put(own[-1])
            assert writer.allowed() != []  # a row with `ignore_eos` goes on
        make = compiler.masks(Choice(("yes",)), 10, ())
        assert make is not None
        writer = Writer(compiler, Choice(("yes",)))
        writer.mask = make()
        writer.write("yes")
        assert small.decode(writer.allowed()).strip() == ""


THINK = ("<think>", "</think>")


class TestReasoning:
    @pytest.mark.parametrize("is_open", [False, True])
    def test_thoughts_come_first(self, compiler: Compiler, is_open: bool) -> None:
        writer = Writer(compiler, Choice(("yes", "no"), reasoning=(*THINK, is_open)))
        writer.write('Hm {"x"' if is_open else '<think>Hm {"x"')
        assert not writer.may_stop
        assert len(writer.allowed()) > 0.9 * len(writer.tokenizer)
        writer.write("</think>\n\n")
        assert writer.rest().rpartition("\n\n")[2] in ("yes", "no")

    def test_none_at_all(self, compiler: Compiler) -> None:
        writer = Writer(compiler, JSONSchema({"const": "yes"}, reasoning=(*THINK, False)))
        writer.write('"yes"')
        assert writer.may_stop

    @pytest.mark.parametrize("is_open", [False, True])
    def test_they_leave_room_for_the_answer(self, compiler: Compiler, is_open: bool) -> None:
        for seed in range(5):
            writer = Writer(compiler, JSONSchema(Point.model_json_schema(), reasoning=(*THINK, is_open)), seed=seed)
            if not is_open:
                writer.write("<think>")
            Point.model_validate_json(writer.rest().rpartition("</think>")[2])


def function(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


TOOLS = (
    function("get_weather", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}),
    function("draw", Shape.model_json_schema()),
    function("now"),
)
ARGUMENTS: dict[str, Callable[[str], Any]] = {
    "get_weather": TypeAdapter(dict[str, str]).validate_json,
    "draw": Shape.model_validate_json,
    "now": TypeAdapter(dict[str, str]).validate_json,
}
JSON_FORMATS = [f for f in {id(f): f for f in (HERMES, *FORMATS)}.values() if f.style == "json"]


def calls_in(text: str, tools: ToolFormat) -> list[tuple[str, Any]]:
    """Read calls as strictly as their format is written."""
    found: list[tuple[str, Any]] = []
    assert text.startswith(tools.opening)
    text = text[len(tools.opening) :]
    while True:
        name = next(n for n in sorted(ARGUMENTS) if text.startswith(tools.begin(n)))
        text = text[len(tools.begin(name)) :]
        value, end = json.JSONDecoder().raw_decode(text)
        found.append((name, ARGUMENTS[name](text[:end])))
        assert isinstance(value, dict)
        text = text[end:]
        assert text.startswith(tools.call_end)
        text = text[len(tools.call_end) :]
        if text == tools.closing:
            return found
        assert text.startswith(tools.separator)
        text = text[len(tools.separator) :]


class TestTools:
    @pytest.mark.parametrize("parallel", [False, True])
    @pytest.mark.parametrize("tools", JSON_FORMATS, ids=lambda f: f.name)
    def test_required(self, compiler: Compiler, tools: ToolFormat, parallel: bool) -> None:
        constraint = ToolCalls(tools, TOOLS, "required", parallel)
        found = [calls_in(Writer(compiler, constraint, 300, seed).rest(), tools) for seed in range(6)]
        assert parallel or max(map(len, found)) == 1

    @pytest.mark.parametrize("tools", [f for f in JSON_FORMATS if f.trigger], ids=lambda f: f.name)
    def test_auto(self, compiler: Compiler, tools: ToolFormat) -> None:
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

    def test_auto_once(self, compiler: Compiler) -> None:
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

    def test_xml(self, compiler: Compiler) -> None:
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

    def test_formats_that_cannot_be_written(self, compiler: Compiler) -> None:
        for tools in FORMATS:
            if tools.style not in ("json", "qwen_xml") or not tools.trigger:
                assert compiler.masks(ToolCalls(tools, TOOLS), 100) is None
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
    def test_marks_that_were_added(self, smollm2: Path, name: str, mode: str) -> None:
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


class TestEngine:
    def test_real_answers_in_one_batch(self, any_smollm2: Path) -> None:
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
                prompt, options, limits, mask=None if constraint is None else compiler.masks(constraint, 120)
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
