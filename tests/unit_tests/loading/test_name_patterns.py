"""Regular expressions in an adapter's config: those that may take forever are refused before they run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import CheckpointError
from langchain_quantllm.loading.name_patterns import may_take_long
from tests.support.adapters import make_adapter
from tests.support.checkpoints import make_checkpoint

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


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("target_modules", r"(([a-z_.]|\d)+)+!"),
        ("exclude_modules", r"(([a-z_.]|\d)+)+!"),
        ("layers_pattern", [r"(([a-z_.]|\d)+)+!"]),
        ("rank_pattern", {r"(([a-z_.]|\d)+)+!": 4}),
        ("alpha_pattern", {r"(([a-z_.]|\d)+)+!": 4}),
        ("modules_to_save", [r"(([a-z_.]|\d)+)+!"]),
    ],
)
def test_an_adapter_with_one_is_refused(option: str, value: Any, tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", seed=1)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps({**config, option: value}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{option}=.*may take forever"):
        QuantizedHuggingFaceLLM(model_id=str(base), adapter=str(adapter), progress=False).load()
