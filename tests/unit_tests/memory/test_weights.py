"""Bytes of weights by kind, measured on modules of known sizes and on loaded models."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

from langchain_quantllm.memory import estimate_memory, track_memory, weights_by_kind
from langchain_quantllm.schemes import SCHEMES
from tests.support.memory import load_model, save_tiny


class TestWeights:
    def test_plain_modules_by_arithmetic(self) -> None:
        module = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.BatchNorm1d(20))
        weights = weights_by_kind(module)
        assert weights.unquantized_bytes == 4 * (200 + 20 + 20 + 20)
        assert weights.buffers_bytes == 4 * (20 + 20) + 8
        assert weights.quantized_bytes == 0
        # seven tensors: 800, 80, 80, 80 and 80, 80, 8 bytes, in blocks of 512
        assert weights.cuda_bytes == 8 * 512

    def test_shared_memory_counts_once(self) -> None:
        first, second = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)
        second.weight = first.weight
        both = torch.nn.Sequential(first, second)
        assert weights_by_kind(both).total_bytes == 64 * 64 * 4
        whole = torch.zeros(128, 64)
        first.weight, second.weight = torch.nn.Parameter(whole[:64]), torch.nn.Parameter(whole[64:])
        both.register_buffer("whole", whole)
        assert weights_by_kind(both).total_bytes == whole.nbytes

    def test_offloaded_parameters_stand_apart(self) -> None:
        weights = weights_by_kind(torch.nn.Linear(16, 16, device="meta"))
        assert weights.total_bytes == 0
        assert weights.offloaded_bytes == 4 * (16 * 16 + 16)

    @pytest.mark.parametrize("name", ["int8", "nf4-double"])
    def test_state_stays_counted_after_a_forward(self, tmp_path: Path, name: str) -> None:
        """bitsandbytes moves its state from the parameter to the module in the first forward."""
        model = load_model(save_tiny(tmp_path), SCHEMES[name], "float16")
        before = weights_by_kind(model)
        with torch.no_grad():
            model(input_ids=torch.ones((1, 4), dtype=torch.long))
        after = weights_by_kind(model)
        assert before.quantized_bytes > 0
        # 10%: where the CPU has AVX512-BF16, the first forward repacks 4-bit weights and their scales
        assert after.quantized_bytes == pytest.approx(before.quantized_bytes, rel=0.1)
        assert after.unquantized_bytes == before.unquantized_bytes

    @pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
    def test_torchao_weights_are_counted_by_their_inner_tensors(self, tmp_path: Path) -> None:
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig(version=2))
        model = AutoModelForCausalLM.from_pretrained(
            save_tiny(tmp_path), dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
        )
        linears = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
        rows = 2 * (2 * 128 + 2 * 64 + 2 * 256 + 128)
        # int8 weights, and a float32 scale and an int8 zero point for each row
        assert weights_by_kind(model).quantized_bytes == linears + 5 * rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["none", "int8", "nf4", "nf4-double"])
def test_kinds_sum_to_what_the_allocator_counts(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tmp_path, vocab_size=32000, hidden_size=2048, intermediate_size=5632, head_dim=512)
    gc.collect()
    torch.cuda.empty_cache()
    torch.zeros(1, device="cuda")  # the context and its statistics
    start_bytes = torch.cuda.memory_stats()["requested_bytes.all.current"]
    with track_memory(["cuda:0"]) as tracked:
        model = load_model(folder, SCHEMES[name], device="cuda:0")
        gc.collect()
    requested_bytes = torch.cuda.memory_stats()["requested_bytes.all.current"] - start_bytes
    grown_bytes = tracked.after.reading("cuda:0").used_bytes - tracked.before.reading("cuda:0").used_bytes
    weights = weights_by_kind(model)
    # 1%: tables that bitsandbytes makes once in a process
    assert weights.total_bytes == pytest.approx(requested_bytes, rel=0.01)
    # 3%: an unsplit block wastes up to 1 MB, and the tensors of this small model have a few MB; 0.5% for a 7B
    assert weights.cuda_bytes <= grown_bytes
    assert estimate_memory(str(folder), name).total_bytes == pytest.approx(grown_bytes, rel=0.03)
    assert tracked.peak["cuda:0"] >= tracked.after.reading("cuda:0").used_bytes
