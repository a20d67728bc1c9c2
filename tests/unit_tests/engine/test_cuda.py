"""Models on a CUDA GPU: devices, memory, offloading. On other machines these tests are skipped."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from langchain_quantllm import GPTQ, NF4, Calibration, Int8, QuantizedHuggingFaceLLM, quantize
from langchain_quantllm.bench.memory import touch_device
from langchain_quantllm.bench.random_models import SHAPES, random_checkpoint
from langchain_quantllm.errors import NotEnoughMemoryError
from langchain_quantllm.quantization.packing import TENSORS, RoundedLinear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

PROMPT = "Some text of no great length"
SCHEMES = ("none", "int8", "nf4", "nf4-double", "fp4")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A random Llama of some 300 MB in 16 bits."""
    shape = {**SHAPES["llama-2-7b"], "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 3}
    SHAPES["small"] = {**shape, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 8192}
    touch_device("cuda:0")
    yield random_checkpoint("small", tmp_path_factory.mktemp("small"))
    del SHAPES["small"]


def make(folder: Path, **fields: Any) -> QuantizedHuggingFaceLLM:
    return QuantizedHuggingFaceLLM(model_id=str(folder), progress=False, **{"max_new_tokens": 8, **fields})


@pytest.mark.parametrize("name", SCHEMES)
def test_goes_to_the_gpu_generates_and_gives_the_memory_back(small: Path, name: str) -> None:
    left = [torch.cuda.memory_allocated()]
    for _ in range(3):
        llm = make(small, quantization=name)
        texts = llm.batch([PROMPT, "x", "a longer prompt than the others, for the padding"], ignore_eos=True)
        assert len(texts) == 3
        report = llm.memory_report()
        assert report.devices == ("cuda:0",)
        grown = report.after_loading.reading("cuda:0").used_bytes - report.before.reading("cuda:0").used_bytes
        # What is below 1 MB a tensor is the allocator's.
        assert report.weights.cuda_bytes == pytest.approx(grown, rel=0.03)
        assert report.kv_cache_bytes
        del report
        llm.unload()
        gc.collect()
        left.append(torch.cuda.memory_allocated())
    # cuBLAS keeps a workspace, 34 MB on Hopper, for every stream that a thread uses: two of the engine's, one of ours.
    assert left[1] - left[0] < 0.02 * grown + 3 * 34e6
    assert left[2] == pytest.approx(left[1], abs=1e6)
    assert left[3] == pytest.approx(left[1], abs=1e6)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_stays_on_the_device_that_was_asked_for(small: Path, name: str, device: str) -> None:
    if device == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    llm = make(small, quantization=name, device=device)
    assert llm.invoke(PROMPT, ignore_eos=True)
    assert llm.memory_report().devices == (device,)
    assert str(llm.pipeline.device) == device
    llm.unload()


@pytest.mark.parametrize("name", ["none", "int8", "nf4"])
def test_spread_over_two_gpus(small: Path, name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    whole = make(small, quantization=name)
    expected = whole.batch([PROMPT, "x"], ignore_eos=True)
    half = int(whole.memory_report().weights.total_bytes * 0.7)
    whole.unload()
    llm = make(small, quantization=name, max_memory={0: half, 1: half, "cpu": "30GiB"})
    assert llm.batch([PROMPT, "x"], ignore_eos=True) == expected
    assert llm.memory_report().devices == ("cuda:0", "cuda:1")
    llm.unload()


def test_streamed_equals_whole(small: Path) -> None:
    llm = make(small, quantization="nf4", max_new_tokens=32)
    assert "".join(llm.stream(PROMPT)) == llm.invoke(PROMPT)
    llm.unload()


def test_a_prompt_beyond_the_memory_fails_in_words_and_the_next_one_works(small: Path) -> None:
    llm = make(small, engine="pipeline").load()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 5_000_000) / total)
    try:
        with pytest.raises(NotEnoughMemoryError, match="ran out of memory"):
            llm.batch(["word " * 700] * 16)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert llm.invoke(PROMPT, ignore_eos=True)
    llm.unload()


def test_too_large_for_max_memory_is_told_before_loading(small: Path) -> None:
    with pytest.raises(NotEnoughMemoryError, match="nf4"):
        make(small, max_memory={0: "250MB"}).load()


@pytest.mark.parametrize("scheme", [None, Int8(fp32_cpu_offload=True), NF4(fp32_cpu_offload=True)])
def test_layers_that_do_not_fit_stay_on_the_cpu(small: Path, scheme: Any) -> None:
    layers = {f"model.layers.{i}": 0 for i in range(2)} | {"model.layers.2": "cpu"}
    device_map = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0, **layers}
    llm = make(small, quantization=scheme, device_map=device_map)
    assert llm.invoke(PROMPT, ignore_eos=True)
    llm.unload()


@pytest.mark.parametrize(("bits", "desc_act"), [(4, False), (8, True)])
def test_gptq_is_made_on_the_gpu_as_on_the_cpu(tmp_path: Any, bits: int, desc_act: bool) -> None:
    SHAPES["made"] = {**SHAPES["tiny"], "vocab_size": 1024}
    folder = random_checkpoint("made", tmp_path / "plain")
    del SHAPES["made"]
    texts = [" ".join(f"w{(7 * i + 13 * j) % 700}" for i in range(400)) for j in range(6)]
    scheme = GPTQ(bits=bits, group_size=64, desc_act=desc_act)
    layers = {}
    before = torch.cuda.memory_allocated()
    for device in ("cuda", "cpu"):
        options = {"device": device, "dtype": "float16", "progress": False}
        done = quantize(folder, scheme, Calibration(source=texts, tokens=64), tmp_path / device, **options)
        tensors = load_file(done.folder / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj"
        layers[device] = RoundedLinear.unpack({key: tensors[f"{name}.{key}"] for key in TENSORS}, bits)
    assert torch.cuda.memory_allocated() - before < 2**26  # but for the workspaces of its libraries
    weight = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].float()
    errors = {device: float((layer.dequantize() - weight).norm() / weight.norm()) for device, layer in layers.items()}
    # The GPU computes a block in float16 and sums in another order, so that close choices fall otherwise.
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.02)
    assert (layers["cuda"].codes != layers["cpu"].codes).float().mean() < 0.1
    llm = QuantizedHuggingFaceLLM(model_id=str(tmp_path / "cuda"), quantization=GPTQ(kernel="triton"), max_new_tokens=4)
    assert llm.invoke("w1 w2 w3")
    llm.unload()
