"""JSON schemas made stricter, so that every text that xgrammar accepts for them is valid.

Owns the rewriting, and the estimate of a value's length. Makes no grammar.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from langchain_quantllm.structured.constraints import frozen_text
from langchain_quantllm.structured.schema_merge import NothingValidError, fits, matches, merged

UNENFORCED = (
    "not",
    "if",
    "then",
    "else",
    "contains",
    "uniqueItems",
    "dependentRequired",
    "dependentSchemas",
    "unevaluatedItems",
    "unevaluatedProperties",
    "contentEncoding",
    "multipleOf of numbers, and of integers with one bound or with more than 10,000 multiples between two",
    "minLength and maxLength beside a pattern, but where it is one repeated class and they are at most 64",
    "patterns and lengths beside a format",
    "patternProperties where several match a name",
    "minProperties where a name is repeated",
    "what an enum or const says of objects and arrays beside other keywords of theirs",
    "oneOf where several branches match",
    "formats other than date, date-time, time, duration, email, uri, uuid, uuid1 to uuid8, ipv4, ipv6, hostname, "
    "json-pointer and relative-json-pointer",
)
"""Keywords of JSON schema that the masks do not enforce; the reader of the answer must check them."""


_MONTH_DAYS = (
    r"((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
    # Leap days of centuries, of which only each fourth has one, are left out.
)
_DATE = rf"([12]\d{{3}}-{_MONTH_DAYS}|[12]\d(0[48]|[2468][048]|[13579][26])-02-29)"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_HOST = r"([a-z0-9]{1,20}(-[a-z0-9]{1,20}){0,2}\.){1,4}[a-z]{2,6}"
_FORMATS = {
    "date": _DATE,
    "date-time": rf"{_DATE}T{_TIME}",
    "time": _TIME,
    "duration": r"P(\d{1,3}[YMW]|\d{1,4}D|(\d{1,4}D)?T(\d{1,4}H(\d{1,4}M)?(\d{1,4}S)?|\d{1,4}M(\d{1,4}S)?|\d{1,4}S))",
    "email": rf"[A-Za-z0-9]{{1,30}}([._+-][A-Za-z0-9]{{1,20}}){{0,2}}@{_HOST}",
    "uri": rf"https?://{_HOST}(:[1-9]\d{{1,3}})?(/[A-Za-z0-9._~-]*)*(\?[A-Za-z0-9._~=&-]*)?(#[A-Za-z0-9_-]*)?",
    **{
        f"uuid{v}": rf"[0-9a-f]{{8}}-[0-9a-f]{{4}}-{v}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}"
        for v in "12345678"
    },
}
"""Formats of strings that xgrammar accepts too widely, such as the 31st of February, or does not know."""

_KNOWN_FORMATS = ("uuid", "ipv4", "ipv6", "hostname", "json-pointer", "relative-json-pointer")
_KINDS = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "minProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_KEYWORDS = {
    *(k for keywords in _KINDS.values() for k in keywords),
    *("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "propertyNames", "maxProperties"),
}
_DECIMAL = "(?!^[-+.]*$)"  # in the pattern that pydantic writes for a Decimal
_MULTIPLES = 10_000  # the most that are written out
_SHORT = 64  # repetitions of a pattern; at far more, xgrammar fails or takes long


class StrictSchema:
    """Rewrites a schema so that every text that xgrammar accepts for it is valid; all references in one table."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._names: dict[str, str] = {}
        self._numbers = itertools.count()
        self._defs: dict[str, Any] = {}
        self.is_recursive = False

    def result(self) -> Any:
        """Return the schema with its definitions."""
        schema = self._node(self._root)
        return {"anyOf": [schema], "$defs": self._defs} if self._defs else schema

    def _target(self, ref: Any) -> Any:
        if not isinstance(ref, str) or not ref.startswith("#"):
            msg = f"$ref {ref!r} leads out of the schema"
            raise ValueError(msg)
        target = self._root
        for part in ref[1:].split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                target = target[int(part)] if isinstance(target, list) else target[part]
            except (LookupError, TypeError, ValueError):
                msg = f"$ref {ref!r} leads nowhere"
                raise ValueError(msg) from None
        return target

    def _reference(self, ref: str) -> dict[str, Any]:
        if ref not in self._names:
            self._names[ref] = name = f"r{next(self._numbers)}"
            try:
                self._defs[name] = self._node(self._target(ref))
            except NothingValidError:
                del self._names[ref]  # the next use of the reference raises, too
                raise
        elif self._names[ref] not in self._defs:  # a caller is writing it
            self.is_recursive = True
        return {"$ref": f"#/$defs/{self._names[ref]}"}

    def _open(self, given: Any) -> dict[str, Any]:
        """Follow a reference, so that the schema can be merged with another."""
        if given is False:
            return {"enum": []}  # xgrammar refuses false here
        schema: dict[str, Any] = {} if given is True else {k: v for k, v in given.items() if k in _KEYWORDS}
        if "oneOf" in schema and "anyOf" not in schema:
            schema["anyOf"] = schema.pop("oneOf")
        ref = schema.pop("$ref", None)
        if ref is not None:
            return merged(self._open(self._target(ref)), schema)
        return schema

    def _node(self, given: Any) -> Any:
        """Rewrite a schema."""
        if not isinstance(given, bool | dict):
            msg = f"{given!r} is not a schema"
            raise ValueError(msg)
        if given is False:
            return False
        schema = {} if given is True else {k: v for k, v in given.items() if k in _KEYWORDS}
        ref = schema.get("$ref")
        if ref is not None and len(schema) == 1:
            return self._reference(ref)
        parts = schema.pop("allOf", [])
        if parts or ref is not None:
            for part in parts:
                schema = merged(self._open(schema), self._open(part))
            return self._node(self._open(schema))
        if branches := schema.pop("anyOf", None) or schema.pop("oneOf", None):
            return self._any([{"allOf": [schema, b]} if schema else b for b in branches if b is not False])
        if "enum" in schema or "const" in schema:
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            if found := [value for value in values if fits(value, schema)]:
                return {"enum": found}
            msg = f"of {values!r} nothing is valid beside {schema!r}"
            raise NothingValidError(msg)
        kind = schema.get("type")
        if isinstance(kind, list):
            return self._any([{**schema, "type": k} for k in kind])
        kind = kind or next((k for k, keywords in _KINDS.items() if any(w in schema for w in keywords)), None)
        write = {"object": self._object, "array": self._array, "string": _string, "integer": _number, "number": _number}
        schema = {} if kind is None else {**schema, "type": kind}
        self.is_recursive |= not schema  # any value holds any values
        return write[kind](schema) if kind in write else schema

    def _any(self, branches: list[Any]) -> dict[str, Any]:
        """Rewrite branches, without those under which nothing is valid."""
        nodes, failure = [], NothingValidError("of no branches one is to be valid")
        for branch in branches:
            try:
                nodes.append(self._node(branch))
            except NothingValidError as error:
                failure = error
        if not nodes:
            raise failure
        return {"anyOf": nodes}

    def _object(self, schema: dict[str, Any]) -> dict[str, Any]:
        required = schema.get("required", [])
        extra = schema.get("additionalProperties", not ({"properties", "patternProperties"} & set(schema)))
        # xgrammar forgets properties that are required but not declared.
        given = {
            **schema.get("properties", {}),
            **{k: extra or {} for k in required if k not in schema.get("properties", {})},
        }
        # Nor does it apply the patterns of names to declared properties, or forbid undeclared ones that match them.
        patterns = schema.get("patternProperties", {})
        names = self._open(schema.get("propertyNames", True))
        for name in given:
            if found := [s for pattern, s in patterns.items() if matches(pattern, name)]:
                given[name] = {"allOf": [given[name], *found]}
            if not fits(name, names):
                given[name] = False
        schema["properties"] = {k: v for k, p in given.items() if (v := self._property(p, k in required)) is not False}
        schema["additionalProperties"] = False if patterns else self._node(extra)
        if patterns:
            schema["patternProperties"] = {k: self._node(v) for k, v in patterns.items()}
        return schema

    def _property(self, schema: Any, is_required: bool) -> Any:
        """Rewrite a property; False to leave it out, as nothing is valid for it."""
        try:
            node = self._node(schema)
        except NothingValidError:
            node = False
            if is_required:
                raise
        if node is False and is_required:
            msg = f"a property is required for which {schema!r} allows no value"
            raise NothingValidError(msg)
        return node

    def _array(self, schema: dict[str, Any]) -> dict[str, Any]:
        if "prefixItems" in schema:
            schema["prefixItems"] = [self._node(v) for v in schema["prefixItems"]]
        if "items" in schema or "prefixItems" not in schema:
            schema["items"] = self._node(schema.get("items", True))
        return schema


