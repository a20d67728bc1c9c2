"""What a schema may hold: plain JSON of bounded size, keywords with values of their type, and work that ends soon.

Schemas come from strangers, too, such as the servers of tools. Owns the limits and the errors that name them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

DEEPEST = 64
MOST_VALUES = 20_000
MOST_CHARACTERS = 400_000
LARGEST_NUMBER = 1e300
MOST_SCHEMAS = 5_000
MOST_PROPERTIES = 1_000
MOST_BRANCHES = 500
LONGEST_LITERAL = 2_000
MOST_LITERALS = 60_000
MOST_MULTIPLES = 30_000
MOST_MATCHES = 10_000
LEAST_COUNT = 10_000  # of minItems and its like: such a value hardly fits into an answer
MOST_COUNT = 100_000  # of maxItems and its like: more than an answer has
PATTERN_COST = 500  # in units of about 10 ms with 50,000 tokens
SCHEMA_PATTERN_COST = 1_500
SHORT_TEXTS_COST = 300  # up to which lengths become patterns, which have quicker masks
_MOST_REFERENCES = 60


class SchemaLimitError(ValueError):
    """A schema is too large, or takes too long to enforce."""


def shortened(value: Any, length: int = 80) -> str:
    """Write a value for an error, cut off where it is long."""
    text = value if isinstance(value, str) else type(value).__name__ if isinstance(value, dict | list) else repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def check_json(value: Any) -> None:
    """Check that a value is JSON of a bounded size.

    Args:
        value: The value of any type; it may hold itself.

    Raises:
        ValueError: If it is not.
    """
    waiting: list[tuple[Any, int]] = [(value, 0)]
    values = characters = 0
    while waiting:
        one, depth = waiting.pop()
        values += 1
        if depth > DEEPEST:
            msg = f"it is nested more than {DEEPEST} deep, or holds itself; refer to definitions by $ref"
            raise SchemaLimitError(msg)
        if isinstance(one, Mapping):
            if wrong := [key for key in one if not isinstance(key, str)]:
                msg = f"the name {shortened(repr(wrong[0]))} in it is no text; names in JSON are texts"
                raise ValueError(msg)
            characters += sum(map(len, one))
            waiting += [(v, depth + 1) for v in one.values()]
        elif isinstance(one, list | tuple):
            waiting += [(v, depth + 1) for v in one]
        elif isinstance(one, str):
            characters += len(one)
        elif isinstance(one, int | float):
            _check_number(one)
        elif one is not None:
            msg = f"{shortened(repr(one))} in it is a {type(one).__name__}, which JSON does not have"
            raise ValueError(msg)
        if values + len(waiting) > MOST_VALUES:
            msg = f"it has more than {MOST_VALUES:,} values; make it smaller"
            raise SchemaLimitError(msg)
        if characters > MOST_CHARACTERS:
            msg = f"its texts have more than {MOST_CHARACTERS:,} characters; make them shorter"
            raise SchemaLimitError(msg)


def _check_number(number: float) -> None:
    if isinstance(number, float) and not math.isfinite(number):
        msg = f"it has the number {number}, which JSON does not have; leave that bound out"
        raise ValueError(msg)
    if not -LARGEST_NUMBER <= number <= LARGEST_NUMBER:
        shown = f"{number:g}" if isinstance(number, float) else f"an integer of {number.bit_length()} bits"
        msg = f"it has the number {shown}; numbers lie between -1e300 and 1e300"
        raise ValueError(msg)


def read_json(text: str) -> Any:
    """Read a schema's JSON text.

    Raises:
        ValueError: If it is no JSON, or too large.
    """
    if len(text) > 4 * MOST_CHARACTERS:
        msg = f"it has {len(text):,} characters; at most {4 * MOST_CHARACTERS:,} are possible"
        raise SchemaLimitError(msg)
    try:
        value = json.loads(text)
    except RecursionError as error:
        msg = f"it is nested more than {DEEPEST} deep; refer to definitions by $ref"
        raise SchemaLimitError(msg) from error
    check_json(value)
    return value


KINDS = ("object", "array", "string", "number", "integer", "boolean", "null")


def _is_schema(value: Any) -> bool:
    return isinstance(value, bool | dict)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0 and value == int(value)


def _is_list_of(check: Callable[[Any], bool], least: int = 1) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(check, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_SCHEMAS = (_is_list_of(_is_schema), "a list of schemas, at least one")
_COUNT = (_is_count, "a whole number from 0 on")
_NUMBER = (_is_number, "a number")
_NAMED = (
    lambda value: isinstance(value, dict) and all(map(_is_schema, value.values())),
    "schemas by name, but a part is not a schema",
)
_SCHEMA = (_is_schema, "a schema: an object, true or false")
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (
        lambda value: value in KINDS or (isinstance(value, list) and bool(value) and all(v in KINDS for v in value)),
        f"one of {', '.join(KINDS)}, or a list of them",
    ),
    "enum": (lambda value: isinstance(value, list), "a list"),
    "required": (_is_list_of(_is_text, 0), "a list of names"),
    **dict.fromkeys(("properties", "patternProperties"), _NAMED),
    **dict.fromkeys(("anyOf", "oneOf", "allOf"), _SCHEMAS),
    "prefixItems": (_is_list_of(_is_schema, 0), "a list of schemas"),
    **dict.fromkeys(("items", "additionalProperties", "propertyNames"), _SCHEMA),
    **dict.fromkeys(("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"), _COUNT),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBER),
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    **dict.fromkeys(("pattern", "format", "$ref"), (_is_text, "a text")),
}


def checked(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Check the values of a schema's keywords, and return them with counts as integers and in bounds.

    Raises:
        ValueError: If one has a value of another type, or too large a one.
    """
    found = dict(schema)
    for key, (holds, expected) in _EXPECTED.items():
        if key not in found:
            continue
        if not holds(found[key]):
            msg = f"{key} is {shortened(found[key])!r}; it must be {expected}"
            raise ValueError(msg)
        if expected is _COUNT[1]:
            count = int(found[key])
            if key.startswith("min") and count > LEAST_COUNT:
                msg = f"{key} is {count}; at most {LEAST_COUNT} are possible"
                raise SchemaLimitError(msg)
            found[key] = min(count, MOST_COUNT)
    if len(found.get("properties", ())) > MOST_PROPERTIES:
        msg = f"an object has {len(found['properties'])} properties; at most {MOST_PROPERTIES} are possible"
        raise SchemaLimitError(msg)
    return found


