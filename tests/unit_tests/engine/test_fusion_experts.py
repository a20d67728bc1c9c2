"""Experts in the engine's forwards: the same texts by the kernels' plain version as by the model's own experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from langchain_quantllm.compat.transformers_experts import is_experts
from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.engine.cuda_graphs import WaitFinder
from langchain_quantllm.engine.fusion.experts import gating_of
from langchain_quantllm.engine.fusion.fuse import EXPERTS, FusedKind, Fusion
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.experts.module import replace_weights
from langchain_quantllm.experts.stacked import StackedLinear
from langchain_quantllm.kernels import reference
from langchain_quantllm.kernels.experts import reference as experts_reference
from langchain_quantllm.kernels.experts.gating import GELU, RELU_SQUARED, SILU, Gating
from langchain_quantllm.kernels.experts.weights import FloatStack, Int8Stack
from langchain_quantllm.kernels.linear import reference as linear_reference
from tests.support.families import FAST, family_model, generated_ids, random_ids
from tests.support.fusion import forwards_in, in_engine, logits_of, write
from tests.support.mixtures import HIDDEN, VOCAB, make_mixture
from tests.support.models import pipeline_of

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "granitemoe", "afmoe", "mixtral-eager")
"""Families that the fast engine writes with."""

MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss", "aria", "nemotron_h", "deepseek_v3")


class CountedExperts:
    """The kernels of experts in plain torch, with the tokens of each call."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def experts(self, x: torch.Tensor, *given: Any) -> torch.Tensor:
        self.tokens.append(len(x))
        return experts_reference.experts(x, *given)


def fuse(model: Any, kernels: Any = experts_reference, **options: Any) -> Fusion:
    return Fusion(model, kernels=reference, linear_kernels=linear_reference, experts_kernels=kernels, **options)


def found_in(fusion: Fusion) -> FusedKind:
    assert fusion.unsupported_reason is None
    return next(kind for kind in fusion.summary if kind.kind == EXPERTS)


def experts_in(model: Any) -> list[Any]:
    return [module for module in model.modules() if is_experts(module)]


def quantize(experts: Any) -> None:
    """Replace the weights of experts by int8."""
    stacks = {}
    for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        values = getattr(experts, name).detach()
        values = values.transpose(1, 2) if experts.is_transposed else values
        scales = values.abs().amax(-1)
        codes = (values / scales[..., None] * 127).round().to(torch.int8).contiguous()
        stacks[name] = StackedLinear(
            Int8Stack(
                in_features=values.shape[2],
                out_features=values.shape[1],
                words=codes.flatten(1).view(torch.int32),
                scales=scales,
                bias=getattr(experts, f"{name}_bias").detach() if experts.has_bias else None,
            )
        )
    replace_weights(experts, stacks)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_writes_the_same(name: str, tokenizer: Any) -> None:
    model = family_model(FAST[name])
    prompts = [random_ids(count) for count in (23, 5, 40)]
    expected = [generated_ids(model, prompt, 16) for prompt in prompts]
    kernels = CountedExperts()
    fusion = fuse(model, kernels)
    layers = len(experts_in(model))
    assert found_in(fusion) == FusedKind(kind=EXPERTS, fused=layers, left={})
    engine = ContinuousEngine(pipeline_of(model, tokenizer), fusion=fusion)
    kernels.tokens.clear()
    assert write(engine, prompts, 16) == expected
    assert len(kernels.tokens) >= 16 * layers
    assert engine.info.fused[EXPERTS] == layers
    engine.close()
    fusion.close()
    assert forwards_in(model) == []


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_same_logits_as_the_models_own_experts(kind: str, quantized: bool) -> None:
    model = make_mixture(kind, **({"num_key_value_heads": 4} if kind == "deepseek_v3" else {}))
    layers = experts_in(model)
    assert layers
    if quantized:
        for experts in layers:
            quantize(experts)
    ids = [i % VOCAB for i in random_ids(19)]
    expected = logits_of(model, ids)
    kernels = CountedExperts()
    fusion = fuse(model, kernels, kinds=(EXPERTS,))
    assert found_in(fusion) == FusedKind(kind=EXPERTS, fused=len(layers), left={})
    kernels.tokens.clear()
    with in_engine(fusion):
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert kernels.tokens == [19] * len(layers)
    assert torch.equal(logits_of(model, ids), expected)


def test_experts_stay_as_they_are_without_kernels_for_them(tokenizer: Any) -> None:
    model = family_model(FAST["qwen3_moe"])
    fusion = fuse(model, None)
    assert found_in(fusion) == FusedKind(kind=EXPERTS, fused=0, left={})
    engine = ContinuousEngine(pipeline_of(model, tokenizer), fusion=fusion)
    assert "experts" not in engine.info.reason
    engine.close()


def test_an_unknown_function_is_left_alone_in_the_open(tokenizer: Any) -> None:
    model = family_model(FAST["qwen3_moe"])
    for experts in experts_in(model):
        experts.act_fn = torch.nn.Softplus()
    fusion = fuse(model)
    found = found_in(fusion)
    assert found.fused == 0
    assert found.left == {"what it computes between its two products is unknown": 2}
    engine = ContinuousEngine(pipeline_of(model, tokenizer), fusion=fusion)
    assert "no experts steps are fused: what it computes between its two products is unknown" in engine.info.reason
    engine.close()


