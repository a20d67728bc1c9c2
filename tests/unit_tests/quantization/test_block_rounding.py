"""Learned rounding of blocks: nearer to the unquantized model, in the same format, also after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from langchain_quantllm import GPTQ, Calibration, quantize
from langchain_quantllm.loading.registry import load
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.quantization.block_rounding import steps_of
from langchain_quantllm.quantization.calibration import sequences
from langchain_quantllm.quantization.gptq import Progress
from tests.support.checkpoints import make_tokenizer
from tests.support.quantization import TEXTS, dequantized, divergence, written

CALIBRATION = Calibration(source=TEXTS, tokens=16)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("plain") / "model", "qwen2")  # with biases


def run(plain: Path, output: Path, method: str = "autoround", **options: Any) -> Path:
    given = {"calibration": CALIBRATION, "progress": False, "device": "cpu", "method": method}
    return quantize(
        plain, GPTQ(bits=3, group_size=32, **options.pop("scheme", {})), output=output, **given, **options
    ).folder


@pytest.mark.parametrize("scheme", [{}, {"sym": False}, {"desc_act": True}], ids=str)
def test_predictions_come_nearer_than_those_of_the_solver(plain: Path, tmp_path: Path, scheme: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    ids = torch.tensor(sequences(CALIBRATION, TEXTS, make_tokenizer(), None))
    folders = [run(plain, tmp_path / method, method, scheme=dict(scheme)) for method in ("gptq", "autoround")]
    before, after = (divergence(model, dequantized(plain, folder, bits=3), ids) for folder in folders)
    assert after < 0.8 * before
    one, two = (load_file(folder / "model.safetensors") for folder in folders)
    assert {(name, tensor.shape, tensor.dtype) for name, tensor in one.items()} == {
        (name, tensor.shape, tensor.dtype) for name, tensor in two.items()
    }
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in folders]
    assert configs[1].pop("meta")["method"] == "autoround"
    configs[0].pop("meta")
    assert configs[0] == configs[1]


@pytest.mark.parametrize(("batches", "steps"), [(1, 12), (12, 96), (20, 96), (128, 256)])
def test_short_calibrations_are_seen_eight_times_and_long_ones_twice(batches: int, steps: int) -> None:
    assert steps_of(batches) == steps


def test_the_written_folder_computes_with_the_trained_weights(plain: Path, tmp_path: Path) -> None:
    folder = run(plain, tmp_path / "out")
    ids = torch.tensor(sequences(CALIBRATION, TEXTS, make_tokenizer(), None))
    written_nats = divergence(AutoModelForCausalLM.from_pretrained(plain), dequantized(plain, folder, bits=3), ids)
    loaded = load(LoadSpec(model_id=str(folder), device_map={"": "cpu"}))
    try:
        found_nats = divergence(dequantized(plain, folder, bits=3), loaded.pipeline.model, ids)
    finally:
        loaded.close()
    assert found_nats < 0.1 * written_nats  # it computes in bfloat16


def test_blocks_of_a_model_in_float16_are_trained_in_float32(plain: Path, tmp_path: Path) -> None:
    # "cpu:0" stands for a GPU: blocks run in the model's dtype there, where it is not for gradients.
    options: dict[str, Any] = {"calibration": CALIBRATION, "method": "autoround", "dtype": "float16", "progress": False}
    folders = [tmp_path / "single", tmp_path / "half"]
    for folder, device in zip(folders, ("cpu", "cpu:0"), strict=True):
        quantize(plain, GPTQ(bits=3, group_size=32), output=folder, device=device, **options)
    one, two = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_interrupted_run_resumes_after_its_blocks(plain: Path, tmp_path: Path) -> None:
    whole = run(plain, tmp_path / "whole")

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plain, tmp_path / "out", report=stop)
    seen: list[Progress] = []
    again = run(plain, tmp_path / "out", report=seen.append)
    assert [progress.resumed for progress in seen] == [1, 1]
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_experts_of_a_mixture_are_rounded_beside_the_trained_layers(tmp_path: Path) -> None:
    mixture = written(tmp_path / "mixture", "qwen3_moe")
    plain, trained = (load_file(run(mixture, tmp_path / m, m) / "model.safetensors") for m in ("gptq", "autoround"))
    assert plain.keys() == trained.keys()
    name = "model.layers.0.self_attn.o_proj.qweight"
    assert not torch.equal(plain[name], trained[name])
