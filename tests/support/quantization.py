"""Texts and options for the tests of quantization."""

from __future__ import annotations

from typing import Any

from langchain_quantllm.quantization.solver import Rounding

TEXTS = [
    "The river had risen in the night, and the bridge stood in brown water up to its rails.",
    "A function that calls itself needs a case in which it does not.",
    "Bread needs flour, water, salt and time; of these, time is what most people leave out.",
]


def rounding(**options: Any) -> Rounding:
    given: dict[str, Any] = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "damping": 0.01}
    return Rounding(**{**given, **options})
