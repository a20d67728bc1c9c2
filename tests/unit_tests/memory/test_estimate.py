"""Estimates of memory compared with loaded models and filled caches, and the check that a model fits."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    ViTConfig,
)

from langchain_quantllm.compat.transformers_models import cache_name
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    ModelNotFoundError,
    NotEnoughMemoryError,
    UnsupportedError,
)
from langchain_quantllm.memory import WeightBytes, check_fits, estimate_memory, weights_by_kind
from langchain_quantllm.schemes import GPTQ, NF4, SCHEMES, Int8, Scheme
from tests.support.gptq_checkpoints import make_gptq_checkpoint
from tests.support.memory import MB, TINY, load_model, save_tiny
from tests.support.selection import slow_but

SCHEME_NAMES = ["none", "int8", "nf4", "nf4-double", "fp4"]
LLAMA_2_7B = LlamaConfig(max_position_embeddings=4096, dtype="float16")  # the defaults are those of the 7B model
LLAMA_2_7B_PARAMETERS = 6_738_415_616


def assert_estimated(estimated: WeightBytes, loaded: WeightBytes) -> None:
    """3% is what the estimate promises; the formulas of today's formats are exact."""
    assert loaded.total_bytes > 0
    assert estimated.total_bytes == pytest.approx(loaded.total_bytes, rel=0.03)
    assert estimated.quantized_bytes == pytest.approx(loaded.quantized_bytes, rel=0.03)
    assert estimated.unquantized_bytes == pytest.approx(loaded.unquantized_bytes, rel=0.03)
    assert estimated.buffers_bytes == pytest.approx(loaded.buffers_bytes, rel=0.03)


