"""Experts with quantized weights inside a model of transformers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers

from langchain_quantllm.compat.bitsandbytes_matrices import quantize_four_bit, quantize_int8
from langchain_quantllm.experts.bitsandbytes import four_bit_stack, int8_stack
from langchain_quantllm.experts.module import replace_weights
from langchain_quantllm.experts.stacked import StackedLinear
from langchain_quantllm.kernels.experts.weights import FloatStack, Int8Stack, Mxfp4Stack

EXPERTS, HIDDEN, INNER = 4, 32, 64


def experts_of(kind: str) -> Any:
    """Make the experts of a tiny model."""
    torch.manual_seed(0)
    if kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(
            hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=2,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=50,
        )  # fmt: skip
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        config = transformers.GptOssConfig(
            hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=2,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=50, head_dim=16,
        )  # fmt: skip
        model = transformers.GptOssForCausalLM(config)
    experts = model.model.layers[0].mlp.experts
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.eval()


def float_stacks(experts: Any) -> dict[str, StackedLinear]:
    """Return the weights of experts as stacks."""
    stacks = {}
    for name in ("gate_up_proj", "down_proj"):
        values = getattr(experts, name).detach()
        values = values.transpose(1, 2) if experts.is_transposed else values
        bias = getattr(experts, f"{name}_bias").detach() if experts.has_bias else None
        _, outputs, inputs = values.shape
        stacks[name] = StackedLinear(FloatStack(in_features=inputs, out_features=outputs, values=values, bias=bias))
    return stacks


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_replaced_experts_give_what_the_models_own_give_for_the_same_weights(kind: str) -> None:
    experts = experts_of(kind)
    x = torch.randn(7, HIDDEN)
    index = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 3], [2, 0], [3, 1]])
    weights = torch.rand(7, 2)
    with torch.no_grad():
        expected = experts(x, index, weights)
        replace_weights(experts, float_stacks(experts))
        found = experts(x, index, weights)
    assert not list(experts.parameters())
    torch.testing.assert_close(found, expected)


def test_experts_stay_of_their_class() -> None:
    experts = experts_of("qwen3_moe")
    before = type(experts)
    replace_weights(experts, float_stacks(experts))
    assert isinstance(experts, before)
    assert experts.num_experts == EXPERTS


def test_int8_weights_are_codes_times_scales() -> None:
    codes = torch.randint(-127, 128, (EXPERTS, 8, 16), dtype=torch.int8)
    scales = torch.rand(EXPERTS, 8)
    stack = Int8Stack(in_features=16, out_features=8, words=codes.view(torch.int32).flatten(1), scales=scales)
    for expert in range(EXPERTS):
        expected = codes[expert].double() * scales[expert, :, None].double() / 127
        torch.testing.assert_close(StackedLinear(stack).dequantize(expert, torch.float64), expected)


def test_mxfp4_weights_are_those_of_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (EXPERTS, 8, 2, 16), dtype=torch.uint8)
    scales = torch.randint(120, 131, (EXPERTS, 8, 2), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    stack = Mxfp4Stack(in_features=64, out_features=8, words=blocks.flatten(2).view(torch.int32), scales=scales)
    for expert in range(EXPERTS):
        torch.testing.assert_close(StackedLinear(stack).dequantize(expert, torch.float32), expected[expert])


def test_weights_move_with_the_model() -> None:
    experts = experts_of("gpt_oss")
    replace_weights(experts, float_stacks(experts))
    moved = experts.to(torch.float64)
    assert moved.down_proj.stack.values.dtype == torch.float64
    assert moved.down_proj.stack.bias.dtype == torch.float64


@torch.no_grad()
def test_quantized_experts_are_pickled_copied_and_moved_as_other_modules() -> None:
    experts = experts_of("gpt_oss")
    stacks = {}
    for name in ("gate_up_proj", "down_proj"):
        weight, bias = getattr(experts, name).detach(), getattr(experts, f"{name}_bias").detach()
        matrices = [quantize_four_bit(matrix.t().contiguous(), "nf4", nested=True) for matrix in weight]
        stacks[name] = StackedLinear(four_bit_stack(matrices, bias))
    replace_weights(experts, stacks)
    x, index, weights = torch.randn(3, HIDDEN), torch.tensor([[0, 1], [2, 3], [3, 0]]), torch.rand(3, 2)
    expected = experts(x, index, weights)
    for again in (pickle.loads(pickle.dumps(experts)), copy.deepcopy(experts)):
        assert type(again) is type(experts)
        assert torch.equal(again(x, index, weights), expected)
    fresh = copy.deepcopy(experts)
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    assert not torch.equal(fresh(x, index, weights), expected)
    fresh.load_state_dict(experts.state_dict())
    assert torch.equal(fresh(x, index, weights), expected)
    assert {t.device.type for t in copy.deepcopy(experts).to("meta").state_dict().values()} == {"meta"}


@torch.no_grad()
def test_another_dtype_is_that_of_the_biases_and_not_of_the_scales() -> None:
    torch.manual_seed(0)
    matrices = [quantize_int8(torch.randn(8, 16)) for _ in range(2)]
    stacked = StackedLinear(int8_stack(matrices, torch.randn(2, 8))).to(torch.bfloat16)
    assert stacked.scales.dtype == torch.float32
    assert stacked.words.dtype == torch.int32
    assert stacked.bias.dtype == torch.bfloat16
