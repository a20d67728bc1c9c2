"""transformers' weight conversions: the names that a family's checkpoints have, found by what transformers writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from langchain_quantllm.compat.transformers_conversions import ExpertNames
from langchain_quantllm.compat.transformers_experts import projections
from tests.support.mixtures import EXPERTS, make_mixture


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "nemotron_h", "deepseek_v3"])
def test_names_of_a_saved_model_are_those_of_its_parameters(tmp_path: Path, kind: str) -> None:
    model = make_mixture(kind)
    parameters = {f"{path}.{n}": p for path, m in model.named_modules() for n, p in projections(m).items()}
    names = ExpertNames(model, parameters)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    seen = dict.fromkeys(parameters, 0)
    for name, tensor in tensors.items():
        found = names.find(name.removesuffix(".weight"))
        assert (found is not None) == (".experts." in name)
        if found is None:
            continue
        rows = model.get_parameter(found.parameter)[found.expert].chunk(found.parts)[found.part]
        assert torch.equal(rows, tensor)
        templates = names.templates(found.parameter)
        assert templates is not None
        assert templates[found.part] == found.template
        assert names.renamed(name) == found.template.replace("{expert}", str(found.expert)) + ".weight"
        seen[found.parameter] += 1
    parts = {name: len(names.templates(name) or ()) for name in parameters}
    assert seen == {name: EXPERTS * parts[name] for name in parameters}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_ordinary_names_are_known_in_every_family(kind: str) -> None:
    model = make_mixture(kind)
    parameters = [f"{path}.{name}" for path, module in model.named_modules() for name in projections(module)]
    names = ExpertNames(model, parameters)
    found = [names.find(f"model.layers.1.mlp.experts.3.{part}_proj") for part in ("gate", "up", "down")]
    assert [(own.parameter.rpartition(".")[2], own.part, own.parts, own.expert) for own in found if own] == [
        ("gate_up_proj", 0, 2, 3),
        ("gate_up_proj", 1, 2, 3),
        ("down_proj", 0, 1, 3),
    ]
    assert names.find("model.layers.1.self_attn.q_proj") is None
    assert names.find("model.layers.7.mlp.experts.3.gate_proj") is None
