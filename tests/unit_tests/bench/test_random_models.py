"""Checkpoints of random weights have the tensors of real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from langchain_quantllm.bench.random_models import SHAPES, random_checkpoint
from langchain_quantllm.errors import InvalidOptionError

OSS = {
    "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 512,
}  # fmt: skip


def shapes_in(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping


def test_experts_of_gptq_are_packed_one_by_one(tmp_path: Path) -> None:
    folder = random_checkpoint("tiny-mixture", tmp_path / "packed", gptq=True, layers=1)
    shapes = shapes_in(folder)
    experts = SHAPES["tiny-mixture"]["num_experts"]
    for expert in range(experts):
        path = f"model.layers.0.mlp.experts.{expert}"
        assert shapes[f"{path}.gate_proj.qweight"] == [32, 128]
        assert shapes[f"{path}.up_proj.scales"] == [2, 128]
        assert shapes[f"{path}.down_proj.qweight"] == [16, 256]
    assert shapes["model.layers.0.mlp.gate.weight"] == [experts, 256]
    assert not any("gate_up_proj" in name or ".layers.1." in name for name in shapes)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["bits"] == 4


def test_experts_in_mxfp4_are_blocks_and_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small-oss", {**SHAPES["gpt-oss-20b"], **OSS})
    folder = random_checkpoint("small-oss", tmp_path / "packed", mxfp4=True, layers=1)
    shapes = shapes_in(folder)
    path = "model.layers.0.mlp.experts"
    assert shapes[f"{path}.gate_up_proj_blocks"] == [4, 128, 4, 16]
    assert shapes[f"{path}.gate_up_proj_scales"] == [4, 128, 4]
    assert shapes[f"{path}.down_proj_blocks"] == [4, 128, 2, 16]
    assert shapes[f"{path}.down_proj_bias"] == [4, 128]
    assert f"{path}.down_proj" not in shapes
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"


def test_mxfp4_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptionError, match="gpt-oss-20b"):
        random_checkpoint("tiny", tmp_path, mxfp4=True)
    assert not list(tmp_path.iterdir())
