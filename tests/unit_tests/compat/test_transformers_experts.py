"""Experts of transformers' mixtures: what is found is what their own forward multiplies by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.aria.modeling_aria import AriaExperts

from langchain_quantllm.compat.transformers_experts import is_experts, projections, unsupported_experts
from tests.support.mixtures import EXPERTS, make_mixture

KNOWN = ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h", "deepseek_v3"]
if hasattr(AriaExperts, "_apply_gate"):  # older releases have them in modules of their own
    KNOWN.append("aria")


def experts_of(model: Any) -> Any:
    return next(module for module in model.modules() if is_experts(module))


@torch.no_grad()
@pytest.mark.parametrize("kind", KNOWN)
def test_projections_in_plain_products_give_what_the_experts_own_forward_gives(kind: str) -> None:
    experts = experts_of(make_mixture(kind))
    found = projections(experts)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    assert list(found) == [first, "down_proj"]
    assert {p.experts for p in found.values()} == {EXPERTS}
    x = torch.randn(5, found[first].in_features)
    index = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 3]])
    weights = torch.rand(5, 2)
    rows = []
    for token in range(5):
        total = torch.zeros(found["down_proj"].out_features)
        for place in range(2):
            y = x[token]
            for name, projection in found.items():
                weight = getattr(experts, name)[index[token, place]]
                weight = weight.t() if projection.transposed else weight
                assert weight.shape == (projection.out_features, projection.in_features)
                y = weight @ y
                if projection.bias is not None:
                    y = y + getattr(experts, projection.bias)[index[token, place]]
                if name == first:
                    y = experts._apply_gate(y[None])[0] if experts.has_gate else experts.act_fn(y)
            total += weights[token, place] * y
        rows.append(total)
    torch.testing.assert_close(experts(x, index, weights), torch.stack(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KNOWN)
def test_only_the_modules_with_the_weights_of_experts_are_experts(kind: str) -> None:
    model = make_mixture(kind)
    named = {name for name, module in model.named_modules() if is_experts(module)}
    assert named == {name for name, _ in model.named_modules() if name.endswith(".experts")}
    assert {unsupported_experts(module) for module in model.modules()} == {None}


@pytest.mark.parametrize("kind", ["llama4", "jetmoe"])
def test_experts_of_another_layout_have_a_reason(kind: str) -> None:
    model = make_mixture(kind)
    assert not any(map(is_experts, model.modules()))
    assert not any(map(projections, model.modules()))
    reasons = {reason for module in model.modules() if (reason := unsupported_experts(module)) is not None}
    assert len(reasons) == 1
    assert "Experts" in reasons.pop()


def test_parameters_that_were_replaced_are_left_out() -> None:
    experts = experts_of(make_mixture("qwen3_moe"))
    del experts.down_proj
    experts.down_proj = torch.nn.Identity()
    assert list(projections(experts)) == ["gate_up_proj"]
    assert is_experts(experts)
