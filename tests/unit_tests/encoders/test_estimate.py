"""Estimates of encoders compared with what is loaded, from the small files alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import langchain_quantllm
from langchain_quantllm.encoders.estimate import estimate_encoder, find_encoder
from langchain_quantllm.encoders.registry import get_or_load
from langchain_quantllm.encoders.spec import EncoderSpec
from langchain_quantllm.errors import CheckpointError, InvalidOptionError, ModelNotFoundError, UnsupportedError
from langchain_quantllm.memory import MemoryEstimate, WeightBytes
from langchain_quantllm.schemes import SCHEMES
from tests.support.encoder_models import edit_json, minilm, plain_bert, tiny_clip, tiny_embedder, tiny_qwen3_embedder
from tests.support.rerankers import save_cross_encoder, save_late_interaction
from tests.support.speech_models import whisper_model


def estimated(folder: Path, scheme: str | None = None) -> MemoryEstimate:
    spec = EncoderSpec(model_id=str(folder))
    files = find_encoder(spec)
    assert files is not None
    return estimate_encoder(spec, files, scheme)


def loaded(folder: Path, kind: str, scheme: str | None = None) -> tuple[WeightBytes, int]:
    """Load an encoder; return its bytes, and those of the same in 16 bits."""
    asked = None if scheme is None else SCHEMES[scheme]
    encoder = get_or_load(EncoderSpec(model_id=str(folder), kind=kind, scheme=asked, device="cpu", progress=False))
    return encoder.weights, encoder.bytes_16bit


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4", "nf4-double"])
def test_minilm_as_loaded(scheme: str) -> None:
    found = estimated(minilm(), scheme)
    weights, bytes_16bit = loaded(minilm(), "embedding", scheme)
    assert found.total_bytes == weights.total_bytes == found.bytes_by_scheme[scheme]
    assert found.weights.quantized_bytes == weights.quantized_bytes
    assert found.parameters == 22_713_216
    assert found.context_tokens == 256
    assert found.bytes_16bit == pytest.approx(bytes_16bit, rel=0.001)  # buffers are counted in one of them
    assert found.kv_cache_bytes_per_token == 0


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
@pytest.mark.parametrize("kind", ["dense", "qwen3", "clip", "cross_encoder", "late_interaction"])
def test_other_kinds_as_loaded(kind: str, scheme: str, tmp_path: Path) -> None:
    folder = {
        "dense": lambda: tiny_embedder(tmp_path / "m", hidden=64, dense=48),
        "qwen3": lambda: tiny_qwen3_embedder(tmp_path / "m"),
        "clip": lambda: tiny_clip(tmp_path / "m"),
        "cross_encoder": lambda: save_cross_encoder(tmp_path / "m"),
        "late_interaction": lambda: save_late_interaction(tmp_path / "m", tmp_path / "scratch"),
    }[kind]()
    weights, _ = loaded(folder, kind if "_" in kind else "embedding", scheme)
    assert estimated(folder, scheme).total_bytes == weights.total_bytes


@pytest.mark.parametrize("scheme", [None, "int8", "nf4"])
@pytest.mark.parametrize("kind", ["embedding", "plain", "qwen3", "cross_encoder", "late_interaction"])
def test_the_public_function_knows_every_kind_as_the_command_does(
    kind: str, scheme: str | None, tmp_path: Path
) -> None:
    folder = {
        "embedding": lambda: tiny_embedder(tmp_path / "m", hidden=64, dense=48),
        "plain": lambda: plain_bert(tmp_path / "m", hidden=64),
        "qwen3": lambda: tiny_qwen3_embedder(tmp_path / "m"),
        "cross_encoder": lambda: save_cross_encoder(tmp_path / "m"),
        "late_interaction": lambda: save_late_interaction(tmp_path / "m", tmp_path / "scratch"),
    }[kind]()
    found = langchain_quantllm.estimate_memory(str(folder), scheme)
    assert found == estimated(folder, scheme)
    assert found.kv_cache_bytes_per_token == 0


def test_the_public_function_takes_the_dtype_of_an_encoder_and_refuses_calibrated_schemes() -> None:
    in_16_bits = langchain_quantllm.estimate_memory(str(minilm()), "none", dtype="bfloat16")
    in_32_bits = langchain_quantllm.estimate_memory(str(minilm()))
    assert 2 * in_16_bits.weights.unquantized_bytes == in_32_bits.weights.unquantized_bytes
    assert in_16_bits.dtype == "bfloat16"
    with pytest.raises(InvalidOptionError, match="'int8', 'nf4'"):
        langchain_quantllm.estimate_memory(str(minilm()), "gptq")
    with pytest.raises(InvalidOptionError, match="dtype"):
        langchain_quantllm.estimate_memory(str(minilm()), dtype="int3")


def test_the_public_function_estimates_language_models_and_whisper(smollm2: Path, tmp_path: Path) -> None:
    found = langchain_quantllm.estimate_memory(str(smollm2), "nf4")
    assert found.kv_cache_bytes_per_token
    assert langchain_quantllm.estimate_memory(str(whisper_model()), "int8").total_bytes > 0
    with pytest.raises(ModelNotFoundError):
        langchain_quantllm.estimate_memory(str(tmp_path))


def test_no_weights_are_read(tmp_path: Path) -> None:
    for file in [*minilm().rglob("*.json")]:
        target = tmp_path / file.relative_to(minilm())
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    assert estimated(tmp_path, "nf4").total_bytes == estimated(minilm(), "nf4").total_bytes


def test_a_quantized_checkpoint_is_what_it_is(tmp_path: Path) -> None:
    folder = plain_bert(tmp_path / "m", hidden=64)
    whole = estimated(folder)
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    found = estimated(folder)
    assert found.scheme == SCHEMES["int8"]
    assert found.total_bytes < whole.total_bytes
    assert found.bytes_by_scheme == {}
    with pytest.raises(CheckpointError, match="already quantized"):
        estimated(folder, "nf4")


def test_language_models_and_folders_of_nothing_are_no_encoders(smollm2: Path, tmp_path: Path) -> None:
    for folder in (smollm2, tmp_path):
        assert find_encoder(EncoderSpec(model_id=str(folder))) is None


def test_a_sparse_encoder_is_refused(tmp_path: Path) -> None:
    folder = tiny_embedder(tmp_path / "m")
    edit_json(folder / "config_sentence_transformers.json", model_type="SparseEncoder")
    with pytest.raises(UnsupportedError, match="sparse"):
        find_encoder(EncoderSpec(model_id=str(folder)))
