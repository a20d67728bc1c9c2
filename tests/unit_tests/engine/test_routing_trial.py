"""The check of mixtures in 16 bits: experts that change places by rounding are no fault, and a wrong router is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from langchain_quantllm.compat.transformers_experts import is_experts
from langchain_quantllm.engine.forward_context import current_context
from langchain_quantllm.engine.forward_patch import ForwardPatch
from langchain_quantllm.engine.fusion.fuse import RESIDUAL, Fusion
from langchain_quantllm.kernels import reference
from langchain_quantllm.kernels.experts import reference as experts_reference
from langchain_quantllm.kernels.linear import reference as linear_reference
from tests.support.mixtures import make_mixture
from tests.support.models import llm_of

pytestmark = pytest.mark.usefixtures("one_thread")

Routing = tuple[torch.Tensor, torch.Tensor]
"""Weights of experts, and their numbers, of shape `(tokens, experts of a token)`."""


@pytest.mark.parametrize(("kind", "seed"), [("mixtral", 1), ("gpt_oss", 3), ("deepseek_v3", 2)])
def test_rounding_that_changes_an_expert_is_no_fault(kind: str, seed: int, tokenizer: Any) -> None:
    llm = llm_of(make_mixture(kind, seed=seed, dtype=torch.bfloat16, num_hidden_layers=4), tokenizer)
    assert llm.engine_info.name == "fast", llm.engine_info.reason
    llm.unload()


def next_experts(weights: torch.Tensor, index: torch.Tensor, logits: torch.Tensor) -> Routing:
    """Choose the second and the third best instead of the two best."""
    return weights, logits.topk(3).indices[:, 1:]


def of_the_next_token(weights: torch.Tensor, index: torch.Tensor, logits: torch.Tensor) -> Routing:
    return weights.roll(1, 0), index.roll(1, 0)


def swapped(weights: torch.Tensor, index: torch.Tensor, logits: torch.Tensor) -> Routing:
    return weights.flip(1), index


def too_heavy(weights: torch.Tensor, index: torch.Tensor, logits: torch.Tensor) -> Routing:
    return weights * 1.3, index


def of_decoded_tokens(weights: torch.Tensor, index: torch.Tensor, logits: torch.Tensor) -> Routing:
    """Choose others for single tokens only, as in decode steps."""
    return (weights, index) if len(index) > 1 else (weights, logits.topk(4).indices[:, 2:])


def of_no_number(weights: torch.Tensor, index: torch.Tensor, logits: torch.Tensor) -> Routing:
    return weights * torch.nan, logits.topk(4).indices[:, 2:]


FAULTS = (of_no_number, next_experts, of_the_next_token, swapped, too_heavy, of_decoded_tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_router_is_refused(
    fault: Callable[..., Routing], dtype: torch.dtype, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Qwen3MoeTopKRouter.forward

    def route(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, weights, index = forward(self, hidden)
        context = current_context()
        if context is not None and context.attention is not None:
            weights, index = fault(weights, index, logits)
        return logits, weights, index

    monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", route)
    llm = llm_of(make_mixture("qwen3_moe", dtype=dtype), tokenizer)
    assert llm.engine_info.name == "pipeline"
    assert "over KV cache blocks" in llm.engine_info.reason
    llm.unload()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_wrong_experts_are_refused_where_their_router_is_right(
    dtype: torch.dtype, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_mixture("qwen3_moe", dtype=dtype)
    experts = next(module for module in model.modules() if is_experts(module))
    kind, forward = type(experts), type(experts).forward

    def run(self: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        context = current_context()
        is_wrong = context is not None and context.attention is not None
        output: torch.Tensor = forward(self, hidden, (index + 1) % 4 if is_wrong else index, weights)
        return output

    monkeypatch.setattr(kind, "forward", run)
    llm = llm_of(model, tokenizer)
    assert "its logits over KV cache blocks are not its own" in llm.engine_info.reason
    llm.unload()


def test_nothing_is_left_on_the_experts(tokenizer: Any) -> None:
    model = make_mixture("qwen3_moe", dtype=torch.bfloat16)
    llm = llm_of(model, tokenizer)
    assert llm.engine_info.name == "fast"
    forwards = [module.__dict__.get("forward") for module in model.modules() if is_experts(module)]
    assert len(forwards) == 2
    assert not any(isinstance(forward, ForwardPatch) for forward in forwards)
    llm.unload()


class OtherRounding:
    """The kernels in plain torch, whose norms round some numbers to the neighbour."""

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        total, normed = reference.add_rms_norm(x, residual, *args, **kwargs)
        signs = torch.where(torch.arange(normed.shape[-1]) % 8 == 0, 1 + 2**-8, 1.0)
        return total, (normed * signs).to(normed.dtype)


def test_layers_are_fused_where_the_rounding_of_a_norm_changes_an_expert() -> None:
    fused = []
    for seed in range(3):
        model = make_mixture("qwen3_moe", seed=seed, dtype=torch.bfloat16, num_hidden_layers=4)
        with torch.no_grad():
            for layer in model.model.layers:  # experts that rounding decides between
                layer.mlp.gate.weight[1:] = layer.mlp.gate.weight[:1]
                layer.mlp.gate.weight += 2**-10 * torch.randn_like(layer.mlp.gate.weight)
                layer.mlp.experts.down_proj *= 8
        kernels = {"linear_kernels": linear_reference, "experts_kernels": experts_reference}
        fusion = Fusion(model, kernels=OtherRounding(), **kernels)
        fused += [kind.fused for kind in fusion.summary if kind.kind == RESIDUAL]
        fusion.close()
    assert fused == [4, 4, 4]
