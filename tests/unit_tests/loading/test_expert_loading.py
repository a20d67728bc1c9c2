"""Mixtures of experts in bitsandbytes' schemes: what is loaded is what bitsandbytes makes of each expert's matrix."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional

from langchain_quantllm import NF4, QuantizedHuggingFaceLLM
from langchain_quantllm.compat.transformers_experts import projections
from langchain_quantllm.experts.module import QuantizedExperts
from langchain_quantllm.experts.stacked import StackedLinear
from tests.support.checkpoints import make_tokenizer, quicken
from tests.support.loading import model_of
from tests.support.mixtures import EXPERTS, make_mixture

KINDS = ["qwen3_moe", "mixtral", "gpt_oss", "aria", "nemotron_h", "deepseek_v3"]
SCHEMES = ["int8", "nf4", "nf4-double", "fp4", "fp4-double"]
IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module", autouse=True)
def quick() -> None:
    quicken()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            make_mixture(kind).save_pretrained(made[kind], max_shard_size="100KB")
            make_tokenizer().save_pretrained(made[kind])
        return made[kind]

    return folder_of


def load(folder: Path, scheme: Any = None, **options: Any) -> Any:
    return model_of(QuantizedHuggingFaceLLM(model_id=str(folder), quantization=scheme, progress=False, **options))


def rounded(matrix: torch.Tensor, scheme: str) -> torch.Tensor:
    """Quantize a matrix by bitsandbytes, and dequantize it."""
    if scheme == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(matrix.half())
        return codes.float() * scales[:, None] / 127
    kind, _, double = scheme.partition("-")
    row = matrix.reshape(1, -1)  # on a CPU, bitsandbytes dequantizes wrongly where a block has elements of two rows
    packed, state = functional.quantize_4bit(row, quant_type=kind, compress_statistics=bool(double))
    return functional.dequantize_4bit(packed, state).float().reshape(matrix.shape)


def experts_in(model: Any) -> dict[str, Any]:
    return {name: m for name, m in model.named_modules() if name.endswith(".experts")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_matrix_of_each_expert_is_what_bitsandbytes_makes_of_it(folders: Any, kind: str, scheme: str) -> None:
    plain = experts_in(make_mixture(kind))
    found = experts_in(load(folders(kind), scheme))
    assert found.keys() == plain.keys()
    assert len(found) in (1, 2)
    for path, experts in found.items():
        assert isinstance(experts, QuantizedExperts)
        assert not list(experts.parameters())
        for name, projection in projections(plain[path]).items():
            stacked = getattr(experts, name)
            assert isinstance(stacked, StackedLinear)
            for expert in range(EXPERTS):
                weight = getattr(plain[path], name)[expert].detach()
                weight = weight.t() if projection.transposed else weight
                values = stacked.dequantize(expert, torch.float32)
                torch.testing.assert_close(values, rounded(weight, scheme), rtol=1e-5, atol=1e-6)
            if projection.bias is not None:
                torch.testing.assert_close(stacked.stack.bias, getattr(plain[path], projection.bias).detach())
