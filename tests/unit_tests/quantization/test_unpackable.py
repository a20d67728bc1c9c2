"""Layers that fill no words of 32 bits: left unquantized in the open where they are small, in every format."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from langchain_quantllm import AWQ, GPTQ, Calibration, quantize
from langchain_quantllm.loading.registry import load
from langchain_quantllm.loading.spec import LoadSpec
from tests.support.checkpoints import make_tokenizer
from tests.support.mixtures import make_mixture
from tests.support.quantization import TEXTS
from tests.support.selection import skip_without_gptqmodel

GATE = "mlp.shared_expert_gate"
IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid of two layers whose shared experts have a gate of one output."""
    folder = tmp_path_factory.mktemp("hybrid") / "source"
    make_mixture("qwen3_next", dtype=torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", [GPTQ(bits=4, group_size=32), AWQ(group_size=32)], ids=["gptq", "awq"])
def test_a_gate_of_one_output_is_left_out_and_loads_as_it_is(
    hybrid: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, scheme: Any
) -> None:
    skip_without_gptqmodel()
    texts = Calibration(source=TEXTS, tokens=16)
    with caplog.at_level(logging.WARNING):
        done = quantize(hybrid, scheme, texts, tmp_path / "out", progress=False, device="cpu")
    assert done.left_out_layers == (GATE,)
    assert f"{GATE} (64 x 1)" in caplog.text
    before, after = (load_file(folder / "model.safetensors") for folder in (hybrid, done.folder))
    names = [f"model.layers.{i}.{GATE}" for i in range(2)]
    assert all(torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) for name in names)
    config = json.loads((done.folder / "config.json").read_text())["quantization_config"]
    if scheme.name == "awq":
        assert set(names) < set(config["modules_to_not_convert"])
    else:
        assert GATE not in config["modules_in_block_to_quantize"][0]
        assert "mlp.shared_expert.gate_proj" in config["modules_in_block_to_quantize"][0]
    loaded = load(LoadSpec(model_id=str(done.folder), dtype="float32", progress=False, device_map={"": "cpu"}))
    for name in names:
        gate = loaded.pipeline.model.get_submodule(name)
        assert type(gate) is torch.nn.Linear
        assert torch.equal(gate.weight, before[f"{name}.weight"].float())
    assert bool(loaded.pipeline.model(IDS).logits.isfinite().all())
