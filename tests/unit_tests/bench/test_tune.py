"""`bench --tune`: what it measures of a model, where it refuses, and on a GPU what it leaves for the next engine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench.subjects import Subject
from langchain_quantllm.bench.tune import Tuner, products_of, tune, unsupported_device
from langchain_quantllm.cli import app
from langchain_quantllm.engine.fusion.fuse import LINEAR, Fusion
from langchain_quantllm.kernels import reference
from langchain_quantllm.kernels.linear import reference as linear_reference
from langchain_quantllm.kernels.linear.tuned import Product, gpu_of, read_table
from tests.support.bench import bench

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_without_a_gpu_it_says_so_before_weights_are_loaded(tmp_path: Path, tuned_folder: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").touch()  # whatever reads it, fails
    result = bench(tmp_path, "--tune")
    assert result.exit_code == 2
    assert result.stderr == "error: --tune measures kernels of CUDA GPUs, and cpu is none; leave it out.\n"
    if not torch.cuda.is_available():
        assert "there is none here" in (unsupported_device(None) or "")
        assert "there is none here" in (unsupported_device("cuda:0") or "")


def test_it_is_one_of_several_benches() -> None:
    result = bench("--shape", "tiny", "--tune", "--speed")
    assert result.exit_code == 1
    assert "--speed and --tune are 2 benches" in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_products_are_those_of_the_fused_steps(tiny: str) -> None:
    llm = QuantizedHuggingFaceLLM(model_id=tiny, quantization="int8", device="cpu", progress=False)
    model = llm.load().pipeline.model
    fusion = Fusion(model, kernels=reference, linear_kernels=linear_reference, kinds=(LINEAR,))
    found = products_of(fusion.steps.values(), torch.bfloat16)
    fusion.close()
    shapes = {(256, 768): [256] * 3, (256, 256): [256], (256, 1024): [512] * 2, (512, 256): [256]}
    assert {product: [[w.out_features for w in group] for group in groups] for product, groups in found.items()} == {
        Product("int8", inputs, outputs, "bfloat16"): [widths] * 2  # of two layers
        for (inputs, outputs), widths in shapes.items()
    }
    assert len({w.words.data_ptr() for groups in found.values() for group in groups for w in group}) == 14
    llm.unload()


def test_doctor_has_a_column_for_it() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "tuned" in result.stdout


@pytest.mark.gpu
@needs_gpu
def test_a_tuned_model_is_measured_and_the_table_is_used(tiny: str, tuned_folder: Path) -> None:
    lines: list[str] = []
    subject = Subject(label="nf4", model_id=tiny, quantization="nf4")
    found = tune([subject], device="cuda:0", limit_s=60, report=lines.append)
    assert found.failures == {}
    assert found.entries
    assert len(lines) >= len(found.entries)
    assert found.file.parent == tuned_folder
    assert json.loads(found.file.read_text())["device"] == torch.cuda.get_device_name(0)
    llm = QuantizedHuggingFaceLLM(model_id=tiny, quantization="nf4", device="cuda:0", progress=False)
    assert llm.invoke("a", max_new_tokens=2, ignore_eos=True) is not None
    assert "were measured on this kind of GPU" in (llm.engine_info.tuned or "")
    llm.unload()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_the_next_engine_writes_the_same_by_other_configs(tiny: str, tuned_folder: Path, scheme: str) -> None:
    fields = {"model_id": tiny, "quantization": scheme, "device": "cuda:0", "dtype": "float32", "progress": False}
    fields |= {"max_new_tokens": 24, "ignore_eos": True}
    prompts = ["a", "some text", "another one that is longer"]
    llm = QuantizedHuggingFaceLLM(**fields)
    expected = [llm.invoke(prompts[0]), *llm.batch(prompts)]
    assert llm.engine_info.tuned is None
    llm.unload()
    llm = QuantizedHuggingFaceLLM(**fields)
    model = llm.load().pipeline.model
    fusion = Fusion(model, kinds=(LINEAR,))
    gpu = gpu_of(torch.device("cuda:0"))
    assert gpu is not None
    # As if more splits were always faster, so that the configs are others than the rule's.
    tuner = Tuner(
        gpu, report=lambda _: None, rows=(1, 4, 16), time_us=lambda calls: 10 / calls[0].keywords["config"].splits
    )  # type: ignore[attr-defined]
    tuner.run(products_of(fusion.steps.values(), model.dtype))
    fusion.close()
    llm.unload()
    table = read_table(gpu)
    assert table is not None
    assert any(entry.config is not None for entry in table.entries.values())
    llm = QuantizedHuggingFaceLLM(**fields)
    assert [llm.invoke(prompts[0]), *llm.batch(prompts)] == expected
    assert llm.engine_info.tuned is not None
    llm.unload()
