"""The merge of two JSON schemas into one, and the check of single values against keywords.

Owns the schema of all values that are valid under two schemas, as far as one schema can express it. References are
followed by `json_schema`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from fractions import Fraction
from typing import Any

from langchain_quantllm.structured.patterns import read
from langchain_quantllm.structured.schema_limits import MOST_BRANCHES, SchemaLimitError, shortened


class NothingValidError(ValueError):
    """No value is valid under a schema, or none that can be enforced."""


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two schemas into the schema of the values that are valid under both.

    Args:
        one: A schema without references at its top.
        other: Another.

    Raises:
        NothingValidError: If they contradict each other, or have values that one schema cannot express.
    """
    both = dict(one)
    for key, value in other.items():
        both[key] = value if key not in both or identity(both[key]) == identity(value) else _both(key, both[key], value)
    for some, others in ((one, other), (other, one)):
        if "prefixItems" in some and "prefixItems" not in others and "items" in others:
            both["prefixItems"] = [{"allOf": [item, others["items"]]} for item in some["prefixItems"]]
    # A property that one of them does not name must fit its `additionalProperties`.
    for side in (one, other):
        rest = side.get("additionalProperties", True)
        names = set(both.get("properties", ())) - set(side.get("properties", ()))
        names = {name for name in names if not any(matches(p, name) for p in side.get("patternProperties", ()))}
        if names and rest is not True:
            both["properties"] = {
                name: {"allOf": [schema, rest]} if name in names else schema
                for name, schema in both["properties"].items()
            }
    return both


def _both(key: str, one: Any, other: Any) -> Any:
    if key in ("properties", "patternProperties"):
        return {**one, **{k: {"allOf": [one[k], v]} if k in one else v for k, v in other.items()}}
    if key == "required":
        return list(dict.fromkeys([*one, *other]))
    if key == "allOf":
        return [*one, *other]
    if key.startswith("min") or key == "exclusiveMinimum":
        return max(one, other)
    if key.startswith("max") or key == "exclusiveMaximum":
        return min(one, other)
    if key == "anyOf":
        if len(one) * len(other) > MOST_BRANCHES:
            count = len(one) * len(other)
            msg = f"an allOf joins two anyOf to {count} pairs of branches; at most {MOST_BRANCHES} are possible"
            raise SchemaLimitError(msg)
        return [{"allOf": [a, b]} for a in one for b in other]
    if key == "enum":
        known = set(map(identity, other))
        return [value for value in one if identity(value) in known]
    if key in ("items", "additionalProperties", "propertyNames"):
        return False if False in (one, other) else {"allOf": [one, other]}
    if key == "type" and (kinds := _shared_types(one, other)):
        return kinds if len(kinds) > 1 else kinds[0]
    if key == "multipleOf":
        a, b = Fraction(str(one)), Fraction(str(other))
        multiple = Fraction(math.lcm(a.numerator, b.numerator), math.gcd(a.denominator, b.denominator))
        return int(multiple) if multiple.denominator == 1 else float(multiple)
    msg = f"{key} {shortened(one)!r} and {key} {shortened(other)!r} cannot both hold"
    raise NothingValidError(msg)


def _shared_types(one: Any, other: Any) -> list[str]:
    mine, theirs = ({kind} if isinstance(kind, str) else set(kind) for kind in (one, other))
    for some, others in ((mine, theirs), (theirs, mine)):
        if "number" in some and "integer" in others:
            some.add("integer")
    shared = mine & theirs
    return sorted(shared - {"integer"} if "number" in shared else shared)


def matches(pattern: str, text: str) -> bool:
    """Whether a pattern is found in a text.

    Raises:
        ValueError: If the pattern cannot be read, or matching takes too long.
    """
    return read(pattern).found_in(text)


def identity(value: Any) -> Hashable:
    """Return what is equal for two values that are the same in JSON, in which true is not 1 but 1.0 is."""
    if isinstance(value, dict):
        return frozenset((key, identity(one)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(identity, value))
    return (value, isinstance(value, bool))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


IS_TYPE: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": _is_number,
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}
"""Whether a value is of a type of JSON schema."""

_OF_NUMBERS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
    "multipleOf": lambda value, step: Fraction(str(value)) % Fraction(str(step)) == 0,
}
_OF_TEXTS: dict[str, Callable[[Any, Any], bool]] = {
    "minLength": lambda value, least: len(value) >= least,
    "maxLength": lambda value, most: len(value) <= most,
    "pattern": lambda value, pattern: matches(pattern, value),
}


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value is valid under the keywords for types, numbers, texts, enum and const; others are ignored."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(IS_TYPE[kind](value) for kind in kinds if kind in IS_TYPE):
        return False
    known = identity(value)
    if known not in map(identity, schema.get("enum", [value])) or known != identity(schema.get("const", value)):
        return False
    checks = _OF_NUMBERS if _is_number(value) else _OF_TEXTS if isinstance(value, str) else {}
    return all(check(value, schema[key]) for key, check in checks.items() if key in schema)
