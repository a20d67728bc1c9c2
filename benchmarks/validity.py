"""The validity of constrained answers: hundreds of them, sampled at temperature 1, beside unconstrained ones.

    python -m benchmarks.validity FOLDER --quantization nf4 --count 200

Makes `--count` forced tool calls and as many structured outputs over `CASES`, all at once, so that rows with different
schemas share the engine's batch, and half as many of both kinds over the classes of `FURTHER`. Each is read strictly
and checked twice: by its pydantic class, where it has one, and by the `jsonschema` package with dates checked.
"Without" are the same prompts, seeds and parsers without masks, read as leniently as LangChain's parsers read: the
validity of `tool_choice="auto"` without the extra `structured`, and of a schema in the prompt alone.

Prints a table in Markdown and the invalid answers, and fails if a constrained answer is invalid.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from time import perf_counter
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema  # type: ignore[import-untyped]
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import JsonOutputParser
from langchain_core.runnables import Runnable
from pydantic import AwareDatetime, BaseModel, Field, NaiveDatetime, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from langchain_quantllm import ChatQuantizedHuggingFace

MAX_NEW_TOKENS = 256
"""Closing a value may take half of them; each of the schemas fits into that."""

# --- schemas ---


class Person(BaseModel):
    """A person."""

    name: str = Field(description="First and last name", min_length=1)
    age: int = Field(ge=0, le=150)
    mood: Literal["glad", "sad", "calm"]
    town: str | None = None


class Address(BaseModel):
    street: str
    postcode: str = Field(pattern=r"^[A-Z]{1,2}\d{1,2} \d[A-Z]{2}$")
    country: Literal["GB", "IE"] = "GB"


class Item(BaseModel):
    name: Literal["lamp", "chair", "desk"]
    quantity: int = Field(ge=1, le=99)
    price: float | None = Field(gt=0, le=1000)


class Order(BaseModel):
    """An order of a shop."""

    address: Address
    items: list[Item] = Field(min_length=1, max_length=2)
    gift: bool


class Booking(BaseModel):
    """A booking of a table."""

    day: date
    made_at: datetime = Field(description="When it was made, with its time zone")
    until: date | None = Field(description="Its last day, if it has several")
    guests: Annotated[int, Field(gt=0, lt=13)]


class Card(BaseModel):
    kind: Literal["card"]
    digits: str = Field(pattern=r"^\d{4}$")


class Transfer(BaseModel):
    kind: Literal["transfer"]
    bank: str = Field(max_length=20)
    on: date


class Cash(BaseModel):
    kind: Literal["cash"]
    coins: list[Literal[1, 2, 5, 10]] = Field(max_length=4)


class Payment(BaseModel):
    """A payment by card, by transfer or in cash."""

    amount: float = Field(ge=0.01, lt=10_000)
    way: Annotated[Card | Transfer | Cash, Field(discriminator="kind")]
    tip: int | Literal["none"] | None = None


class Dish(BaseModel):
    """料理。Ein Gericht."""

    名前: str = Field(description="料理の名前", max_length=20)
    größe: Literal["klein", "groß", "très grand"]
    辛さ: int = Field(ge=0, le=5)
    émoji: Literal["🍜", "🍣", "🥗"]
    текст: str | None = Field(default=None, max_length=20)


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog", "puppy"] = "dog"
    age: float = Field(gt=0, lt=30)


class Pet(BaseModel):
    """A pet and its friends."""

    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    friends: list[Annotated[Cat | Dog, Field(discriminator="kind")]] = Field(max_length=2)


class Invoice(BaseModel):
    """An invoice."""

    net: Decimal = Field(max_digits=8, decimal_places=2)
    rate: Decimal = Field(ge=0, lt=Decimal("0.5"), decimal_places=2)
    total: Decimal
    count: int = Field(multiple_of=2, ge=2)


class Shift(BaseModel):
    """A shift at work."""

    begins: AwareDatetime
    noted: NaiveDatetime
    pause: time
    length: timedelta
    worker: UUID


class Plant(BaseModel):
    """A part of a plant."""

    name: str = Field(max_length=12)
    parts: list[Plant] = Field(default=[], max_length=2)
    colors: set[Literal["green", "red"]]
    counts: dict[date, int]


READING: dict[str, Any] = {
    "title": "reading",
    "description": "A reading of a sensor.",
    "type": "object",
    "properties": {
        "sensor": {"type": "string", "pattern": "^s[0-9]{2}$"},
        "celsius": {"type": "number", "exclusiveMinimum": -40, "maximum": 85.5},
        "percent": {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 5},
        "at": {"type": "string", "format": "date-time"},
        "level": {"enum": ["low", "high", 3, None, True]},
        "comment": {"type": ["string", "null"], "maxLength": 24},
    },
    "required": ["sensor", "celsius", "percent", "at", "level"],
    "additionalProperties": False,
}
EVENT: dict[str, Any] = {
    "title": "event",
    "description": "An event of a calendar, on a day or over several.",
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 3, "maxLength": 24},
        "when": {
            "anyOf": [
                {"type": "string", "format": "date"},
                {
                    "type": "object",
                    "properties": {
                        "from": {"type": "string", "format": "date"},
                        "to": {"type": "string", "format": "date"},
                    },
                    "required": ["from", "to"],
                },
                {"type": "null"},
            ]
        },
        "kind": {"const": "event"},
        "id": {"type": "string", "format": "uuid"},
    },
    "required": ["title", "when", "kind"],
}
ROUTE: dict[str, Any] = {
    "title": "route",
    "description": "A route over some points of a map.",
    "type": "object",
    "$defs": {
        "angle": {"type": "number", "minimum": -180, "maximum": 180},
        "point": {
            "type": "array",
            "prefixItems": [{"$ref": "#/$defs/angle"}, {"$ref": "#/$defs/angle", "minimum": -90, "maximum": 90}],
            "items": False,
            "minItems": 2,
        },
    },
    "properties": {
        "points": {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 2, "maxItems": 3},
        "minutes": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}, "maxProperties": 3},
        "by": {"enum": ["foot", "bike", "car"]},
    },
    "required": ["points", "by"],
}
SIGN: dict[str, Any] = {
    "title": "sign",
    "description": "Ein Schild in mehreren Sprachen / 多言語の看板。",
    "type": "object",
    "properties": {
        "日本語": {"type": "string", "minLength": 1, "maxLength": 12},
        "français": {"type": "string", "maxLength": 20},
        "färbung": {"enum": ["rouge foncé", "grün", "青", 'so "la la"', "a\\b"]},
        "ort": {
            "type": "object",
            "properties": {"straße": {"type": ["string", "null"], "maxLength": 20}, "№": {"type": "integer"}},
            "required": ["straße", "№"],
        },
    },
    "required": ["日本語", "färbung", "ort"],
}
FOLDERS: dict[str, Any] = {
    "title": "folder",
    "description": "A folder with what is in it.",
    "$defs": {
        "folder": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]{1,8}$"},
                "inner": {"type": "array", "items": {"$ref": "#/$defs/folder"}, "maxItems": 2},
            },
            "required": ["name", "inner"],
        }
    },
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/folder"}, "bytes": {"type": "integer", "minimum": 0}},
    "required": ["root"],
}


class AcceptedSchema(GenerateJsonSchema):
    """The schema of a class, without what pydantic says of it but does not ask of an answer.

    A set takes an item twice; a date without a time zone is no date-time of RFC 3339, and the only one that a
    `NaiveDatetime` takes.
    """

    def set_schema(self, schema: Any) -> dict[str, Any]:
        """Allow equal items."""
        return {name: value for name, value in super().set_schema(schema).items() if name != "uniqueItems"}

    def datetime_schema(self, schema: Any) -> dict[str, Any]:
        """Leave a date without a time zone to the class."""
        return {"type": "string"} if schema.get("tz_constraint") == "naive" else super().datetime_schema(schema)


@dataclass(frozen=True)
class Case:
    """A schema and a prompt for it.

    Args:
        name: The name of the tool.
        features: The features of the schema, for the table.
        prompt: The user's words.
        schema: A pydantic class or a JSON schema.
    """

    name: str
    features: str
    prompt: str
    schema: type[BaseModel] | dict[str, Any]

    @property
    def json_schema(self) -> dict[str, Any]:
        """The schema that answers are checked by."""
        if isinstance(self.schema, dict):
            return self.schema
        return self.schema.model_json_schema(schema_generator=AcceptedSchema)

    def error(self, value: Any) -> str:
        """Return the errors of a value; empty for a valid one."""
        validator = jsonschema.Draft202012Validator(self.json_schema, format_checker=FORMATS)
        errors = [e.message for e in validator.iter_errors(value)]
        if not isinstance(self.schema, dict):
            try:
                # As JSON, in which a date is a text; strictly, so that no "3" passes for a 3.
                TypeAdapter(self.schema).validate_json(json.dumps(value), strict=True)
            except ValueError as error:
                errors.append(str(error))
        return "; ".join(errors)


CASES = [
    Case("Person", "enum, optional, bounds", "Ada Lovelace lived in London and died at 36. Describe her.", Person),
    Case("Order", "nesting, list, patterns, optional", "Order two lamps and a chair to 12 High Street.", Order),
    Case("Booking", "dates, bounds", "Book a table for four on the third of May 2025.", Booking),
    Case("Payment", "unions, optional", "I pay 12.50 and leave a tip.", Payment),
    Case("Dish", "unicode names and enums", "ラーメンを一つください。 Ein Gericht, bitte.", Dish),
    Case("reading", "bounds, date-time, mixed enum", "Sensor 7 shows 21 degrees at 40 percent.", READING),
    Case("event", "union, dates, const, uuid", "The fair begins on June 1st 2025 and lasts three days.", EVENT),
    Case("route", "$ref, tuples, map", "Plan a route from Oslo to Bergen.", ROUTE),
    Case("sign", "unicode, escapes, nesting", "Ein Schild am Bahnhof von Kyoto: Ausgang. 出口。", SIGN),
    Case("folder", "recursion", "Make a folder of photos with one for each of two years.", FOLDERS),
]

FURTHER = [
    Case("Pet", "unions by tags with defaults", "My cat Tom is 3. What lives with him?", Pet),
    Case("Invoice", "decimals with digits and bounds", "Two lamps at 12.50 each, 19 percent tax.", Invoice),
    Case("Shift", "times, zones, durations, uuid", "A shift on May 3rd 2025 from nine, for eight hours.", Shift),
    Case("Plant", "recursion, sets, keys", "A tree with two branches, and three leaves on each.", Plant),
]
"""Classes that accept less than pydantic's own schema of them says."""