def test_experts_that_compute_something_else_are_left_alone() -> None:
    model = make_mixture("qwen3_moe")
    first, second = experts_in(model)
    kind = type(first)
    # Its own forward doubles what its weights and its function say.
    second.__class__ = type("Doubled", (kind,), {"forward": lambda self, *args: 2 * kind.forward(self, *args)})
    found = found_in(fuse(model, kinds=(EXPERTS,)))
    assert found.fused == 1
    [(reason, count)] = found.left.items()
    assert count == 1
    assert "it gives something else" in reason


def test_weights_of_an_unknown_kind_are_left_alone() -> None:
    model = make_mixture("qwen3_moe")
    for experts in experts_in(model):
        weight = experts.down_proj.detach()
        del experts.down_proj
        experts.down_proj = weight  # an attribute that is no parameter
    found = found_in(fuse(model, kinds=(EXPERTS,)))
    assert found.left == {"its weights are stored in a way that has no kernel": 2}


def test_other_arguments_reach_the_models_own_experts() -> None:
    model = make_mixture("qwen3_moe")
    kernels = CountedExperts()
    fusion = fuse(model, kernels, kinds=(EXPERTS,))
    experts = experts_in(model)[0]
    x, index, weights = torch.randn(3, 64), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    kernels.tokens.clear()
    with torch.no_grad(), in_engine(fusion):
        by_step = experts(x, index, weights)
        by_name = experts(x, top_k_index=index, top_k_weights=weights)
    assert kernels.tokens == [3]
    torch.testing.assert_close(by_step, by_name, rtol=1e-4, atol=1e-5)


def test_numbers_of_no_expert_count_as_nothing() -> None:
    stack = FloatStack(in_features=8, out_features=16, values=torch.randn(2, 16, 8))
    second = FloatStack(in_features=8, out_features=8, values=torch.randn(2, 8, 8))
    x, weights = torch.randn(2, 8), torch.rand(2, 2)
    gating = Gating(activation=SILU)
    found = experts_reference.experts(x, [stack], second, torch.tensor([[1, 2], [2, 2]]), weights, gating)
    alone = experts_reference.experts(x[:1], [stack], second, torch.tensor([[1]]), weights[:1, :1], gating)
    assert torch.equal(found[0], alone[0])
    assert not found[1].any()


def test_the_function_is_found_by_its_values() -> None:
    def of(kind: str, **attributes: Any) -> Gating:
        module = copy.copy(experts_in(make_mixture(kind))[0])
        for name, value in attributes.items():
            setattr(module, name, value)
        return gating_of(module, torch.device("cpu"))

    assert of("qwen3_moe") == Gating(activation=SILU)
    assert of("qwen3_moe", act_fn=torch.nn.GELU()) == Gating(activation=GELU)
    assert of("nemotron_h") == Gating(activation=RELU_SQUARED, is_gated=False)
    assert of("gpt_oss") == Gating(activation=SILU, is_interleaved=True, alpha=1.702, limit=7.0, shift=1.0)
    assert of("gpt_oss", limit=3.5, alpha=1.25) == Gating(
        activation=SILU, is_interleaved=True, alpha=1.25, limit=3.5, shift=1.0
    )


def test_a_limit_that_no_number_shows_is_not_overlooked() -> None:
    experts = experts_in(make_mixture("qwen3_moe"))[0]
    experts._apply_gate = lambda outputs: outputs.chunk(2, -1)[0].clamp(max=900.0) * outputs.chunk(2, -1)[1]
    with pytest.raises(UnsupportedError, match="unknown"):
        gating_of(experts, torch.device("cpu"))


def test_an_activation_with_hooks_is_left_alone() -> None:
    experts = experts_in(make_mixture("qwen3_moe"))[0]
    experts.act_fn = torch.nn.SiLU()
    experts.act_fn.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(UnsupportedError, match="hooks"):
        gating_of(experts, torch.device("cpu"))


class QuietExperts:
    """Experts without operations of PyTorch once they are verified, as the kernels on a GPU have none."""

    def __init__(self) -> None:
        self.is_verified = False

    def experts(self, x: torch.Tensor, *given: Any) -> torch.Tensor:
        return torch.zeros_like(x) if self.is_verified else experts_reference.experts(x, *given)


@pytest.mark.parametrize("kind", MIXTURES)
def test_nothing_around_the_experts_makes_the_host_wait(kind: str) -> None:
    model = make_mixture(kind, **({"num_key_value_heads": 4} if kind == "deepseek_v3" else {}))
    for experts in experts_in(model):
        quantize(experts)
    kernels = QuietExperts()
    fusion = fuse(model, kernels, kinds=(EXPERTS,))
    kernels.is_verified = True
    block = next(module for module in model.modules() if any(map(is_experts, module.children())))
    x = torch.randn(1, 3, HIDDEN)
    with torch.no_grad(), WaitFinder() as own:
        block(x)
    assert own.found is not None, "the plain version waits"
    with torch.no_grad(), in_engine(fusion), WaitFinder() as watched:
        block(x)
    assert watched.found is None
