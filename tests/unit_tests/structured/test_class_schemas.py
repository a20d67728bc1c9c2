"""Answers under the schema of a class are values that the class accepts."""

from __future__ import annotations

import random
import re
import warnings
import zoneinfo
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from ipaddress import IPv6Address
from typing import Annotated, Any, Literal

import pydantic as p
import pytest
from pydantic import BaseModel, Field, TypeAdapter

from langchain_quantllm.chat.class_schemas import class_schema
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.structured import Compiler, JSONSchema
from tests.support.chat_constraints import Color, Node, Writer
from tests.support.random_classes import random_class

pytest.importorskip("xgrammar")


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(BaseModel):
    kind: Literal["dog", "puppy"] = "dog"
    age: int


class Named(BaseModel):
    model_config = p.ConfigDict(str_strip_whitespace=True, str_max_length=6, populate_by_name=True, extra="allow")
    name: Annotated[str, Field(min_length=4)] = Field(alias="Name")


class Short(BaseModel):
    """A bound of texts that no date and no UUID keeps."""

    model_config = p.ConfigDict(str_max_length=12)
    id: p.UUID3
    at: p.NaiveDatetime
    day: date
    place: IPv6Address
    name: str


class Strict(BaseModel):
    model_config = p.ConfigDict(strict=True)
    day: date
    pair: tuple[int, str]
    tags: set[int]
    price: Decimal
    color: Color


GUARANTEED: list[Any] = [
    Annotated[Cat | Dog, Field(discriminator="kind")],
    Decimal,
    Annotated[Decimal, Field(max_digits=4, decimal_places=2, gt=-1, lt=Decimal("12.5"))],
    Annotated[bytes, Field(max_length=3)],
    Annotated[float, Field(multiple_of=0.1)],
    Annotated[int, Field(multiple_of=7, lt=-3)],
    Annotated[str, Field(pattern="^[A-Z][a-z]+ [a-z]*$", min_length=8, max_length=9)],
    dict[int, date],
    dict[date, int],
    p.IPvAnyAddress,
    p.PostgresDsn,
    p.NaiveDatetime,
    Named,
    Strict,
    Short,
    Node,
]


def refused_texts(compiler: Compiler, kind: Any, seeds: range, **options: Any) -> list[str]:
    schema = JSONSchema(class_schema(kind))
    found = []
    for seed in seeds:
        text = Writer(compiler, schema, seed=seed, **options).rest()
        try:
            TypeAdapter(kind).validate_json(text)
        except p.ValidationError:
            found.append(text)
    return found


@pytest.mark.parametrize("kind", GUARANTEED, ids=lambda kind: re.sub(r"\W+", " ", str(kind))[-40:])
def test_a_class_accepts_every_answer(compiler: Compiler, kind: Any) -> None:
    assert refused_texts(compiler, kind, range(8), max_new_tokens=300) == []


def check_random_classes(compiler: Compiler, seeds: range) -> tuple[int, list[tuple[int, str]]]:
    """Return how many random classes were guaranteed, and the answers that theirs refused."""
    guaranteed, refused = 0, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names of fields that shadow those of a base, defaults without JSON
        for seed in seeds:
            try:
                kind = random_class(random.Random(seed))
            except p.PydanticUserError:  # pydantic refuses the class
                continue
            refused += [
                (seed, text) for text in refused_texts(compiler, kind, range(seed, seed + 1), max_new_tokens=400)
            ]
            guaranteed += 1
    return guaranteed, refused


def test_random_classes_accept_every_answer(compiler: Compiler) -> None:
    guaranteed, refused = check_random_classes(compiler, range(8))
    assert refused == []
    assert guaranteed >= 7


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_random_classes_accept_every_answer(compiler: Compiler) -> None:
    guaranteed, refused = check_random_classes(compiler, range(100, 1130))
    assert refused == []
    assert guaranteed >= 1000


class Computed(BaseModel):
    found: Annotated[
        Annotated[Cat, p.Tag("cat")] | Annotated[Dog, p.Tag("dog")], p.Discriminator(lambda value: value["kind"])
    ]


class Deep(BaseModel):
    name: str = Field(validation_alias=p.AliasPath("names", 0))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (p.PastDate, "a date with the bound 'now_op'"),
        (Annotated[date, Field(gt=date(2020, 1, 1))], "a date with the bound 'gt'"),
        (Annotated[set[int], Field(min_length=2)], "a set of at least 2 different items"),
        (Annotated[dict[str, int], Field(min_length=2)], "a dict of at least 2 different keys"),
        (set[Cat], "a set of items other than texts"),
        (p.Json[int], "a text that is JSON itself"),
        (p.Base64Bytes, "an encoded text"),
        (p.FilePath, "an existing path"),
        (p.ImportString, "something to import"),
        (complex, "a complex number"),
        (type[int], "a class"),
        (Callable[[int], int], "has no JSON schema"),
        (re.Pattern, "the format 'regex'"),
        (zoneinfo.ZoneInfo, "the format 'zoneinfo'"),
        (Literal[Color.RED], "a Literal of a member of an Enum"),
        (Computed, "a union whose tag is computed"),
        (Deep, "a field at the path"),
        (Annotated[str, p.StringConstraints(strip_whitespace=True, pattern="^a")], "a pattern beside strip_whitespace"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_guaranteed_is_refused_in_a_sentence(kind: Any, reason: str) -> None:
    with pytest.raises(InvalidOptionError, match=re.escape(reason)) as caught:
        class_schema(kind)
    assert "\n" not in str(caught.value)
