"""JSON schemas as a stranger's server may send them: valid ones with a few wrong, huge or circular parts."""

from __future__ import annotations

import random
from typing import Any

BASES: list[dict[str, Any]] = [
    {
        "type": "object",
        "title": "order",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 20, "pattern": "^[a-z ]+$"},
            "count": {"type": "integer", "minimum": 1, "maximum": 99, "multipleOf": 3},
            "price": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 10.5},
            "tags": {"type": "array", "items": {"type": "string", "format": "date"}, "minItems": 1, "maxItems": 3},
            "way": {"anyOf": [{"const": "a"}, {"enum": ["b", 2, None]}, {"$ref": "#/$defs/point"}]},
            "next": {"$ref": "#"},
        },
        "required": ["name", "count"],
        "additionalProperties": False,
        "$defs": {"point": {"type": "array", "prefixItems": [{"type": "number"}, {"type": "number"}], "items": False}},
    },
    {
        "type": "object",
        "patternProperties": {"^k_[a-z]+$": {"type": ["integer", "null"]}},
        "propertyNames": {"maxLength": 12},
        "minProperties": 1,
        "maxProperties": 4,
    },
    {
        "allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}, {"$ref": "#/definitions/n"}],
        "definitions": {"n": {}},
    },
    {
        "oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}],
        "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}},
    },
]
KEYWORDS = (
    *("type", "enum", "const", "properties", "required", "additionalProperties", "patternProperties", "propertyNames"),
    *(
        "items",
        "prefixItems",
        "minItems",
        "maxItems",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
    ),
    *(
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
        "minProperties",
        "title",
    ),
)


def _nested(levels: int, key: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {key: [schema]} if key != "items" else {"type": "array", "items": schema}
    return schema


def _value(r: random.Random) -> Any:
    """A value that few keywords take."""
    circle: dict[str, Any] = {"type": "object", "properties": {}}
    circle["properties"]["self"] = circle
    return r.choice(
        [
            *(None, True, False, 0, -1, 3, 2.5, 10**9, 10**30, 10**5000, 1e308, float("nan"), float("inf"), -1e-300),
            *(
                "",
                "x",
                "integer",
                "banana",
                "#",
                "#/",
                "#/$defs/none",
                "#/$defs/point",
                "http://a/b",
                "[",
                "(a+)+$",
                "a{10000}",
            ),
            *(
                "((a{0,99}){0,99}){0,99}",
                "^(?=a)b",
                "\ud800",
                "x" * 100_000,
                b"bytes",
                {1, 2},
                object(),
                lambda: 1,
                (1, "a"),
            ),
            *([], {}, [1, 2], ["a", "a"], {"a": 1}, {1: {}}, {"$ref": "#"}, {"$ref": "#/$defs/point/items"}, circle),
            *([{"type": "string"}] * 50, [{"anyOf": [{"minimum": i} for i in range(40)]} for _ in range(6)]),
            *({f"p{i}": {"type": "string", "maxLength": 30} for i in range(300)}, list(range(30_000)), ["y" * 3000]),
            *(_nested(10_000, "items"), _nested(50, "anyOf"), _nested(300, "allOf"), {"type": ["string", "integer"]}),
        ]
    )


def _like(r: random.Random, old: Any) -> Any:
    """A value of the same type, which may still be a wrong one."""
    if isinstance(old, bool) or old is None:
        return r.choice([True, False, {}])
    if isinstance(old, int | float):
        return r.choice([0, 1, 2, 5, 7.5, 40, old + 1])
    if isinstance(old, str):
        return r.choice(["a", "date", "uri", "^[a-c]{1,5}$", "integer", "string", "array", "#/$defs/point", old])
    if isinstance(old, dict):
        return {**old, r.choice(["minimum", "minItems", "minLength", "maxProperties"]): r.randint(0, 4)}
    return [*old, *old] if isinstance(old, list) else None


def _places(schema: Any, found: list[Any]) -> list[Any]:
    """List the dicts and lists of a base."""
    if isinstance(schema, dict | list):
        found.append(schema)
        for part in schema.values() if isinstance(schema, dict) else schema:
            _places(part, found)
    return found


def _copied(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {key: _copied(value) for key, value in schema.items()}
    return [_copied(value) for value in schema] if isinstance(schema, list) else schema


def mutated_schema(r: random.Random) -> Any:
    """A schema with one to three mutations."""
    schema = _copied(r.choice(BASES))
    places = _places(schema, [])
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        place = r.choice(places)
        chance = r.random()
        if isinstance(place, dict) and place and r.random() < 0.7:
            key = r.choice(list(place))
            place[key] = _like(r, place[key])
        elif isinstance(place, list):
            if chance < 0.2:
                place.append(schema)  # it holds itself
            else:
                place.insert(r.randint(0, len(place)), _value(r))
        elif chance < 0.5 or not place:
            place[r.choice(KEYWORDS)] = _value(r)
        elif chance < 0.9:
            place[r.choice(list(place))] = _value(r)
        elif chance < 0.95:
            place[r.choice([1, None, ("a",)])] = {}
        else:
            place["properties"] = {"round": schema}
    return schema
