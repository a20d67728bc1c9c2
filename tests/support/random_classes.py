"""Random pydantic classes of every construct whose values a schema can guarantee, by a seed."""

from __future__ import annotations

import collections
import dataclasses
import ipaddress
import random
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, Optional, TypeVar, Union
from uuid import UUID

import pydantic as p
from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, RootModel, create_model
from pydantic.types import StringConstraints
from typing_extensions import NotRequired, TypedDict

T = TypeVar("T")


class Tone(Enum):
    LOW = "low"
    HIGH = "hoch ü"
    NUMBER = 3


class Level(IntEnum):
    ONE = 1
    TWO = 2


class Box(BaseModel, Generic[T]):
    content: T
    label: str = "x"


class Pair(NamedTuple):
    first: int
    second: str


class Tree(BaseModel):
    name: Annotated[str, Field(max_length=8)]
    children: list[Tree] = []
    parent: Optional[Tree] = None  # noqa: UP045


@dataclasses.dataclass
class Spot:
    x: float
    name: str = "a"
    computed: int = dataclasses.field(default=0, init=False)


class Movie(TypedDict):
    title: str
    year: NotRequired[int]


SCALARS: list[Any] = [
    *(
        int,
        float,
        str,
        bool,
        bytes,
        Decimal,
        date,
        datetime,
        time,
        timedelta,
        UUID,
        Path,
        Any,
        None,
        Tone,
        Level,
        Fraction,
    ),
    *(ipaddress.IPv4Address, ipaddress.IPv6Address, ipaddress.IPv4Network, ipaddress.IPv6Interface),
    *(p.AnyUrl, p.HttpUrl, p.FtpUrl, p.PostgresDsn, p.RedisDsn, p.FileUrl, p.IPvAnyAddress, p.IPvAnyNetwork),
    *(p.UUID1, p.UUID3, p.UUID4, p.UUID5, p.AwareDatetime, p.NaiveDatetime, p.SecretStr, p.SecretBytes, p.ByteSize),
    *(
        p.PositiveInt,
        p.NegativeFloat,
        p.FiniteFloat,
        p.StrictInt,
        p.StrictStr,
        p.StrictBool,
        p.StrictFloat,
        p.JsonValue,
    ),
    *(Literal["a", 1, None, True], Literal["ä", "b"], Pair, Spot, Movie, Tree, Box[int], Box[date]),
]


def _number(r: random.Random, kind: Any) -> Any:
    low, high = r.randint(-200, 100), r.randint(101, 100_000)
    bounds: dict[str, Any] = {r.choice(["ge", "gt"]): low} if r.random() < 0.7 else {}
    bounds |= {r.choice(["le", "lt"]): high} if r.random() < 0.6 else {}
    if kind is float and r.random() < 0.5:
        bounds = {key: value + r.choice([0.5, 0.25, 0.1]) for key, value in bounds.items()}
    if kind is Decimal and r.random() < 0.6:
        bounds = {key: Decimal(value) for key, value in bounds.items()}
        return Annotated[kind, Field(max_digits=r.randint(7, 12), decimal_places=r.randint(0, 4), **bounds)]
    if r.random() < 0.3:
        bounds["multiple_of"] = r.choice([2, 3, 7]) if kind is int else r.choice([0.5, 0.25, 3])
    return Annotated[kind, Field(**bounds)]


def _text(r: random.Random) -> Any:
    least = r.randint(0, 5)
    most = least + r.choice([0, 3, 20, 100])
    patterns = [
        "^[a-z]+$",
        r"^\d{3}-\d{2,4}$",
        "[A-Z][a-z]*",
        r"^\w+( \w+)?$",
        "^(on|off)?$",
        r"^[^a-z]+$",
        r"\S+@\S+",
        "^a|b$",
    ]
    if r.random() < 0.4:
        return Annotated[str, Field(pattern=r.choice(patterns))]
    if r.random() < 0.3:
        return Annotated[
            str,
            Field(
                pattern=r.choice(["^[a-z]+$", r"^\w+( \w+)?$", "[A-Z][a-z]*"]), min_length=least, max_length=most + 5
            ),
        ]
    if r.random() < 0.3:
        return Annotated[str, StringConstraints(strip_whitespace=True, to_upper=r.random() < 0.5, min_length=least)]
    kind = bytes if r.random() < 0.2 else str
    return Annotated[kind, Field(min_length=least, max_length=most)]


