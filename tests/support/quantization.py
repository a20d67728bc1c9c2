"""Texts, options and models for the tests of quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from langchain_quantllm.quantization.packing import TENSORS, RoundedLinear
from langchain_quantllm.quantization.solver import Rounding
from tests.support import families
from tests.support.checkpoints import make_tokenizer

TEXTS = [
    "The river had risen in the night, and the bridge stood in brown water up to its rails.",
    "A function that calls itself needs a case in which it does not.",
    "Bread needs flour, water, salt and time; of these, time is what most people leave out.",
]


def rounding(**options: Any) -> Rounding:
    given: dict[str, Any] = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "damping": 0.01}
    return Rounding(**{**given, **options})


def written(folder: Path, family: str) -> Path:
    """Write a random model in bfloat16."""
    families.family_model(families.FAST[family]).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def dequantized(plain: Path, folder: Path, bits: int) -> Any:
    """The plain model with the weights that a checkpoint stands for, in float32."""
    tensors = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        rounded = RoundedLinear.unpack({key: tensors[f"{name}.{key}"] for key in TENSORS}, bits)
        model.get_submodule(name).weight.data.copy_(rounded.dequantize())
    return model.eval()


def divergence(model: Any, other: Any, ids: torch.Tensor) -> float:
    """The mean divergence of another model's predictions, in nats."""
    with torch.no_grad():
        expected, found = (each(ids).logits.log_softmax(-1) for each in (model, other))
    return float((expected.exp() * (expected - found)).sum(-1).mean())
