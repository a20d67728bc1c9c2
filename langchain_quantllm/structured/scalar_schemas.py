"""Schemas of numbers and texts made stricter, so that every text that xgrammar accepts for them is valid.

Owns the patterns of the formats of texts.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from langchain_quantllm.structured.automaton import Node, compile_cost
from langchain_quantllm.structured.pattern_lengths import lengths, within
from langchain_quantllm.structured.patterns import expression, read
from langchain_quantllm.structured.schema_limits import PATTERN_COST, SHORT_TEXTS_COST, Budget
from langchain_quantllm.structured.schema_merge import NothingValidError

_MONTH_DAYS = (
    r"((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
    # Leap days of centuries, of which only each fourth has one, are left out.
)
_DATE = rf"([12]\d{{3}}-{_MONTH_DAYS}|[12]\d(0[48]|[2468][048]|[13579][26])-02-29)"
_CLOCK = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?"
_TIME = rf"{_CLOCK}(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
# Of the longer ends of names many are reserved for tests and the like.
_HOST = r"([a-z0-9]{1,20}(-[a-z0-9]{1,20}){0,2}\.){1,4}([a-z]{2}|com|org|net|edu|gov|info)"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_GROUP = "[0-9a-f]{1,4}"
_SHORT_PATH = r"(/[A-Za-z0-9._~-]{0,40}){0,3}(\?[A-Za-z0-9._~=&-]{0,40})?(#[A-Za-z0-9_-]{0,20})?"
_PATH = r"(/[A-Za-z0-9._~-]*)*(\?[A-Za-z0-9._~=&-]*)?(#[A-Za-z0-9_-]*)?"
FORMATS = {
    "date": _DATE,
    "date-time": rf"{_DATE}T{_TIME}",
    "naive-date-time": rf"{_DATE}T{_CLOCK}",
    "time": _TIME,
    "naive-time": _CLOCK,
    "duration": r"P(\d{1,3}[YMW]|\d{1,4}D|(\d{1,4}D)?T(\d{1,4}H(\d{1,4}M)?(\d{1,4}S)?|\d{1,4}M(\d{1,4}S)?|\d{1,4}S))",
    "email": rf"[A-Za-z0-9]{{1,30}}([._+-][A-Za-z0-9]{{1,20}}){{0,2}}@{_HOST}",
    "uri": rf"https?://{_HOST}(:[1-9]\d{{1,3}})?{_PATH}",
    "uuid": "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "ipv6": rf"({_GROUP}:){{7}}{_GROUP}|({_GROUP}:){{1,3}}(:{_GROUP}){{1,3}}",
    **{
        f"uuid{v}": rf"[0-9a-f]{{8}}-[0-9a-f]{{4}}-{v}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}"
        for v in "12345678"
    },
}
"""Formats of strings that xgrammar accepts too widely, such as the 31st of February, or does not know."""

XGRAMMAR_FORMATS = ("hostname", "json-pointer", "relative-json-pointer")
"""Formats that are left to xgrammar."""

_MULTIPLES = 10_000  # the most that are written out
_NEAREST_MULTIPLES = 1_000  # written out of more, and of multiples without both bounds
_SHORT = 64  # characters up to which lengths become a repetition; at far more, xgrammar takes long
_DECIMALS = 6  # that xgrammar writes between bounds
_FARTHEST = 10**15  # bounds beyond are left out, as answers have fewer digits


def number(schema: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """Rewrite a schema of numbers.

    Args:
        schema: A schema of type `integer` or `number`, with checked keywords.
        budget: The work that the whole schema may still take.

    Raises:
        NothingValidError: If no number is in its bounds, or none that is written with six decimals.
    """
    kind, step = schema["type"], schema.get("multipleOf")
    unit = Fraction(1, 1 if kind == "integer" else 10**_DECIMALS)
    least, most = _lowest(schema, unit), _highest(schema, unit)
    if least is not None and most is not None and least > most:
        shown = {k: v for k, v in schema.items() if "imum" in k}
        msg = f"no {kind} lies between the bounds {shown}"
        raise NothingValidError(msg)
    if step is not None:
        # Of the integers, the multiples of 2.5 are those of 5.
        size = Fraction(str(step))
        size = Fraction(size.numerator) if kind == "integer" else size
        if kind == "integer" and least is None and most is None:
            return {"type": kind, "multipleOf": int(size)}
        return _multiples(size, least, most, budget)
    if any(
        bound is not None and (bound > _FARTHEST if low else bound < -_FARTHEST)
        for bound, low in ((least, True), (most, False))
    ):
        msg = f"the numbers within {schema} have more than 15 digits; bounds lie between -1e15 and 1e15"
        raise ValueError(msg)
    result: dict[str, Any] = {"type": kind}
    if least is not None and least >= -_FARTHEST:
        result["minimum"] = _plain(least)
    if most is not None and most <= _FARTHEST:
        result["maximum"] = _plain(most)
    return result


def _plain(value: Fraction) -> float:
    return int(value) if value.denominator == 1 else float(value)


def _lowest(schema: dict[str, Any], unit: Fraction) -> Fraction | None:
    """Return the lowest multiple of a unit in bounds."""
    found = []
    if "minimum" in schema:
        found.append(math.ceil(Fraction(str(schema["minimum"])) / unit) * unit)
    if "exclusiveMinimum" in schema:
        found.append((math.floor(Fraction(str(schema["exclusiveMinimum"])) / unit) + 1) * unit)
    return max(found, default=None)


def _highest(schema: dict[str, Any], unit: Fraction) -> Fraction | None:
    """Return the highest multiple of a unit in bounds."""
    mirrored = {"maximum": "minimum", "exclusiveMaximum": "exclusiveMinimum"}
    lowest = _lowest({mirrored[k]: -v for k, v in schema.items() if k in mirrored}, unit)
    return None if lowest is None else -lowest


def _multiples(step: Fraction, least: Fraction | None, most: Fraction | None, budget: Budget) -> dict[str, Any]:
    """Write out multiples: all between bounds, or of too many those nearest to zero."""
    first = None if least is None else math.ceil(least / step)
    last = None if most is None else math.floor(most / step)
    if first is None or last is None or last - first > _MULTIPLES:
        half = _NEAREST_MULTIPLES // 2
        begin = -half if first is None else max(first, -half)
        if last is not None:
            begin = (
                min(begin, last - _NEAREST_MULTIPLES)
                if first is None
                else max(first, min(begin, last - _NEAREST_MULTIPLES))
            )
        first, last = begin, begin + _NEAREST_MULTIPLES if last is None else min(last, begin + _NEAREST_MULTIPLES)
    values = [_plain(k * step) for k in range(first, last + 1)]
    if not values:
        msg = f"no multiple of {_plain(step)} lies between {least and _plain(least)} and {most and _plain(most)}"
        raise NothingValidError(msg)
    budget.add_multiples(len(values))
    return {"enum": values}


def text(schema: dict[str, Any], budget: Budget) -> dict[str, Any]:
    """Rewrite a schema of texts.

    Args:
        schema: A schema of type `string`, with checked keywords.
        budget: The work that the whole schema may still take.

    Raises:
        NothingValidError: If no text has its lengths, or none that is found.
        ValueError: If its pattern cannot be enforced.
    """
    pattern, kind = schema.get("pattern"), schema.get("format")
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if most is not None and most < least:
        msg = f"no text has minLength {least} and maxLength {most}"
        raise NothingValidError(msg)
    if kind == "uri" and most is not None:
        return _enforced(FORMATS[kind].replace(_PATH, _SHORT_PATH), least, most, budget)
    if kind in FORMATS:
        return _enforced(FORMATS[kind], least, most, budget)
    if pattern is not None:
        return _enforced(pattern, least, most, budget)
    if kind in XGRAMMAR_FORMATS:
        return {"type": "string", "format": kind}
    if most is not None and max(least, most) <= _SHORT:
        # The same as the lengths alone, but with masks that take microseconds in place of milliseconds.
        written = rf'^[^"\\]{{{least},{most}}}$'
        if budget.has_room(written, most, SHORT_TEXTS_COST):
            budget.add_pattern(written, most)
            return {"type": "string", "pattern": written}
    return {"type": "string", **{k: schema[k] for k in ("minLength", "maxLength") if k in schema}}


def _enforced(pattern: str, least: int, most: int | None, budget: Budget) -> dict[str, Any]:
    """Write a pattern, narrowed to lengths, for xgrammar, which ignores lengths beside a pattern."""
    tree = within(read(pattern).whole, least, most)
    if tree is None:
        msg = f"of the texts of the pattern {pattern!r} none is found with {least} to {most} characters"
        raise NothingValidError(msg)
    return text_of(tree, budget)


def text_of(tree: Node, budget: Budget) -> dict[str, Any]:
    """Write the schema of texts that match a tree."""
    if lengths(tree) == (0, 0):
        return {"enum": [""]}
    written = expression(tree, in_json=True)
    budget.add_pattern(written, compile_cost(tree, PATTERN_COST))
    return {"type": "string", "pattern": f"^({written})$"}
