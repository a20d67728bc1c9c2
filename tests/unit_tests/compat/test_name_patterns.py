"""Regular expressions for names of modules: those that may take forever are found before they run."""

from __future__ import annotations

import re

import pytest

from langchain_quantllm.compat.name_patterns import may_take_long

SLOW = [
    r"(a+)+$",
    r"(?:.*)*x",
    r"(a|a)*b",
    r"((a|aa))+b",
    r".*(.*)+x",
    r"([a-z]+){1,50}x",
    r"(\w|\d){2,}x",
    ".*" * 7 + "x",
    "a" * 5_000,
]
FINE = [
    "q_proj",
    r".*\.(q_proj|v_proj)",
    r"model\.layers\.(\d+)\.self_attn\.(q|k|v|o)_proj",
    r"^(?!.*visual).*(?:q_proj|k_proj|gate_proj).*",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj))",
    r"layers\.([0-9]|1[0-5])\.mlp\.(up|down)_proj",
    r"(model\.)?layers\.[*+(|)]\.x",
    r"a\(b+\)*",
]


@pytest.mark.parametrize("pattern", SLOW)
def test_what_may_take_forever_is_found(pattern: str) -> None:
    assert may_take_long(pattern)


@pytest.mark.parametrize("pattern", FINE)
def test_what_people_write_is_not(pattern: str) -> None:
    re.compile(pattern)
    assert not may_take_long(pattern)
