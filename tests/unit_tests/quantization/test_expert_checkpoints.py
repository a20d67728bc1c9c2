"""Checkpoints of mixtures in bitsandbytes' schemes: written by this package, and by transformers 4 and 5."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from langchain_quantllm import QuantizedHuggingFaceLLM, quantize
from langchain_quantllm.errors import CheckpointError
from langchain_quantllm.experts.stacked import StackedLinear
from langchain_quantllm.schemes import SCHEMES
from tests.support.checkpoints import edit_json, make_tokenizer, quicken
from tests.support.loading import model_of
from tests.support.mixtures import make_mixture

IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module", autouse=True)
def quick() -> None:
    quicken()


def save_mixture(kind: str, folder: Path, **options: Any) -> Path:
    make_mixture(kind, dtype=torch.float16, **options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, scheme: Any = None) -> Any:
    return model_of(QuantizedHuggingFaceLLM(model_id=str(folder), quantization=scheme, progress=False))


def stacks(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of all stacks of a model by their names."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, StackedLinear)}
    return {name: {k: b for k, b in m.named_buffers() if b is not None} for name, m in found.items()}


def assert_same_stacks(found: Any, expected: Any) -> None:
    assert stacks(found).keys() == stacks(expected).keys() != set()
    for name, tensors in stacks(expected).items():
        for part, tensor in tensors.items():
            assert torch.equal(stacks(found)[name][part], tensor), (name, part)


# Experts of 128 * 128 weights have whole blocks of scales in each of their matrices.
@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        ("mixtral", "int8"),
        ("qwen3_moe", "nf4"),
        ("mixtral", "nf4-double"),
        ("gpt_oss", "fp4-double"),
        ("nemotron_h", "nf4"),
    ],
)
def test_what_is_written_is_read_bit_by_bit(tmp_path: Path, kind: str, scheme: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32} if scheme == "nf4-double" else {}
    plain = save_mixture(kind, tmp_path / "plain", **sizes)
    quantize(plain, scheme, output=tmp_path / "written", progress=False)
    found, expected = load(tmp_path / "written"), load(plain, scheme)
    assert_same_stacks(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=IDS).logits, expected(input_ids=IDS).logits)


@pytest.mark.parametrize("scheme", ["int8", "nf4", "nf4-double"])
def test_experts_are_written_one_by_one_as_transformers_4_wrote_them(tmp_path: Path, scheme: str) -> None:
    plain = save_mixture("mixtral", tmp_path / "plain")
    quantize(plain, scheme, output=tmp_path / "written", progress=False)
    names = set(load_file(tmp_path / "written" / "model.safetensors"))
    layer = "model.layers.0.block_sparse_moe"
    assert f"{layer}.gate.weight" in names
    for name in ("w1", "w2", "w3"):
        for expert in range(4):
            state = "SCB" if scheme == "int8" else "weight.quant_state.bitsandbytes__nf4"
            assert {f"{layer}.experts.{expert}.{name}.{part}" for part in ("weight", state)} <= names
    assert not any("gate_up_proj" in name for name in names)


def as_transformers_4(plain: Path, folder: Path, scheme: str) -> Path:
    """Write a checkpoint as transformers 4 did: every linear layer of every expert quantized by itself."""
    config = SCHEMES[scheme].transformers_config("float16")
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in load_file(plain / "model.safetensors").items():
        if ".experts." not in name:
            continue
        layer = name.removesuffix(".weight")
        if scheme == "int8":
            tensors[name], tensors[f"{layer}.SCB"], _ = functional.int8_vectorwise_quant(weight)
            tensors[f"{layer}.weight_format"] = torch.tensor(0, dtype=torch.uint8)
        else:
            kind, _, double = scheme.partition("-")
            tensors[name], state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=bool(double))
            tensors |= {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("scheme", ["int8", "nf4", "fp4-double"])
def test_checkpoints_of_transformers_4_have_their_own_values(tmp_path: Path, kind: str, scheme: str) -> None:
    plain = save_mixture(kind, tmp_path / "plain")
    stored = load_file(as_transformers_4(plain, tmp_path / "stored", scheme) / "model.safetensors")
    model = load(tmp_path / "stored")
    parent = "mlp" if kind == "qwen3_moe" else "block_sparse_moe"
    names = ("gate_proj", "up_proj", "down_proj") if kind == "qwen3_moe" else ("w1", "w3", "w2")
    for number, layer in enumerate(model.model.layers):
        for expert in range(4):
            gate, up, down = (
                dequantized(stored, f"model.layers.{number}.{parent}.experts.{expert}.{name}", scheme) for name in names
            )
            experts = layer.mlp.experts
            values = experts.gate_up_proj.dequantize(expert, torch.float32)
            torch.testing.assert_close(values, torch.cat([gate, up]), rtol=1e-5, atol=1e-6)
            values = experts.down_proj.dequantize(expert, torch.float32)
            torch.testing.assert_close(values, down, rtol=1e-5, atol=1e-6)


def dequantized(stored: dict[str, torch.Tensor], layer: str, scheme: str) -> torch.Tensor:
    """Dequantize a matrix of a checkpoint by bitsandbytes."""
    weight = stored[f"{layer}.weight"]
    if scheme == "int8":
        return weight.float() * stored[f"{layer}.SCB"][:, None] / 127
    own = {n.removeprefix(f"{layer}.weight."): t for n, t in stored.items() if n.startswith(f"{layer}.weight.")}
    state = functional.QuantState.from_dict(own, device=torch.device("cpu"))
    state.dtype = torch.float32
    shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])  # see test_expert_loading.rounded
    return functional.dequantize_4bit(weight, state).float().reshape(shape)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_unquantized_experts_of_transformers_5_stay_as_they_are_and_a_warning_says_so(
    tmp_path: Path, scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = save_mixture("qwen3_moe", tmp_path / "plain")
    config = SCHEMES[scheme].transformers_config("float16")
    made = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map={"": "cpu"})
    made.save_pretrained(tmp_path / "stored")
    make_tokenizer().save_pretrained(tmp_path / "stored")
    with caplog.at_level(logging.WARNING):
        llm = QuantizedHuggingFaceLLM(model_id=str(tmp_path / "stored"), progress=False)
        model = model_of(llm)
    for found, expected in zip(model.model.layers, made.model.layers, strict=True):
        assert torch.equal(found.mlp.experts.gate_up_proj, expected.mlp.experts.gate_up_proj)
    said = [r.getMessage() for r in caplog.records if "experts" in r.getMessage()]
    assert len(said) == 1
    assert "the checkpoint has them unquantized" in said[0]


def test_an_expert_that_is_missing_is_an_error(tmp_path: Path) -> None:
    plain = save_mixture("qwen3_moe", tmp_path / "plain")
    folder = as_transformers_4(plain, tmp_path / "stored", "nf4")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".1.mlp.experts.3." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="experts"):
        load(folder)


def edited_state(tensor: torch.Tensor, **changes: Any) -> torch.Tensor:
    """Change the numbers in a quantization state, which is JSON in a tensor."""
    return torch.tensor(list(json.dumps(json.loads(bytes(tensor.tolist())) | changes).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("scheme", "ending", "edit", "words"),
    [
        pytest.param("nf4", "weight", lambda t: t[:64], "64 bytes, and 1024", id="bytes"),
        pytest.param("nf4", "absmax", lambda t: t[:3], "3 scales, and 32", id="scales"),
        pytest.param("nf4", "absmax", torch.Tensor.int, "scales are int32", id="integer-scales"),
        pytest.param("nf4", "quant_map", lambda t: t[:4], "4 codes, and 16", id="codes"),
        pytest.param("nf4", "__nf4", lambda t: edited_state(t, blocksize=0), "has 0 elements", id="no-block"),
        pytest.param("nf4", "__nf4", lambda t: edited_state(t, blocksize=-64), "has -64 elements", id="negative-block"),
        pytest.param("nf4", "__nf4", lambda t: edited_state(t, blocksize=32), "32 scales, and 64", id="smaller-block"),
        pytest.param("nf4", "__nf4", lambda t: edited_state(t, shape=[-32, -64]), r"\(-32, -64\)", id="negative-shape"),
        pytest.param("nf4", "__nf4", lambda t: edited_state(t, shape=[10**9, 10**9]), "1024 bytes", id="huge-shape"),
        pytest.param("nf4", "__nf4", lambda t: edited_state(t, shape=[32, 8, 8]), "of a matrix", id="three-axes"),
        pytest.param("nf4-double", "nested_absmax", lambda t: t[:0], "0 scales of scales, and 1", id="nested-scales"),
        pytest.param("nf4-double", "nested_quant_map", lambda t: t[:7], "7 codes of scales", id="nested-codes"),
        pytest.param(
            "nf4-double",
            "__nf4",
            lambda t: edited_state(t, nested_blocksize=0),
            "block of scales",
            id="no-nested-block",
        ),
        pytest.param("int8", "SCB", lambda t: t[:3], "3 scales, and", id="int8-scales"),
        pytest.param("int8", "weight", torch.Tensor.half, "codes are float16", id="float-codes"),
        pytest.param("int8", "weight", torch.Tensor.flatten, "codes are int8 of shape", id="flat-codes"),
    ],
)
def test_matrices_whose_tensors_do_not_fit_each_other_are_an_error(
    tmp_path: Path, scheme: str, ending: str, edit: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    folder = as_transformers_4(save_mixture("qwen3_moe", tmp_path / "plain"), tmp_path / "stored", scheme)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:  # of all experts, which then have the same shapes
        if ".experts." in name and name.endswith(ending if ending[0] == "_" else f".{ending}"):
            tensors[name] = edit(tensors[name]).contiguous().clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"expert 0 of model.layers.*{words}"):
        load(folder)


def test_experts_in_a_layout_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    plain = save_mixture("qwen3_moe", tmp_path / "plain")
    folder = as_transformers_4(plain, tmp_path / "stored", "nf4")
    edit_json(folder / "config.json", moe_intermediate_size=30)
    with pytest.raises(CheckpointError, match="quantized expert by expert.*30 inputs, no multiple of 8"):
        load(folder)
