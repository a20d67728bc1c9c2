"""The choice of a few cases of a large set for `make test`; `make test-all` runs all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import pytest

from langchain_quantllm.compat.packages import is_installed

T = TypeVar("T")

QUICK_FAMILIES = ("llama-grouped", "mistral-window", "qwen3", "gemma2", "phi", "gpt_neox", "gpt2", "opt-350m")
QUICK_FAMILIES += ("falcon-40b", "mixtral", "cohere2", "falcon-alibi", "falcon-eager", "llama-dynamic-rope")
QUICK_FAMILIES += (
    "llama4",
    "gpt_oss",
    "qwen3_next",
    "lfm2",
    "granitemoehybrid",
    "mamba2",
    "deepseek_v3",
    "glm_moe_dsa",
)
"""Families of models with one of each kind of attention, positions, norms, experts, and reasons to be refused."""


def covering(cases: Mapping[str, T], features: Callable[[T], Collection[Hashable]]) -> set[str]:
    """Choose cases greedily until they have all features of all cases."""
    left = {feature for case in cases.values() for feature in features(case)}
    chosen = set()
    while left:
        name = max(cases, key=lambda name: len(left.intersection(features(cases[name]))))
        left.difference_update(features(cases[name]))
        chosen.add(name)
    return chosen


def pairs(properties: Mapping[str, Hashable]) -> list[Hashable]:
    """List all pairs of properties, as features: cases that cover them combine each property with each other one."""
    return list(itertools.combinations(properties.items(), 2))


def slow_but(quick: Collection[str], names: Iterable[str], *marks: pytest.MarkDecorator) -> list[Any]:
    """Make parameters of names: the quick ones with the given marks, all others marked slow."""
    return [pytest.param(name, marks=marks if name in quick else [pytest.mark.slow]) for name in names]


def skip_without_gptqmodel() -> None:
    """Skip a test that loads a GPTQ checkpoint where gptqmodel is not installed, as with the oldest torch."""
    if not is_installed("gptqmodel"):
        pytest.skip("needs gptqmodel")
