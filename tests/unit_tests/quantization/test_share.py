"""The share of a model that `quantize` quantizes: it is in the result, and a mixture of experts is told."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from langchain_quantllm import GPTQ, NF4, QuantizedHuggingFaceLLM, quantize
from langchain_quantllm.errors import CheckpointError, UnsupportedError
from tests.support.checkpoints import SIZES, edit_json, make_checkpoint, make_tokenizer, quicken

MIXTURE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quicken()
    return make_checkpoint(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**{**SIZES, **MIXTURE})
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def share(folder: Path) -> float:
    """Compute the share of the linear layers of attention and dense MLPs, by the names in a checkpoint's file."""
    sizes = {name: tensor.numel() for name, tensor in load_file(folder / "model.safetensors").items()}
    linear = [n for n in sizes if n.endswith("_proj.weight") and "expert" not in n]
    return sum(sizes[n] for n in linear) / sum(sizes.values())


@pytest.mark.parametrize(("scheme", "calibration"), [("nf4", None), ("int8", None), (GPTQ(group_size=32), "none")])
def test_a_dense_model(
    dense: Path, tmp_path: Path, scheme: Any, calibration: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        done = quantize(dense, scheme, calibration, tmp_path / "output", progress=False)
    assert done.quantized_share == pytest.approx(share(dense))
    assert "experts" not in caplog.text


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_mixture_of_experts(mixture: Path, tmp_path: Path, scheme: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        done = quantize(mixture, scheme, output=tmp_path / "output", progress=False)
    assert done.quantized_share == pytest.approx(share(mixture), abs=0.02)
    assert done.quantized_share < 0.3
    [said] = [r.getMessage() for r in caplog.records if "experts" in r.getMessage()]
    assert f"Only {100 * done.quantized_share:.0f}% of the weights are quantized" in said


def test_nothing_to_quantize(dense: Path, tmp_path: Path) -> None:
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    with pytest.raises(UnsupportedError, match="no linear layer that nf4 quantizes: 0%"):
        quantize(dense, NF4(skip_modules=layers), output=tmp_path / "output", progress=False)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_experts_that_older_transformers_quantized_one_by_one(mixture: Path, tmp_path: Path, scheme: str) -> None:
    """Their packed weights would be put together, and their scales be dropped."""
    from bitsandbytes import functional

    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(mixture / "model.safetensors").items():
        if "experts." not in name:
            tensors[name] = tensor
        elif scheme == "int8":
            layer = name.removesuffix(".weight")
            tensors[name], tensors[f"{layer}.SCB"], _ = functional.int8_vectorwise_quant(tensor)
            tensors[f"{layer}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        else:
            tensors[name], state = functional.quantize_4bit(tensor, quant_type="nf4")
            tensors |= {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    for file in mixture.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(
        {n: t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    config = {"quant_method": "bitsandbytes", "load_in_8bit": scheme == "int8", "load_in_4bit": scheme == "nf4"}
    edit_json(tmp_path / "config.json", quantization_config={**config, "bnb_4bit_quant_type": "nf4"})
    assert any(".experts.0." in name for name in tensors), json.dumps(list(tensors))
    with pytest.raises(CheckpointError, match="transformers 4 quantized expert by expert") as caught:
        QuantizedHuggingFaceLLM(model_id=str(tmp_path), progress=False).load()
    assert "\n" not in str(caught.value)
