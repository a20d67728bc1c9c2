"""transformers' experts have the function between their products where this package looks for it."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers.integrations import moe

from langchain_quantllm.compat.transformers_gating import gated_outputs
from tests.support.mixtures import make_mixture


def test_experts_call_the_function_between_their_products() -> None:
    for forward in (moe.grouped_mm_experts_forward, moe.batched_mm_experts_forward):
        source = inspect.getsource(forward)
        assert "self._apply_gate(proj_out)" in source
        assert "self.act_fn(proj_out)" in source


@pytest.mark.parametrize(("kind", "width"), [("qwen3_moe", 64), ("gpt_oss", 64), ("nemotron_h", 32)])
def test_the_function_has_one_value_for_each_input_of_the_second_product(kind: str, width: int) -> None:
    experts = next(m for m in make_mixture(kind).modules() if hasattr(m, "_apply_gate"))
    outputs = torch.randn(3, width)
    found = gated_outputs(experts, outputs)
    assert found.shape == (3, width // 2 if experts.has_gate else width)
    assert not found.requires_grad
