"""The meter of a chat template's work: sizes, weights and widths."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable

import pytest

from langchain_quantllm.compat.jinja_bounds import Meter, TemplateBoundError


def test_weights_count_each_part_as_often_as_it_is_there() -> None:
    meter = Meter({"messages": ["abc"]})
    inner = ["ab", {"k": "v"}]
    assert meter.weight(inner) == 1 + 2 + (1 + 1 + 1)
    assert meter.weight([inner, inner]) == 1 + 2 * meter.weight(inner)
    assert meter.weight(json.loads("[[[]]]")) == 3


def test_doubled_lists_weigh_twice_without_being_walked() -> None:
    meter, doubled = Meter(), [1]
    for _ in range(15):
        doubled = meter.made([doubled, doubled])
    assert meter.weight(doubled) > 2**15
    with pytest.raises(TemplateBoundError, match="it makes a value"):
        functools.reduce(lambda one, _: meter.made([one, one]), range(60), doubled)


def test_views_of_dicts_weigh_as_their_entries() -> None:
    meter = Meter()
    assert meter.weight({"ab": "c"}.items()) == meter.weight({"ab": "c"}) - 1
    assert meter.weight({"ab": "c"}.values()) == 2


@pytest.mark.parametrize(
    "check",
    [
        lambda meter: meter.made("a" * 2**21),
        lambda meter: meter.made(10**2000),
        lambda meter: meter.size(2**21),
        lambda meter: meter.width(3, 1001),
        lambda meter: meter.width(" " * 1001),
        lambda meter: meter.slow("a" * 10_001),
        lambda meter: meter.joining(["a"] * 1000, "b" * 2000),
        lambda meter: meter.replacing("a" * 1000, "a", "b" * 2000),
        lambda meter: meter.formatting("%1001d", 1),
        lambda meter: meter.formatting("%*d", (1001, 1)),
        lambda meter: meter.formatting("%(a)s" * 100, {"a": "a" * 20_000}),
        lambda meter: meter.spec(">1001"),
        lambda meter: meter.taken(iter(range(2**21))),
        lambda meter: [meter.made("a" * 2**20) for _ in range(100)],
    ],
)
def test_what_is_too_large_is_an_error(check: Callable[[Meter], object]) -> None:
    with pytest.raises(TemplateBoundError, match="it "):
        check(Meter())


def test_time_is_that_of_the_thread() -> None:
    meter = Meter()
    time.sleep(1.2)
    meter.check_time()  # waiting is no work
    with pytest.raises(TemplateBoundError, match="it takes longer than 1 seconds of processor time"):
        list(meter.stepping(itertools.repeat(None)))
