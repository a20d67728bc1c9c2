"""The memory of mixtures of experts: estimates are what is measured once they are loaded, experts by themselves."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from langchain_quantllm import Int8, QuantizedHuggingFaceLLM
from langchain_quantllm.memory import WeightBytes, estimate_memory, weights_by_kind
from langchain_quantllm.schemes import SCHEMES
from tests.support.checkpoints import make_tokenizer, quicken
from tests.support.mixtures import make_mixture, mixture_config
from tests.unit_tests.memory.test_estimate import assert_estimated

GB = 10**9


@pytest.fixture(scope="module", autouse=True)
def quick() -> None:
    quicken()


def save_mixture(kind: str, folder: Path) -> Path:
    make_mixture(kind, dtype=torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def loaded_weights(folder: Path, scheme: Any) -> tuple[WeightBytes, str]:
    llm = QuantizedHuggingFaceLLM(model_id=str(folder), quantization=scheme, progress=False).load()
    return weights_by_kind(llm.pipeline.model), repr(llm.memory_report())


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("qwen3_moe", "nf4"),
        ("qwen3_moe", "nf4-double"),
        ("qwen3_moe", "int8"),
        ("mixtral", "nf4"),
        ("mixtral", "none"),
        ("gpt_oss", "fp4-double"),
        ("gpt_oss", "int8"),
        ("nemotron_h", "nf4"),
    ],
)
def test_the_estimate_of_a_mixture_is_what_is_loaded(tmp_path: Path, kind: str, scheme: str) -> None:
    save_mixture(kind, tmp_path)
    estimate = estimate_memory(str(tmp_path), scheme)
    loaded, report = loaded_weights(tmp_path, scheme)
    assert_estimated(estimate.weights, loaded)
    assert loaded.experts_bytes > 0
    assert estimate.weights.experts_bytes == pytest.approx(loaded.experts_bytes, rel=0.03)
    assert " experts" in report
    assert "are not quantized" not in report


def test_experts_that_stay_unquantized_count_so_and_the_report_has_the_reason(tmp_path: Path) -> None:
    save_mixture("qwen3_moe", tmp_path)
    scheme = Int8(skip_modules=("experts",))
    estimate = estimate_memory(str(tmp_path), scheme)
    loaded, report = loaded_weights(tmp_path, scheme)
    assert_estimated(estimate.weights, loaded)
    assert loaded.experts_bytes == estimate_memory(str(tmp_path), "none").weights.experts_bytes
    assert "The experts of 2 layers are not quantized" in report


@pytest.mark.parametrize(("kind", "options"), [("llama4", {}), ("qwen3_moe", {"moe_intermediate_size": 30})])
def test_experts_that_cannot_be_quantized_are_estimated_as_they_are(kind: str, options: dict[str, Any]) -> None:
    config = mixture_config(kind, dtype="bfloat16", **options)
    plain, quantized = (estimate_memory(config, scheme).weights for scheme in ("none", "nf4"))
    assert quantized.experts_bytes == plain.experts_bytes > 0
    assert quantized.quantized_bytes > 0


def qwen3_30b_a3b() -> Any:
    """Make the config of Qwen3-30B-A3B."""
    return AutoConfig.for_model(
        "qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip


def test_a_large_mixture_by_its_shapes_alone() -> None:
    estimate = estimate_memory(qwen3_30b_a3b(), "nf4")
    experts = 48 * 128 * 3 * 768 * 2048
    assert estimate.parameters == pytest.approx(30.53e9, rel=0.001)
    assert estimate.weights.experts_bytes == pytest.approx(experts * (0.5 + 4 / 64), rel=0.001)
    assert estimate.total_bytes < 18.5 * GB
    assert estimate_memory(qwen3_30b_a3b(), "nf4-double").total_bytes < 17 * GB
    assert estimate.bytes_16bit > 61 * GB
    gc.collect()


def test_every_scheme_is_smaller_than_16_bits() -> None:
    sizes = estimate_memory(mixture_config("gpt_oss", dtype="bfloat16")).bytes_by_scheme
    assert set(sizes) == {name for name, scheme in SCHEMES.items() if not scheme.calibrated}
    assert max(sizes["nf4"], sizes["nf4-double"]) < sizes["int8"] < sizes["none"]
