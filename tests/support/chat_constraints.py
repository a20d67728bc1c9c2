"""Pydantic models and tools to constrain answers by, and a writer that samples from the allowed tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from enum import Enum
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import torch
from pydantic import AnyUrl, BaseModel, ConfigDict, Field, TypeAdapter

from langchain_quantllm.structured import Compiler, Constraint
from langchain_quantllm.structured.tool_formats import ToolFormat


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


class Plant(BaseModel):
    name: str = Field(max_length=12)
    parts: list[Plant] = Field(default=[], max_length=2)
    colors: set[Literal["green", "red"]]
    counts: dict[date, int]


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


class Writer:
    """Draws tokens as an engine does, uniformly over what is allowed."""

    def __init__(self, compiler: Compiler, constraint: Constraint, max_new_tokens: int = 200, seed: int = 0) -> None:
        make = compiler.mask_factory(constraint, max_new_tokens)
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
