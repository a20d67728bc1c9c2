"""Errors in one sentence: weights, packages and fields.

The weights of `unreadable` are garbage: an error that must come before weights are read would be another one otherwise.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from langchain_quantllm import NF4, QuantizedHuggingFaceLLM
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
)
from tests.support.checkpoints import edit_json
from tests.support.loading import load, sentence

INT8_CONFIG = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}


# Weights.


def test_pickled_weights_are_refused(fresh: Path) -> None:
    state = load_file(fresh / "model.safetensors")
    (fresh / "model.safetensors").unlink()
    torch.save(state, fresh / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle") as caught:
        load(fresh)
    assert "use_safetensors=False" in sentence(caught.value)
    for quantization in (None, "nf4"):
        llm = load(fresh, use_safetensors=False, quantization=quantization, max_new_tokens=3)
        assert torch.equal(llm.pipeline.model.lm_head.weight, state["lm_head.weight"])
        assert llm.invoke("hello")


def test_pickled_weights_are_refused_before_they_are_opened(unreadable: Path) -> None:
    (unreadable / "model.safetensors").rename(unreadable / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="use_safetensors=False"):
        load(unreadable)


def test_no_weights_at_all(fresh: Path) -> None:
    (fresh / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        load(fresh)
    sentence(caught.value)


def test_missing_shard_is_named(fresh: Path) -> None:
    state = load_file(fresh / "model.safetensors")
    (fresh / "model.safetensors").rename(fresh / "model-00001-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-00001-of-00002.safetensors")}
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (fresh / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model-00002-of-00002") as caught:
        load(fresh)
    sentence(caught.value)


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_missing_tensors_are_no_random_weights(fresh: Path, quantization: str | None) -> None:
    file = fresh / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if "layers.1.mlp" not in k}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight") as caught:
        load(fresh, quantization=quantization)
    assert "3 tensors" in sentence(caught.value)


@pytest.mark.parametrize("quantization", [None, "int8", "nf4"])
def test_tensors_of_another_shape_are_no_random_weights(fresh: Path, quantization: str | None) -> None:
    file = fresh / "model.safetensors"
    state = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    state[name] = state[name][:64].clone()
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"other shapes|{re.escape(name)}") as caught:
        load(fresh, quantization=quantization)
    sentence(caught.value)


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_damaged_weights(fresh: Path, damage: str) -> None:
    file = fresh / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"garbage": b"\xff" * 100, "truncated": content[: len(content) // 2], "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=re.escape(str(fresh))) as caught:
        load(fresh)
    sentence(caught.value)


def test_after_an_error_the_same_model_loads(fresh: Path) -> None:
    """A failed load leaves no model in the registry and holds no lock."""
    file = fresh / "model.safetensors"
    content = file.read_bytes()
    llm = QuantizedHuggingFaceLLM(model_id=str(fresh), progress=False, max_new_tokens=3)
    file.unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError):
            llm.invoke("hello")
        assert not llm.is_loaded
    file.write_bytes(content)
    assert llm.invoke("hello")


# Packages.


@pytest.mark.parametrize(
    ("hidden", "kwargs", "words"),
    [
        ("bitsandbytes", {"quantization": "int8"}, ["'int8' needs bitsandbytes", "pip install bitsandbytes"]),
        ("bitsandbytes", {"quantization": NF4()}, ["'nf4' needs bitsandbytes", "pip install bitsandbytes"]),
        ("accelerate", {"quantization": "fp4"}, ["'fp4' needs accelerate", "pip install accelerate"]),
        ("gptqmodel", {"quantization": "gptq"}, ["'gptq' needs gptqmodel", 'pip install "langchain-quantllm[gptq]"']),
        ("optimum", {"quantization": "gptq"}, ["'gptq' needs optimum", 'pip install "langchain-quantllm[gptq]"']),
        (
            "bitsandbytes",
            {"quantization_config": {"load_in_8bit": True}},
            ["'int8' needs bitsandbytes", "pip install bitsandbytes"],
        ),
    ],
)
def test_missing_package_of_a_scheme(
    unreadable: Path, hide_packages: Any, hidden: str, kwargs: dict[str, Any], words: list[str]
) -> None:
    hide_packages(hidden)
    with pytest.raises(MissingPackageError) as caught:
        load(unreadable, **kwargs)
    for word in words:
        assert word in sentence(caught.value)


@pytest.mark.parametrize(
    ("hidden", "stored", "command"),
    [
        ("bitsandbytes", INT8_CONFIG, "pip install bitsandbytes"),
        ("gptqmodel", {"quant_method": "gptq", "bits": 4}, 'pip install "langchain-quantllm[gptq]"'),
        (
            "gptqmodel",
            {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
            'pip install "langchain-quantllm[gptq]"',
        ),
        ("torchao", {"quant_method": "torchao", "quant_type": "int8_weight_only"}, "pip install torchao"),
        (
            "compressed_tensors",
            {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}},
            "pip install compressed-tensors",
        ),
    ],
)
def test_missing_package_of_a_checkpoint(
    unreadable: Path, hide_packages: Any, hidden: str, stored: dict[str, Any], command: str
) -> None:
    edit_json(unreadable / "config.json", quantization_config=stored)
    hide_packages(hidden)
    with pytest.raises(MissingPackageError) as caught:
        load(unreadable)
    assert command in sentence(caught.value)


# Fields.


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"dtype": "float61"}, ["dtype='float61'", "did you mean 'float16'?"]),
        ({"dtype": "int8"}, ["dtype='int8'"]),
        ({"attn_implementation": "sdp"}, ["attn_implementation='sdp'", "did you mean 'sdpa'?"]),
        ({"attn_implementation": "flash_attention"}, ["did you mean 'flash_attention_"]),
        ({"quantisation": "int8"}, ["'quantisation'", "did you mean 'quantization'?"]),
        ({"torch_dtype": "float16"}, ["torch_dtype", "dtype="]),
        ({"load_in_8bit": True}, ["load_in_8bit", "quantization='int8'"]),
        ({"load_in_4bit": True}, ["load_in_4bit", "quantization='nf4'"]),
        ({"max_memry": {}}, ["'max_memry'", "did you mean 'max_memory'?"]),
        ({"pipeline": 3}, ["pipeline=int", "text-generation"]),
        ({"model": "/other"}, ["model"]),
        ({"batch_size": 0}, ["batch_size"]),
    ],
)
def test_wrong_fields_are_refused_when_the_llm_is_made(
    unreadable: Path, kwargs: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        QuantizedHuggingFaceLLM(model_id=str(unreadable), **kwargs)
    for word in words:
        assert word in str(caught.value)


def test_a_wrong_field_is_one_of_the_package_s_errors(unreadable: Path) -> None:
    """`except QuantLLMError` catches it, and its message is one sentence, not pydantic's four lines."""
    with pytest.raises(InvalidOptionError) as caught:
        QuantizedHuggingFaceLLM(model_id=str(unreadable), dtype="float61")
    sentence(caught.value)


def test_no_model_at_all() -> None:
    for kwargs in ({}, {"model_id": ""}, {"model_id": None}):
        with pytest.raises(ValueError, match="model_id"):
            QuantizedHuggingFaceLLM(**kwargs)
