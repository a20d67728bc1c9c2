"""AWQ checkpoints that `quantize` writes: AutoAWQ's order of codes, names of what stays unquantized, their logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from langchain_quantllm import AWQ, Calibration, Distillation, QuantizedHuggingFaceLLM, quantize
from langchain_quantllm.compat.transformers_experts import projections
from langchain_quantllm.errors import CheckpointError, InvalidOptionError
from langchain_quantllm.kernels.linear.bit_packing import pack_awq, unpack_awq
from langchain_quantllm.loading.registry import load
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory import estimate_config
from tests.support.checkpoints import make_checkpoint, make_tokenizer
from tests.support.mixtures import EXPERTS, make_mixture
from tests.support.packed_experts import AWQ_PLACES, NAMES
from tests.support.quantization import TEXTS
from tests.support.selection import skip_without_gptqmodel

IDS = torch.arange(3, 43)[None]
SHIFTS_BYTES = 8 * 4
"""Of a table that GPTQModel's layer of GPTQ makes."""


def run(source: Path, output: Path, scheme: Any = AWQ(group_size=32), **options: Any) -> Any:  # noqa: B008
    given = {"calibration": Calibration(source=TEXTS * 4, tokens=64), "progress": False, "device": "cpu"}
    return quantize(source, scheme, output=output, **{**given, **options})


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def read(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Read the weight of a layer as AutoAWQ does: shift by shift, in the order that it has published."""

    def codes(words: torch.Tensor) -> torch.Tensor:
        found = torch.empty(len(words), 8 * words.shape[1])
        for place, output in enumerate(AWQ_PLACES):
            found[:, output::8] = ((words >> (4 * place)) & 15).float()
        return found

    scales = tensors[f"{name}.scales"].float()
    words = tensors[f"{name}.qweight"]
    group = torch.arange(len(words)) // (len(words) // len(scales))
    return ((codes(words) - codes(tensors[f"{name}.qzeros"])[group]) * scales[group]).t()


def test_a_word_holds_its_codes_in_the_order_of_autoawq() -> None:
    words = pack_awq(torch.arange(8, dtype=torch.uint8)[None])
    assert words.tolist() == [[0x75316420]]
    codes = torch.randint(0, 16, (2, 5, 24), dtype=torch.uint8)
    assert torch.equal(unpack_awq(pack_awq(codes)), codes)


@pytest.mark.compat
def test_a_written_checkpoint_computes_with_its_dequantized_weights(tmp_path: Path) -> None:
    skip_without_gptqmodel()
    source = make_checkpoint(tmp_path / "source")
    done = run(source, tmp_path / "out", "awq")
    assert done.scheme == AWQ(group_size=64)  # the largest that divides 64 and 128
    config = config_of(done.folder)
    del config["meta"]
    format_ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    assert config == {**format_, "modules_to_not_convert": None}
    tensors = load_file(done.folder / "model.safetensors")
    assert sum(name.endswith(".qweight") for name in tensors) == 14
    twin = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in twin.named_modules():
        if f"{name}.qweight" in tensors:
            weight = read(tensors, name)
            assert (weight - module.weight).norm() < 0.3 * module.weight.norm()  # GPTQ's are not the nearest
            module.weight.data.copy_(weight)
    loaded = load(LoadSpec(model_id=str(done.folder), dtype="float32", progress=False, device_map={"": "cpu"}))
    assert loaded.scheme == done.scheme
    assert loaded.estimate is not None
    shifts = SHIFTS_BYTES * sum(name.endswith(".qweight") for name in tensors)
    assert loaded.weights.quantized_bytes == loaded.estimate.weights.quantized_bytes + shifts
    with torch.no_grad():
        found, expected = (model(IDS).logits.float() for model in (loaded.pipeline.model, twin))
    assert (found - expected).norm() < 0.03 * expected.norm()  # its kernels on the CPU compute in 16 bits


@pytest.mark.parametrize(
    "kind", ["qwen3_moe", *(pytest.param(k, marks=pytest.mark.slow) for k in ("mixtral", "gpt_oss"))]
)
def test_experts_are_written_as_layers_of_their_own_and_routers_are_named(tmp_path: Path, kind: str) -> None:
    skip_without_gptqmodel()
    make_mixture(kind, vocab_size=512, dtype=torch.float16).save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    done = run(tmp_path / "source", tmp_path / "out")
    tensors = load_file(done.folder / "model.safetensors")
    twin = make_mixture(kind, vocab_size=512, dtype=torch.float16).float()
    path, router = ("block_sparse_moe", "gate") if kind == "mixtral" else ("mlp", "gate")
    router = "router" if kind == "gpt_oss" else router
    kept = {f"model.layers.{i}.{path}.{router}" for i in range(2)}
    assert set(config_of(done.folder)["modules_to_not_convert"]) == {*kept, "lm_head"}
    assert all(f"{name}.weight" in tensors for name in kept)
    for name, module in twin.named_modules():
        if f"{name}.qweight" in tensors:
            module.weight.data.copy_(read(tensors, name))
        for projection, layout in projections(module).items():
            for expert in range(EXPERTS):
                layer = f"{name.replace('.mlp.', f'.{path}.')}.{expert}."
                parts = ["down"] if projection == "down_proj" else ["gate", "up"]
                weights = [read(tensors, layer + NAMES[kind][part]) for part in parts]
                joined = torch.cat(weights)
                if len(parts) == 2 and not module.is_concatenated:
                    joined = torch.stack(weights, dim=1).flatten(0, 1)
                getattr(module, projection).data[expert].copy_(joined.t() if layout.transposed else joined)
    loaded = load(LoadSpec(model_id=str(done.folder), dtype="float32", progress=False, device_map={"": "cpu"}))
    assert loaded.estimate is not None
    assert loaded.estimate.weights.experts_bytes == loaded.weights.experts_bytes
    with torch.no_grad():
        for ours, theirs in zip(loaded.pipeline.model.model.layers, twin.model.layers, strict=True):
            given = torch.randn(16, 64), torch.randint(0, EXPERTS, (16, 2)), torch.rand(16, 2)
            found, expected = (block.mlp.experts(*given) for block in (ours, theirs))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_skipped_layers_stay_unquantized_and_are_named_in_full(tmp_path: Path) -> None:
    skip_without_gptqmodel()
    source = make_checkpoint(tmp_path / "source")
    done = run(source, tmp_path / "out", skip_modules=["mlp.down_proj"])
    kept = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert config_of(done.folder)["modules_to_not_convert"] == [*kept, "lm_head"]
    before, after = (load_file(folder / "model.safetensors") for folder in (source, done.folder))
    assert all(torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) for name in kept)
    loaded = load(LoadSpec(model_id=str(done.folder), progress=False, device_map={"": "cpu"}))
    assert type(loaded.pipeline.model.model.layers[1].mlp.down_proj) is torch.nn.Linear
    assert loaded.estimate is not None
    shifts = SHIFTS_BYTES * sum(name.endswith(".qweight") for name in after)
    assert loaded.weights.quantized_bytes == loaded.estimate.weights.quantized_bytes + shifts


def test_its_scales_are_trained_like_those_of_gptq(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    before = load_file(run(source, tmp_path / "before").folder / "model.safetensors")
    distill = Distillation(epochs=1)
    after = load_file(run(source, tmp_path / "after", distill=distill).folder / "model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(name.endswith(".scales") for name in changed)


def test_it_is_asked_for_by_name_where_it_is_stored_and_not_made_while_loading(tmp_path: Path) -> None:
    skip_without_gptqmodel()
    source = make_checkpoint(tmp_path / "source")
    done = run(source, tmp_path / "out")
    llm = QuantizedHuggingFaceLLM(model_id=str(done.folder), quantization="awq", progress=False, max_new_tokens=3)
    assert llm.invoke("The capital")
    llm.unload()
    with pytest.raises(CheckpointError, match="group_size=32, not 64"):
        load(LoadSpec(model_id=str(done.folder), scheme=AWQ(group_size=64)))
    with pytest.raises(CheckpointError, match=r"quantize\(model_id, 'awq'\)"):
        load(LoadSpec(model_id=str(source), scheme=AWQ()))
    with pytest.raises(InvalidOptionError, match="group_size=0"):
        AWQ(group_size=0)


def test_its_memory_is_estimated_before_it_is_written(tmp_path: Path) -> None:
    from transformers import AutoConfig

    source = make_checkpoint(tmp_path / "source")
    estimate = estimate_config(AutoConfig.from_pretrained(source), AWQ(group_size=32), dtype="bfloat16")
    tensors = load_file(run(source, tmp_path / "out").folder / "model.safetensors")
    packed = (t for name, t in tensors.items() if name.endswith(("qweight", "qzeros", "scales")))
    groups = (4 * len(t) for name, t in tensors.items() if name.endswith("qweight"))  # of each input, made by loading
    assert estimate.weights.quantized_bytes == sum(t.nbytes for t in packed) + sum(groups)
