"""Ranges of decimal numbers as expressions: exactly the numbers in bounds."""

from __future__ import annotations

import random
import re
from decimal import Decimal

import pytest

from langchain_quantllm.structured.decimal_ranges import decimal_schema, range_pattern


def test_exactly_the_numbers_of_a_range_match() -> None:
    r = random.Random(0)
    for _ in range(300):
        places, least = r.randrange(4), r.randrange(-3000, 3000)
        most = least + r.randrange(3000)
        pattern = re.compile(range_pattern(least, most, places))
        for number in (*(r.randrange(-6000, 6000) for _ in range(50)), least, most, least - 1, most + 1):
            digits = str(abs(number)).zfill(places + 1)
            point = "." * bool(places)
            text = "-" * (number < 0) + digits[: len(digits) - places] + point + digits[len(digits) - places :]
            assert (pattern.fullmatch(text) is not None) is (least <= number <= most), (least, most, places, text)


def test_bounds_between_two_numbers_of_the_digits_are_rounded_inwards() -> None:
    pattern = decimal_schema({"gt": Decimal("0.995"), "lt": Decimal("1.021"), "decimal_places": 2})["pattern"]
    assert [t for t in ("0.99", "1.00", "1.02", "1.03") if re.fullmatch(pattern, t)] == ["1.00", "1.02"]
    with pytest.raises(ValueError, match="between"):
        decimal_schema({"gt": Decimal("1.001"), "lt": Decimal("1.009"), "decimal_places": 2})