class TestEstimate:
    @pytest.mark.parametrize("name", slow_but(("none", "int8", "nf4"), SCHEME_NAMES, pytest.mark.compat))
    def test_smollm2_as_loaded(self, smollm2: Path, name: str) -> None:
        estimate = estimate_memory(str(smollm2), name)
        assert estimate.dtype == "bfloat16"
        assert estimate.scheme == SCHEMES[name]
        assert estimate.parameters == 134_515_008
        assert_estimated(estimate.weights, weights_by_kind(load_model(smollm2, SCHEMES[name])))
        assert estimate.total_bytes == estimate.bytes_by_scheme[name]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["none", "int8", "nf4"])
    def test_qwen_as_loaded(self, qwen_coder: Path, name: str) -> None:
        assert_estimated(
            estimate_memory(str(qwen_coder), name).weights, weights_by_kind(load_model(qwen_coder, SCHEMES[name]))
        )

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_dtype_as_loaded(self, tmp_path: Path, dtype: str) -> None:
        folder = save_tiny(tmp_path, attention_bias=True)
        estimate = estimate_memory(str(folder), "int8", dtype=getattr(torch, dtype))
        assert estimate.dtype == dtype
        assert estimate.weights == weights_by_kind(load_model(folder, SCHEMES["int8"], dtype))

    @pytest.mark.parametrize(
        "scheme",
        [
            NF4(storage_dtype="bfloat16"),
            NF4(skip_modules=("lm_head", "down_proj"), double_quantization=True),
            Int8(skip_modules=("lm_head", "model.layers.1")),
        ],
        ids=lambda s: s.name,
    )
    @pytest.mark.parametrize("tied", [False, True])
    def test_options_as_loaded(self, tmp_path: Path, scheme: Scheme, tied: bool) -> None:
        folder = save_tiny(tmp_path, tie_word_embeddings=tied)
        assert estimate_memory(str(folder), scheme).weights == weights_by_kind(load_model(folder, scheme))

    def test_conv1d_and_odd_shapes_as_loaded(self, tmp_path: Path) -> None:
        config = GPT2Config(vocab_size=101, n_embd=60, n_layer=1, n_head=2, n_positions=64, dtype="bfloat16")
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        estimate = estimate_memory(str(tmp_path), "nf4-double")
        assert estimate.context_tokens == 64
        assert estimate.weights == weights_by_kind(load_model(tmp_path, SCHEMES["nf4-double"]))

    def test_modules_kept_in_float32_as_loaded(self, tmp_path: Path) -> None:
        """T5 keeps `wo` in float32 when the rest is float16."""
        config = T5Config(vocab_size=256, d_model=64, d_kv=32, num_heads=2, d_ff=128, num_layers=2)
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
        assert {p.dtype for p in loaded.parameters()} == {torch.float16, torch.float32}
        assert estimate_memory(str(tmp_path), dtype="float16").weights == weights_by_kind(loaded)

    def test_llama_2_7b_by_arithmetic(self) -> None:
        estimate = estimate_memory(LLAMA_2_7B, "nf4")
        assert estimate.parameters == LLAMA_2_7B_PARAMETERS
        buffers_bytes = 2 * 64 * 4  # the rotary frequencies, kept twice
        assert estimate.bytes_16bit == 2 * LLAMA_2_7B_PARAMETERS + buffers_bytes
        linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
        quantized_bytes = linears // 2 + 4 * linears // 64 + 32 * 7 * 16 * 4
        unquantized_bytes = 2 * (LLAMA_2_7B_PARAMETERS - linears)
        assert estimate.weights.quantized_bytes == quantized_bytes
        assert estimate.weights.unquantized_bytes == unquantized_bytes
        assert estimate.total_bytes == quantized_bytes + unquantized_bytes + buffers_bytes
        assert estimate.saving == pytest.approx(1 - estimate.total_bytes / (2 * LLAMA_2_7B_PARAMETERS), abs=1e-6)
        token_bytes = 2 * 32 * 4096 * 2
        assert estimate.kv_cache_bytes_per_token == token_bytes
        assert estimate.context_tokens == 4096
        assert estimate.total_with_cache_bytes(1000, batch=3) == estimate.total_bytes + 3000 * token_bytes

    def test_llama_2_7b_orders_the_schemes(self) -> None:
        totals = estimate_memory(LLAMA_2_7B).bytes_by_scheme
        assert totals["none"] > totals["int8"] > totals["nf4"] > totals["nf4-double"]
        assert totals["none"] == 2 * LLAMA_2_7B_PARAMETERS + 512
        assert "gptq" not in totals

    @pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, -1), (3, 32)])
    def test_gptq_as_in_the_checkpoint(self, smollm2: Path, tmp_path: Path, bits: int, group_size: int) -> None:
        """All tensors of a GPTQ checkpoint are held as they are stored; only buffers come on top."""
        make_gptq_checkpoint(smollm2, tmp_path, bits=bits, group_size=group_size, small=True)
        estimate = estimate_memory(str(tmp_path))
        assert estimate.scheme == GPTQ(bits=bits, group_size=group_size, sym=True, desc_act=False)
        assert estimate.bytes_by_scheme == {}
        stored_bytes = (tmp_path / "model.safetensors").stat().st_size
        weights_bytes = estimate.total_bytes - estimate.weights.buffers_bytes
        assert weights_bytes == pytest.approx(stored_bytes, abs=8192)  # the header of the file
        assert estimate.weights.quantized_bytes > 0

    @pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="needs gptqmodel")
    def test_gptq_as_loaded(self, smollm2: Path, tmp_path: Path) -> None:
        """In a process of its own: importing gptqmodel changes the logging and the environment."""
        make_gptq_checkpoint(smollm2, tmp_path, small=True)
        code = f"""
import json, torch
from transformers import AutoModelForCausalLM
from langchain_quantllm.memory import weights_by_kind
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, device_map="cpu", dtype=torch.float16)
print(json.dumps(weights_by_kind(model).to_dict()))
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        loaded = json.loads(done.stdout.splitlines()[-1])
        del loaded["total_bytes"]
        assert_estimated(estimate_memory(str(tmp_path)).weights, WeightBytes(**loaded))

    def test_prequantized_checkpoint_as_loaded(self, tmp_path: Path) -> None:
        plain = save_tiny(tmp_path / "plain")
        load_model(plain, NF4(double_quantization=True)).save_pretrained(tmp_path / "nf4")
        estimate = estimate_memory(str(tmp_path / "nf4"))
        assert estimate.scheme.name == "nf4"
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map="cpu")
        assert estimate.weights == weights_by_kind(loaded)
        assert estimate_memory(str(tmp_path / "nf4"), "nf4").weights == estimate.weights
        with pytest.raises(CheckpointError, match="already quantized with 'nf4'"):
            estimate_memory(str(tmp_path / "nf4"), "int8")

    def test_the_config_stays_unchanged(self) -> None:
        config = LlamaConfig(**TINY, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64})
        before = config.to_dict()
        assert estimate_memory(config, dtype="float16").scheme.name == "gptq"
        assert config.to_dict() == before

    def test_wrong_models_schemes_and_dtypes_are_refused(self, tmp_path: Path) -> None:
        config = LlamaConfig(**TINY)
        with pytest.raises(ModelNotFoundError, match="no-such-model"):
            estimate_memory(str(tmp_path / "no-such-model"))
        with pytest.raises(InvalidOptionError, match="did you mean 'nf4'"):
            estimate_memory(config, "nf44")
        with pytest.raises(InvalidOptionError, match="dtype='int8'"):
            estimate_memory(config, dtype="int8")
        with pytest.raises(UnsupportedError, match="'vit'"):
            estimate_memory(ViTConfig())
        (tmp_path / "config.json").write_text('{"model_type": "not-yet-invented"}')
        with pytest.raises(UnsupportedError, match="not-yet-invented"):
            estimate_memory(str(tmp_path))
        with pytest.raises(UnsupportedError, match="'hqq'"):
            estimate_memory(LlamaConfig(**TINY, quantization_config={"quant_method": "hqq", "bits": 4}))
        with pytest.raises(CheckpointError, match="4 bits"):
            estimate_memory(LlamaConfig(**TINY, quantization_config={"quant_method": "gptq", "bits": 4}), GPTQ(bits=8))

    def test_a_config_gives_the_estimate_of_its_folder(self, smollm2: Path) -> None:
        config = AutoConfig.from_pretrained(smollm2)
        assert estimate_memory(config, "fp4").total_bytes == estimate_memory(str(smollm2), "fp4").total_bytes


class TestCache:
    @pytest.mark.parametrize(
        "config",
        [
            LlamaConfig(**TINY),
            GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=2, dtype="float32"),
            Gemma3TextConfig(**{**TINY, "num_hidden_layers": 7}, sliding_window=16, sliding_window_pattern=6),
        ],
        ids=lambda c: c.model_type,
    )
    def test_cache_is_as_large_as_a_filled_one(self, config: Any) -> None:
        estimate = estimate_memory(config)
        model = AutoModelForCausalLM.from_config(config).eval()
        cache = DynamicCache(config=config)
        with torch.no_grad():
            model(input_ids=torch.ones((3, 40), dtype=torch.long), use_cache=True, **{cache_name(model): cache})
        filled_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        # transformers keeps one token less than the window in a sliding layer, until the next token comes
        windows = 3 * estimate.sliding_bytes_per_token
        assert estimate.kv_cache_bytes(40, batch=3) == pytest.approx(filled_bytes, abs=windows)

    def test_numbers_must_not_be_negative(self) -> None:
        with pytest.raises(InvalidOptionError, match="tokens=-1"):
            estimate_memory(LlamaConfig(**TINY)).kv_cache_bytes(-1)


class TestFit:
    def test_a_model_that_fits_leaves_the_rest_free(self) -> None:
        estimate = estimate_memory(LlamaConfig(**TINY))
        left_bytes = check_fits(estimate, ["cpu"], max_memory={"cpu": "10MB"}, tokens=100, batch=2)
        assert left_bytes == 10 * MB - estimate.total_with_cache_bytes(100, batch=2)
        assert check_fits(estimate, ["cpu"]) > 0

    def test_names_the_schemes_that_fit(self) -> None:
        with pytest.raises(NotEnoughMemoryError) as caught:
            check_fits(estimate_memory(LLAMA_2_7B), ["cpu"], max_memory={"cpu": "8GB"})
        message = str(caught.value)
        assert "needs 13.5 GB for its weights" in message
        assert "8.00 GB on cpu" in message
        assert "'int8' (7.01 GB) or 'nf4' (4.17 GB)" in message
        assert "'none'" in message.split(";")[0]

    def test_advice_where_no_scheme_fits(self) -> None:
        estimate = estimate_memory(LLAMA_2_7B, "nf4")
        with pytest.raises(NotEnoughMemoryError, match=r"take a smaller model\.$"):
            check_fits(estimate, ["cpu"], max_memory={"cpu": "1GB"})
        with pytest.raises(NotEnoughMemoryError, match=r"8 x 4096 tokens.*hold fewer tokens"):
            check_fits(estimate, ["cpu"], max_memory={"cpu": "6GB"}, tokens=4096, batch=8)
        with pytest.raises(InvalidOptionError, match="'much'"):
            check_fits(estimate, ["cpu"], max_memory={"cpu": "much"})


def test_a_scheme_of_other_models_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="for models of type gpt_oss, and 'llama' is of type 'llama'"):
        estimate_memory(LLAMA_2_7B, "mxfp4")