_RFC_3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")

FORMATS = jsonschema.FormatChecker(["date", "uuid"])
"""Formats that are checked; `jsonschema` itself leaves out date-time where an optional package is missing."""


@FORMATS.checks("date-time", raises=ValueError)
def _is_date_time(value: object) -> bool:
    if not isinstance(value, str):
        return True
    # Python 3.10 knows neither the Z nor any number of decimals.
    plain = re.sub(r"\.\d+", "", value).replace("Z", "+00:00")
    return _RFC_3339.fullmatch(value) is not None and datetime.fromisoformat(plain) is not None


# --- answers ---

FORCED = ("tool_choice=name", 'tool_choice="any"')
STRUCTURED = ("json_schema", "function_calling")


class Unconstrained(ChatQuantizedHuggingFace):
    """The same prompts and parsers, without masks."""

    def _mask(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True)
class Question:
    """One call of a model."""

    case: Case
    kind: str
    seed: int
    other: Case
    """Its tool is offered as well, with `tool_choice="any"`."""


@dataclass(frozen=True)
class Answer:
    """An answer: the value as JSON text, its errors, and the message."""

    question: Question
    value: str
    error: str
    message: AIMessage


def questions(count: int, kinds: Sequence[str], cases: Sequence[Case] = CASES) -> list[Question]:
    """Spread calls over kinds and schemas, each with a seed of its own."""
    numbers = itertools.cycle(range(len(cases)))
    return [
        Question(cases[i], kinds[n // len(cases) % len(kinds)], n, cases[(i + 1) % len(cases)])
        for n, i in zip(range(count), numbers, strict=False)
    ]


def ask(chat: ChatQuantizedHuggingFace, question: Question, **options: Any) -> Answer:
    """Make a call and check its answer."""
    case, kind = question.case, question.kind
    options = {"temperature": 1.0, "seed": question.seed, "max_tokens": MAX_NEW_TOKENS, **options}
    bound: Runnable[Any, Any]
    if kind in FORCED:
        offered = {c.name: c for c in ([case] if kind == FORCED[0] else [case, question.other])}
        choice = case.name if kind == FORCED[0] else "any"
        bound = chat.bind_tools([c.schema for c in offered.values()], tool_choice=choice)
        message = bound.invoke(case.prompt, **options)
        return _read_calls(question, message, offered)
    method: Any = kind
    bound = chat.with_structured_output(case.schema, method=method, include_raw=True, **options)
    found = bound.invoke(case.prompt)
    if kind == "function_calling":
        answer = _read_calls(question, found["raw"], {case.name: case})
    else:
        answer = _read_content(question, found["raw"], lenient=isinstance(chat, Unconstrained))
    if not answer.error and found["parsed"] is None:
        return Answer(question, answer.value, f"the parser refused it: {found['parsing_error']}", found["raw"])
    return answer


def _read_calls(question: Question, message: AIMessage, offered: dict[str, Case]) -> Answer:
    errors = [f"invalid call: {call['error']}" for call in message.invalid_tool_calls]
    if not message.tool_calls and not errors:
        errors.append("no call")
    for call in message.tool_calls:
        known = offered.get(call["name"])
        errors.append(f"no tool: {call['name']}" if known is None else known.error(call["args"]))
    values = [call["args"] for call in message.tool_calls]
    value = _canonical(values[0] if len(values) == 1 else values)
    return Answer(question, value, "; ".join(filter(None, errors)), message)


def _read_content(question: Question, message: AIMessage, *, lenient: bool) -> Answer:
    text = str(message.content)
    try:
        value = JsonOutputParser().parse(text) if lenient else json.loads(text)
    except ValueError as error:
        return Answer(question, text, f"no JSON: {error}", message)
    return Answer(question, _canonical(value), question.case.error(value), message)


def _canonical(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def ask_all(
    chat: ChatQuantizedHuggingFace, asked: Iterable[Question], *, threads: int = 32, **options: Any
) -> list[Answer]:
    """Make calls from many threads at once."""
    with ThreadPoolExecutor(threads) as executor:
        return list(executor.map(lambda question: ask(chat, question, **options), asked))


# --- the table ---


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    model: str
    kind: str
    schema: str
    asked: int
    valid: int
    distinct: int
    asked_without: int
    valid_without: int

    def __str__(self) -> str:
        share = f"{self.valid_without} of {self.asked_without}"
        cells = (self.model, self.kind, self.schema, f"{self.valid} of {self.asked}", share, self.distinct)
        return f"| {' | '.join(map(str, cells))} |"


HEAD = "| model | kind | schema | valid | valid without | distinct values |\n|---|---|---|---|---|---|"


def rows(model: str, kind: str, answers: Sequence[Answer], without: Sequence[Answer]) -> list[Row]:
    """Sum up answers by schema, and all of them."""
    groups: dict[str, tuple[list[Answer], list[Answer]]] = collections.defaultdict(lambda: ([], []))
    for i, some in enumerate((answers, without)):
        for answer in some:
            case = answer.question.case
            groups[f"{case.name}: {case.features}"][i].append(answer)
    groups["all"] = (list(answers), list(without))
    return [
        Row(
            model,
            kind,
            name,
            len(some),
            sum(not a.error for a in some),
            len({a.value for a in some}),
            len(others),
            sum(not a.error for a in others),
        )
        for name, (some, others) in groups.items()
    ]


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--count", type=int, default=200, help="forced calls, and as many structured outputs")
    parser.add_argument("--without", type=int, help="as many of them again without constraints; default: all")
    parser.add_argument("--show", type=int, default=0, help="print so many answers of each kind")
    given = parser.parse_args()
    chat = ChatQuantizedHuggingFace(model=given.model, quantization=given.quantization, progress=False).load()
    name = given.model.rstrip("/").rpartition("/")[2]
    wrong: list[Answer] = []
    print(HEAD, flush=True)
    took_s = []
    parts = (("forced call", FORCED, CASES), ("structured output", STRUCTURED, CASES))
    for label, kinds, cases in (*parts, ("further classes", FORCED + STRUCTURED, FURTHER)):
        asked = questions(given.count if cases is CASES else given.count // 2, kinds, cases)
        began = perf_counter()
        answers = ask_all(chat, asked)
        between = perf_counter()
        without = ask_all(Unconstrained(llm=chat), asked[: given.without])
        took_s.append((label, between - began, perf_counter() - between))
        print(*rows(name, label, answers, without), sep="\n", flush=True)
        wrong += [a for a in answers if a.error]
        for a in answers[: given.show] + without[: given.show]:
            print(json.dumps([a.question.kind, a.error, a.message.text, a.value], ensure_ascii=False))
    for label, with_s, without_s in took_s:
        print(f"{label}: {with_s:.0f} s, without constraints {without_s:.0f} s")
    for a in wrong:
        asked_for = f"{a.question.case.name}, {a.question.kind}, seed {a.question.seed}"
        print(f"INVALID: {asked_for}: {a.error}\n  {a.message!r}", file=sys.stderr)
    sys.exit(f"{len(wrong)} constrained answers were invalid" if wrong else 0)


if __name__ == "__main__":
    main()
