"""The output head in int8: its bytes, its logits, and what it is refused for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from langchain_quantllm import QuantizedHuggingFaceLLM, Server, estimate_memory
from langchain_quantllm.cli import app
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from langchain_quantllm.loading import registry
from langchain_quantllm.loading.output_head import quantize_head
from tests.support.families import FAST, family_model
from tests.support.selection import slow_but

CASTING = ("hy_v4", "mamba", "mamba2", "falcon_mamba")
"""Families whose forward casts the last hidden states to the dtype of the head's weight."""


def llm_of(folder: Path, quantization: str = "none", **fields: Any) -> QuantizedHuggingFaceLLM:
    return QuantizedHuggingFaceLLM(model_id=str(folder), quantization=quantization, max_new_tokens=2, **fields)


def head_of(llm: QuantizedHuggingFaceLLM) -> Any:
    return llm.pipeline.model.get_output_embeddings()


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_the_head_alone_changes(tiny: Path, quantization: str) -> None:
    own, llm = (llm_of(tiny, quantization, lm_head_dtype=dtype) for dtype in ("auto", "int8"))
    for one in (own, llm):
        one.memory_report()  # loads
    plain, quantized = head_of(own), head_of(llm)
    assert quantized.weight.dtype == torch.int8
    rows = quantized.weight.float() * quantized.weight.SCB[:, None] / 127
    largest = plain.weight.float().abs().amax(1, keepdim=True)
    assert ((rows - plain.weight.float()).abs() <= largest / 127 * 0.51).all()
    others = [{n: p for n, p in m.pipeline.model.named_parameters() if "lm_head" not in n} for m in (own, llm)]
    assert all(torch.equal(p.data, others[1][n].data) for n, p in others[0].items())
    assert llm.invoke("a b c")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_its_bytes_are_estimated_and_reported(tiny: Path, quantization: str) -> None:
    llm = llm_of(tiny, quantization, lm_head_dtype="int8")
    estimate = estimate_memory(str(tiny), quantization, lm_head_dtype="int8")
    assert llm.memory_report().weights == estimate.weights
    assert llm.invoke("a")
    vocab, hidden = llm.pipeline.model.get_input_embeddings().weight.shape
    plain = estimate_memory(str(tiny), quantization)
    assert estimate.weights.quantized_bytes == plain.weights.quantized_bytes + vocab * hidden + 4 * vocab
    shared = llm.pipeline.model.config.tie_word_embeddings
    assert estimate.weights.unquantized_bytes == plain.weights.unquantized_bytes - (
        0 if shared else vocab * hidden * torch.finfo(getattr(torch, estimate.dtype)).bits // 8
    )
    assert estimate.bytes_by_scheme["nf4"] == estimate_memory(str(tiny), "nf4", lm_head_dtype="int8").total_bytes


@pytest.mark.parametrize("name", slow_but(["llama", "gemma2", "mamba"], list(FAST)))
def test_families_write_with_it(name: str) -> None:
    model = family_model(FAST[name])
    ids = torch.tensor([[5, 9, 33, 7]])
    with torch.no_grad():
        expected = model(ids).logits.float()
        if name in CASTING:
            with pytest.raises(UnsupportedError, match="casts what goes into its output head"):
                quantize_head(model)
            assert torch.equal(model(ids).logits.float(), expected)
            return
        quantize_head(model)
        found = model(ids).logits.float()
    assert 0 < (found - expected).norm() / expected.norm() < 0.03


def test_models_with_another_head_are_others(tiny: Path) -> None:
    one, other, same = (llm_of(tiny, lm_head_dtype=dtype) for dtype in ("auto", "int8", "int8"))
    for llm in (one, other, same):
        llm.invoke("a")
    assert other.pipeline.model is same.pipeline.model is not one.pipeline.model
    assert one._identifying_params.get("lm_head_dtype") is None
    assert other._identifying_params["lm_head_dtype"] == "int8"


def test_wrong_values_are_refused_before_anything_is_loaded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "load_pipeline", lambda *_: pytest.fail("weights were read"))
    for make in (
        lambda: QuantizedHuggingFaceLLM(model_id=str(tiny), lm_head_dtype="int4"),
        lambda: estimate_memory(str(tiny), lm_head_dtype="int4"),
    ):
        with pytest.raises(InvalidOptionError, match="lm_head_dtype='int4' is not known; did you mean 'int8'"):
            make()
    with pytest.raises(InvalidOptionError, match="does not take lm_head_dtype='int8', as it loads the weights itself"):
        QuantizedHuggingFaceLLM(model_id=str(tiny), engine=Server("http://localhost:1/v1"), lm_head_dtype="int8")


def test_a_head_of_another_kind_is_refused() -> None:
    model = family_model(FAST["llama"])
    model.lm_head = torch.nn.Identity()
    with pytest.raises(UnsupportedError, match="its output head is no plain linear layer"):
        quantize_head(model)


def test_a_model_that_casts_to_the_heads_dtype_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family_model(FAST["mamba"]).save_pretrained(tmp_path)
    monkeypatch.setattr(registry, "load_pipeline", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UnsupportedError, match="lm_head_dtype='int8' is not possible for this model, as it casts"):
        llm_of(tmp_path, lm_head_dtype="int8").invoke("a")
    with pytest.raises(UnsupportedError, match="as it casts"):
        estimate_memory(str(tmp_path), lm_head_dtype="int8")


def test_the_memory_command_counts_it(tiny: Path) -> None:
    plain, int8 = (
        CliRunner().invoke(app, ["memory", str(tiny), "--lm-head-dtype", dtype]) for dtype in ("auto", "int8")
    )
    assert plain.exit_code == int8.exit_code == 0
    assert plain.output != int8.output
    assert CliRunner().invoke(app, ["memory", str(tiny), "--lm-head-dtype", "int4"]).exit_code == 1
