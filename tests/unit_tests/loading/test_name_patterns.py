"""Regular expressions in an adapter's config: those that may take forever are refused before they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import CheckpointError
from tests.support.adapters import make_adapter
from tests.support.checkpoints import make_checkpoint


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
