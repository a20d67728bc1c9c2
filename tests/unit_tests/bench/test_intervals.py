"""Intervals: against known values, and how often they hold the truth."""

from __future__ import annotations

import random

import pytest
import torch

from langchain_quantllm.bench.intervals import bootstrap, difference, ratio, share


def test_shares_have_wilsons_interval() -> None:
    found = share([True] * 8 + [False] * 2)
    assert (found.mean, found.low, found.high) == pytest.approx((0.8, 0.490, 0.943), abs=1e-3)  # as R's prop.test gives


@pytest.mark.parametrize("hit", [True, False])
def test_few_equal_answers_prove_little(hit: bool) -> None:
    found = share([hit] * 5)
    assert found.high - found.low > 0.4
    assert found.low <= found.mean == float(hit) <= found.high


def test_an_interval_holds_the_mean_in_about_95_of_100_samples() -> None:
    numbers = random.Random(0)
    held = 0
    for _ in range(200):
        found = bootstrap(torch.tensor([numbers.gauss(1, 2) for _ in range(100)], dtype=torch.float64))
        held += found.low <= 1 <= found.high
    assert 180 <= held <= 199


def test_neighbours_in_blocks_make_the_interval_wider() -> None:
    """As where eight tokens beside each other say the same: there are eight times fewer of them in truth."""
    numbers = random.Random(0)
    values = torch.tensor([numbers.gauss(0, 1) for _ in range(64)], dtype=torch.float64).repeat_interleave(8)
    alone, together = bootstrap(values), bootstrap(values, 8)
    assert alone.mean == pytest.approx(together.mean)
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_pairs_of_the_same_question_tell_more_than_two_shares() -> None:
    base = [1.0, 0.0] * 50
    values = [*base[:-4], 0.0, 0.0, 0.0, 0.0]  # two answers of a hundred got worse
    found = difference(values, base)
    assert found.mean == pytest.approx(-0.02)
    assert found.high - found.low < 0.1
    apart = share([bool(value) for value in values])
    assert apart.high - apart.low > 0.18
    assert difference(values, values) == difference(base, base)


def test_a_quotient_of_sums_weighs_its_parts() -> None:
    found = ratio([10.0, 1.0], [100, 1])
    assert found.mean == 11 / 101
    assert (found.low, found.high) == (0.1, 1.0)
    assert found == ratio([10.0, 1.0], [100, 1])  # the same each time