@dataclass(kw_only=True)
class Budget:
    """The work that a schema, or several for one grammar, may still take."""

    schemas: int = 0
    characters: int = 0
    depth: int = 0
    matches: int = 0
    multiples: int = 0
    pattern_cost: float = 0.0
    patterns: set[str] = field(default_factory=set)

    def add_schema(self) -> None:
        """Count a schema that is rewritten.

        Raises:
            SchemaLimitError: If there are too many.
        """
        self.schemas += 1
        if self.schemas > MOST_SCHEMAS:
            msg = f"it stands for more than {MOST_SCHEMAS:,} schemas once references are followed; make it smaller"
            raise SchemaLimitError(msg)

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """Count a reference or part that is followed, while it is.

        Raises:
            SchemaLimitError: If it leads back to itself, or too deep.
        """
        self.depth += 1
        if self.depth > DEEPEST + _MOST_REFERENCES:
            msg = "a $ref, or allOf, leads back to itself without an end, or too deep"
            raise SchemaLimitError(msg)
        try:
            yield
        finally:
            self.depth -= 1

    def add_literal(self, text: str) -> None:
        """Count a text that is written as it is.

        Raises:
            SchemaLimitError: If it is too long, or all of them are.
        """
        self.characters += len(text)
        if len(text) > LONGEST_LITERAL:
            shown = shortened(text, 40)
            msg = f"the text {shown!r} has {len(text):,} characters; at most {LONGEST_LITERAL:,} are possible"
            raise SchemaLimitError(msg)
        if self.characters > MOST_LITERALS:
            msg = f"the texts to choose from have more than {MOST_LITERALS:,} characters together; give fewer"
            raise SchemaLimitError(msg)

    def add_multiples(self, count: int) -> None:
        """Count the multiples of a number that are written out.

        Raises:
            SchemaLimitError: If there are too many.
        """
        self.multiples += count
        if self.multiples > MOST_MULTIPLES:
            msg = f"its multipleOf have more than {MOST_MULTIPLES:,} multiples in bounds; set closer bounds"
            raise SchemaLimitError(msg)

    def add_matches(self, count: int) -> None:
        """Count the names that are matched with patterns.

        Raises:
            SchemaLimitError: If there are too many.
        """
        self.matches += count
        if self.matches > MOST_MATCHES:
            msg = f"its properties and patternProperties are more than {MOST_MATCHES:,} pairs; give fewer"
            raise SchemaLimitError(msg)

    def has_room(self, pattern: str, cost: float, limit: float = SCHEMA_PATTERN_COST) -> bool:
        """Whether one more pattern may be compiled; an equal one takes about a tenth of the first's time."""
        more = cost / 10 if pattern in self.patterns else cost
        return cost <= PATTERN_COST and self.pattern_cost + more <= limit

    def add_pattern(self, pattern: str, cost: float) -> None:
        """Count a pattern.

        Raises:
            SchemaLimitError: If it takes too long to compile, or all of them do.
        """
        if not self.has_room(pattern, cost):
            limit = PATTERN_COST if cost > PATTERN_COST else SCHEMA_PATTERN_COST
            which = "is" if cost > PATTERN_COST else "and those before it are"
            msg = (
                f"the pattern {shortened(pattern)!r} {which} too ambiguous or repetitive to compile (more than the "
                f"{limit} units that are possible); lower its counts, or let its parts begin differently"
            )
            raise SchemaLimitError(msg)
        self.pattern_cost += cost / 10 if pattern in self.patterns else cost
        self.patterns.add(pattern)