def _key(r: random.Random) -> Any:
    kinds: list[Any] = [str, int, float, bool, date, UUID, Literal["a", "b c"], Decimal]
    kinds += [Annotated[str, Field(pattern="^[a-z]{1,5}$")], Annotated[str, Field(min_length=2, max_length=9)]]
    return r.choice(kinds)


def _container(r: random.Random, depth: int) -> Any:
    inner = random_type(r, depth + 1)
    least = r.randint(0, 2)
    scalar = r.choice([int, str, date, Tone, Annotated[int, Field(ge=0, le=9)]])
    made: list[Callable[[], Any]] = [
        lambda: list[inner],
        lambda: Annotated[list[inner], Field(min_length=least, max_length=least + 2)],
        lambda: tuple[inner, int],
        lambda: tuple[inner, ...],
        lambda: Annotated[set[scalar], Field(min_length=r.randint(0, 1), max_length=4)],
        lambda: frozenset[scalar],
        lambda: dict[_key(r), inner],
        lambda: Annotated[dict[_key(r), inner], Field(min_length=1, max_length=3)],
        lambda: Optional[inner],  # noqa: UP045
        lambda: Union[inner, scalar],  # noqa: UP007
        lambda: Sequence[inner],
        lambda: Mapping[str, inner],
        lambda: collections.deque[inner],
        lambda: collections.defaultdict[str, list[int]],
        lambda: RootModel[inner],
        lambda: Box[inner],
        lambda: _tagged(r, depth),
        lambda: random_class(r, depth + 1),
    ]
    return r.choice(made)()


def _tagged(r: random.Random, depth: int) -> Any:
    """A union whose branches have their tag as a default."""
    branches = []
    for i in range(r.randint(2, 3)):
        tag: Any = Literal[f"kind{i}"] if r.random() < 0.8 else Literal[f"kind{i}", f"other{i}"]
        fields: dict[str, Any] = {"value": (r.choice([int, str, date]), ...), "tag": (tag, f"kind{i}")}
        if r.random() < 0.3:
            fields["tag"] = (tag, Field(default=f"kind{i}", alias="theTag"))
        branches.append((fields, i))
    alias = any(not isinstance(fields["tag"][1], str) for fields, _ in branches)
    for fields, i in branches:
        fields["tag"] = (fields["tag"][0], Field(default=f"kind{i}", alias="theTag") if alias else f"kind{i}")
    classes = tuple(create_model(f"Branch{depth}{i}", **fields) for fields, i in branches)
    return Annotated[Union[classes], Field(discriminator="tag")]  # type: ignore[valid-type]  # noqa: UP007


def random_type(r: random.Random, depth: int) -> Any:
    """A type of a field."""
    chance = r.random()
    if depth < 3 and chance < 0.35:
        return _container(r, depth)
    if chance < 0.5:
        return _number(r, r.choice([int, float, Decimal]))
    return _text(r) if chance < 0.65 else r.choice(SCALARS)


def random_class(r: random.Random, depth: int = 0) -> type[BaseModel]:
    """A class of some fields, with settings of its own."""
    fields: dict[str, Any] = {}
    for i in range(r.randint(1, 3)):
        kind = random_type(r, depth)
        options: dict[str, Any] = {} if r.random() < 0.6 else {"default": None}
        name = r.choice(["a", "title", "größe", "x_y"]) + str(i)
        alias = r.random()
        if alias < 0.15:
            options["alias"] = f"the {name}"
        elif alias < 0.25:
            options["validation_alias"] = AliasChoices(AliasPath("path", 0), f"other{i}")
        fields[name] = (kind, Field(**options))
    config = ConfigDict(
        extra=r.choice(["ignore", "forbid", "allow"]),
        populate_by_name=r.random() < 0.3,
        strict=r.random() < 0.2,
        str_strip_whitespace=False,
        frozen=r.random() < 0.2,
        **({"str_max_length": 12} if r.random() < 0.1 and not depth else {}),
    )
    return create_model(f"Random{depth}", __config__=config, **fields)  # type: ignore[no-any-return,call-overload]
