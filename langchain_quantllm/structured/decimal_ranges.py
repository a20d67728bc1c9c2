"""Schemas of decimal numbers with a number of digits, and the expressions of their ranges."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

_MOST_DIGITS = 9  # before the point, where there is no bound
_MOST_PLACES = 6


def decimal_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a decimal number in JSON.

    Args:
        schema: Its bounds `gt`, `ge`, `lt` and `le`, `multiple_of`, `max_digits` and `decimal_places`, all optional.

    Returns:
        A schema of numbers, or of texts where digits are counted.

    Raises:
        ValueError: If no number, or none that is found, has all of that.
    """
    digits, places = schema.get("max_digits"), schema.get("decimal_places")
    names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    bounds = {name: float(schema[key]) for key, name in names.items() if schema.get(key) is not None}
    step = schema.get("multiple_of")
    if digits is None and places is None:
        return {"type": "number", **bounds, **({} if step is None else {"multipleOf": float(step)})}
    if step is not None:
        msg = "a decimal with multiple_of and a number of digits"
        raise ValueError(msg)
    most = _MOST_PLACES if digits is None else digits
    places = min(most, _MOST_PLACES) if places is None else min(places, most)
    whole = _MOST_DIGITS if digits is None else min(digits - places, _MOST_DIGITS)
    unit = Decimal(1).scaleb(-places)
    limit = 10 ** (whole + places) - 1
    least = max([-limit, *(_scaled(schema, "ge", unit, 0, 1)), *(_scaled(schema, "gt", unit, 1, 1))])
    highest = min(
        [limit, *(-n for n in _scaled(schema, "le", unit, 0, -1)), *(-n for n in _scaled(schema, "lt", unit, 1, -1))]
    )
    if least > highest:
        msg = f"a decimal between {least * unit} and {highest * unit}"
        raise ValueError(msg)
    if not bounds and whole:
        point = rf"(\.[0-9]{{1,{places}}})?" if places else ""
        return {"type": "string", "pattern": rf"^-?(0|[1-9][0-9]{{0,{whole - 1}}}){point}$"}
    return {"type": "string", "pattern": f"^({range_pattern(least, highest, places)})$"}


def _scaled(schema: Mapping[str, Any], key: str, unit: Decimal, more: int, sign: int) -> list[int]:
    """Return a bound in units, rounded up; for an upper bound, of its negative."""
    if schema.get(key) is None:
        return []
    exact = Decimal(schema[key]) * sign / unit
    rounded = int(exact.to_integral_value("ROUND_FLOOR" if more else "ROUND_CEILING"))
    return [rounded + more]


def range_pattern(least: int, most: int, places: int) -> str:
    """Write an expression of the numbers of a range, which have a fixed number of decimals.

    Args:
        least: The lowest number, in units of the last decimal.
        most: The highest.
        places: The number of decimals.
    """
    found = []
    if least < 0:
        found += ["-" + text for text in _ranges(max(1, -most), -least, places)]
    if most >= 0:
        found += _ranges(max(0, least), most, places)
    return "|".join(found)


def _ranges(least: int, most: int, places: int) -> list[str]:
    """Write the ranges of numbers from 0 on, each of one number of digits."""
    found = []
    width = max(places + 1, len(str(least)))
    while least <= most:
        last = min(most, 10**width - 1)
        for classes in _classes(str(least).zfill(width), str(last).zfill(width)):
            point = [r"\."] if places else []
            found.append("".join([*classes[: width - places], *point, *classes[width - places :]]))
        least, width = last + 1, width + 1
    return found


def _classes(least: str, most: str) -> list[list[str]]:
    """Split the range between two numbers of the same length into sequences of classes of digits."""
    rest = len(least) - 1
    if rest < 0:
        return [[]]
    a, b = least[0], most[0]
    if set(least[1:]) <= {"0"} and set(most[1:]) <= {"9"}:
        return [[f"[{a}-{b}]", *["[0-9]"] * rest]]
    if a == b:
        return [[a, *classes] for classes in _classes(least[1:], most[1:])]
    found = [[a, *classes] for classes in _classes(least[1:], "9" * rest)]
    if int(b) - int(a) > 1:
        found.append([f"[{int(a) + 1}-{int(b) - 1}]", *["[0-9]"] * rest])
    return found + [[b, *classes] for classes in _classes("0" * rest, most[1:])]
