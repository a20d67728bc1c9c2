"""The share of a model that `quantize` quantizes: it is in the result, and experts that stay as they are are told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from langchain_quantllm import GPTQ, NF4, quantize
from langchain_quantllm.errors import UnsupportedError
from tests.support.checkpoints import SIZES, make_checkpoint, make_tokenizer, quicken

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


def share(folder: Path, *, experts: bool = True) -> float:
    """Compute the share of the linear layers of attention and MLPs, by the names in a checkpoint's file."""
    sizes = {name: tensor.numel() for name, tensor in load_file(folder / "model.safetensors").items()}
    linear = [n for n in sizes if n.endswith("_proj.weight") and (experts or "expert" not in n)]
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
    assert done.quantized_share == pytest.approx(share(mixture))
    assert done.quantized_share > 0.6
    assert "experts" not in caplog.text


def test_experts_that_stay_as_they_are(mixture: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        done = quantize(mixture, NF4(skip_modules=["experts"]), output=tmp_path / "output", progress=False)
    assert done.quantized_share == pytest.approx(share(mixture, experts=False), abs=0.02)
    assert done.quantized_share < 0.3
    [said] = [r.getMessage() for r in caplog.records if "experts" in r.getMessage()]
    assert f"Only {100 * done.quantized_share:.0f}% of the weights are quantized" in said


def test_nothing_to_quantize_is_told_before_weights_are_read(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("langchain_quantllm.quantization.writers.load", lambda *_: pytest.fail("weights are read"))
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    with pytest.raises(UnsupportedError, match="no linear layer that nf4 quantizes: 0%"):
        quantize(dense, NF4(skip_modules=layers), output=tmp_path / "output", progress=False)
    assert not (tmp_path / "output").exists()
