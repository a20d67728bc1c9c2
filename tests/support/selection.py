"""Choose the few cases of a large set that `make test` runs; `make test-all` runs all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import pytest

from langchain_quantllm.compat.packages import is_installed

T = TypeVar("T")

QUICK_FAMILIES = ("llama-grouped", "mistral-window", "qwen3", "gemma2", "phi", "gpt_neox", "gpt2", "opt-350m")
QUICK_FAMILIES += ("falcon-40b", "mixtral", "cohere2", "falcon-alibi", "mamba", "llama-dynamic-rope", "llama4")
"""Families of models with one of each kind of attention, positions, norms, experts, and reasons to be refused."""


def covering(cases: Mapping[str, T], features: Callable[[T], Collection[Hashable]]) -> set[str]:
    """Choose cases that together have every feature that any case has, greedily."""
    left = {feature for case in cases.values() for feature in features(case)}
    chosen = set()
    while left:
        name = max(cases, key=lambda name: len(left.intersection(features(cases[name]))))
        left.difference_update(features(cases[name]))
        chosen.add(name)
    return chosen


def pairs(properties: Mapping[str, Hashable]) -> list[Hashable]:
    """List every two properties together, as features: those who cover them have tried each beside each other."""
    return list(itertools.combinations(properties.items(), 2))


def slow_but(quick: Collection[str], names: Iterable[str], *marks: pytest.MarkDecorator) -> list[Any]:
    """Mark all names but the quick ones as slow, for `parametrize`, and those with the given marks."""
    return [pytest.param(name, marks=marks if name in quick else [pytest.mark.slow]) for name in names]


def skip_without_gptqmodel() -> None:
    """Skip a test that loads a GPTQ checkpoint where gptqmodel is not installed, as with the oldest torch."""
    if not is_installed("gptqmodel"):
        pytest.skip("needs gptqmodel")