def _number(schema: dict[str, Any]) -> dict[str, Any]:
    step = schema.pop("multipleOf", None)
    if schema["type"] == "number":
        return schema
    # xgrammar refuses fractions as bounds of integers, which pydantic writes.
    for key in schema.keys() & _KINDS["number"]:
        schema[key] = (math.ceil if key in ("minimum", "exclusiveMaximum") else math.floor)(schema[key])
    if step is None:
        return schema
    step = Fraction(str(step)).numerator  # of the integers, the multiples of 2.5 are those of 5
    least = [schema[key] + more for key, more in (("minimum", 0), ("exclusiveMinimum", 1)) if key in schema]
    most = [schema[key] - less for key, less in (("maximum", 0), ("exclusiveMaximum", 1)) if key in schema]
    if least and most and min(most) - max(least) <= _MULTIPLES * step:
        if multiples := list(range(-(-max(least) // step) * step, min(most) + 1, step)):
            return {"enum": multiples}
        msg = f"no multiple of {step} lies between {max(least)} and {min(most)}"
        raise NothingValidError(msg)
    return schema if least or most else {**schema, "multipleOf": step}  # xgrammar ignores it beside bounds


def _string(schema: dict[str, Any]) -> dict[str, Any]:
    pattern, kind = schema.get("pattern"), schema.get("format")
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if kind in _FORMATS:
        return {"type": "string", "pattern": _without_optional_groups(f"^{_FORMATS[kind]}$")}
    is_short = max(least, most or 0) <= _SHORT
    if pattern is None and kind not in _KNOWN_FORMATS and most is not None and is_short:
        # The same as the lengths alone, but with masks that take microseconds in place of milliseconds.
        return {"type": "string", "pattern": rf'^[^"\\]{{{least},{most}}}$'}
    if pattern is None:
        lengths: dict[str, Any] = {k: schema[k] for k in ("minLength", "maxLength") if k in schema}
        return {"type": "string", **({"format": kind} if kind in _KNOWN_FORMATS else lengths)}
    if _DECIMAL in pattern:
        return {"type": "string", "pattern": r"^-?\d{1,9}(\.\d{1,6})?$"}
    check_pattern(pattern)
    if re.search(r'["]|\\\\', re.sub(r"\[(\\.|[^\]])*\]", "", pattern)):
        msg = f"the pattern {pattern!r} asks for quotes or backslashes, which a JSON string has only as escapes"
        raise ValueError(msg)
    # xgrammar ignores lengths beside a pattern, so they become its repetition.
    if is_short and (least or most is not None) and (one := re.fullmatch(r"\^(\[[^\]]+\]|\\?.)([*+])\$", pattern)):
        pattern = f"^{one[1]}{{{max(least, int(one[2] == '+'))},{'' if most is None else most}}}$"
    return {"type": "string", "pattern": _without_optional_groups(pattern)}


def _without_optional_groups(pattern: str) -> str:
    """Write `(a|)` for `(a)?`, after which xgrammar 0.2.8 accepts an end of the group in place of the whole group."""
    return re.sub(
        r"\\.|\[(?:\\.|[^\]\\])*\]|\)\?\??",
        lambda found: "|)" if found[0][0] == ")" else found[0],
        pattern,
        flags=re.DOTALL,
    )


def check_pattern(pattern: str) -> None:
    """Refuse parts of a regular expression that xgrammar ignores silently.

    Raises:
        ValueError: If the pattern looks ahead or behind.
    """
    if re.search(r"(?<!\\)\(\?<?[=!]", pattern):
        msg = f"the pattern {pattern!r} looks ahead or behind, which cannot be enforced"
        raise ValueError(msg)


def longest(schema: Any, defs: Mapping[str, Any], within: tuple[str, ...] = ()) -> int:
    """Estimate the characters of a value with every property and one element in each array."""
    if not isinstance(schema, dict):
        return 4
    if ref := schema.get("$ref"):
        name = ref.rpartition("/")[2]
        return 4 if name in within or len(within) > 6 else longest(defs[name], defs, (*within, name))
    if "anyOf" in schema:
        return max((longest(s, defs, within) for s in schema["anyOf"]), default=4)
    if values := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return max(len(frozen_text(v).encode()) + 2 for v in values)
    if schema.get("type") == "object":
        return 4 + sum(len(k.encode()) + 8 + longest(v, defs, within) for k, v in schema.get("properties", {}).items())
    if schema.get("type") == "array":
        items = [*schema.get("prefixItems", ()), *[schema.get("items")] * max(1, schema.get("minItems", 0))]
        return 4 + sum(2 + longest(s, defs, within) for s in items)
    # A pattern seldom asks for more than a date with its time.
    return 30 if "pattern" in schema or "format" in schema else 8 + int(schema.get("minLength", 0))
