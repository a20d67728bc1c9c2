"""`memory` of models that are no language models: encoders, rerankers, Whisper."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig

from langchain_quantllm import QuantizedWhisperParser, estimate_memory
from langchain_quantllm.schemes import SCHEMES
from tests.support.encoder_models import minilm, plain_bert, tiny_qwen3_embedder
from tests.support.rerankers import save_cross_encoder, save_late_interaction
from tests.support.speech_models import whisper_model
from tests.unit_tests.cli.test_cli import call

UNCALIBRATED = [name for name, scheme in SCHEMES.items() if not scheme.calibrated]


def rows(output: str) -> dict[str, list[str]]:
    """The cells of the table by scheme."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in cells}


def test_memory_of_an_embedding_model_lists_16_bits_and_every_scheme() -> None:
    result = call("memory", minilm())
    assert result.exit_code == 0, result.output
    table = rows(result.stdout)
    assert list(table) == ["none (float32)", "none (bfloat16)", *UNCALIBRATED[1:]]
    assert table["none (bfloat16)"][1] == "+0%"
    assert "KV cache" not in result.stdout
    assert "An embedding model: 22,713,216 parameters; it reads 256 tokens of a text." in result.stdout
    assert "int8 would save 10.7 MB more, nf4 12.9 MB." in result.stdout


def test_memory_of_a_large_encoder_advises_to_quantize(tmp_path: Path) -> None:
    transformers.BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, architectures=["BertModel"]
    ).save_pretrained(tmp_path)
    result = call("memory", tmp_path)
    assert result.exit_code == 0, result.output
    assert "A large model: int8 saves " in result.stdout


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("cross_encoder", "A cross-encoder: "),
        ("late_interaction", "A late-interaction model: "),
        ("plain", "An embedding model: "),
        ("qwen3", "An embedding model: "),
    ],
)
def test_memory_names_the_kind_of_encoder(kind: str, named: str, tmp_path: Path) -> None:
    folder = {
        "cross_encoder": lambda: save_cross_encoder(tmp_path / "m"),
        "late_interaction": lambda: save_late_interaction(tmp_path / "m", tmp_path / "scratch"),
        "plain": lambda: plain_bert(tmp_path / "m", hidden=64),
        "qwen3": lambda: tiny_qwen3_embedder(tmp_path / "m"),
    }[kind]()
    result = call("memory", folder)
    assert result.exit_code == 0, result.output
    assert named in result.stdout
    assert set(UNCALIBRATED[1:]) <= set(rows(result.stdout))


def test_memory_of_a_whisper_has_no_kv_cache_and_no_gptq(tmp_path: Path) -> None:
    transformers.WhisperConfig(
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        vocab_size=200,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        architectures=["WhisperForConditionalGeneration"],
    ).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # it has some, and none is read
    result = call("memory", tmp_path)
    assert result.exit_code == 0, result.output
    assert list(rows(result.stdout)) == UNCALIBRATED
    assert "KV cache" not in result.stdout


@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
def test_the_estimate_of_a_whisper_is_what_is_loaded(scheme: str) -> None:
    parser = QuantizedWhisperParser(model=str(whisper_model()), quantization=scheme, device="cpu", progress=False)
    loaded = parser.memory_report().to_dict()["weights"]["total_bytes"]
    parser.unload()
    estimate = estimate_memory(AutoConfig.from_pretrained(whisper_model()), scheme)
    assert estimate.total_bytes == pytest.approx(loaded, rel=0.001)


def test_memory_of_another_kind_of_model_is_an_error(tmp_path: Path) -> None:
    config = transformers.ViTConfig(architectures=["ViTForImageClassification"])
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    result = call("memory", tmp_path)
    assert result.exit_code == 1
    assert "ViTForImageClassification" in result.output
