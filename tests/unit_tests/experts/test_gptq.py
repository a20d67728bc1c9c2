"""Experts in GPTQ's format: the stack stands for the weights of the packed layers, and is taken apart again."""

from __future__ import annotations

import pytest
import torch

from langchain_quantllm.experts.gptq import from_awq, gptq_layers, gptq_stack, to_awq
from langchain_quantllm.kernels.experts.reference import dequantize
from langchain_quantllm.kernels.experts.weights import GPTQStack
from tests.support.gptq_checkpoints import packed_as, round_linear
from tests.support.packed_experts import pack_awq

EXPERTS, INPUTS, OUTPUTS = 3, 64, 32


def parts(
    *, bits: int = 4, sym: bool = True, desc_act: bool = False, own_order: bool = False, version: str = "gptq"
) -> tuple[list[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """Return the packed layers of two parts, and the weights that they stand for."""
    packed, weights = [], []
    for part in range(2):
        torch.manual_seed(part)
        layers = [
            round_linear(
                torch.randn(OUTPUTS, INPUTS), bits=bits, group_size=32, desc_act=desc_act, sym=sym,
                seed=expert + 10 * part * own_order,
            )
            for expert in range(EXPERTS)
        ]  # fmt: skip
        tensors = [packed_as(layer, version) for layer in layers]
        packed.append({name: torch.stack([own[name] for own in tensors]) for name in tensors[0]})
        weights.append(torch.stack([layer.dequantize() for layer in layers]))
    return packed, weights


def weights_of(stack: GPTQStack) -> torch.Tensor:
    return torch.stack([dequantize(stack, expert, torch.float32) for expert in range(stack.experts)])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_a_stack_has_the_weights_of_its_layers(bits: int, sym: bool, version: str) -> None:
    packed, weights = parts(bits=bits, sym=sym, version=version)
    stack = gptq_stack(packed, bits=bits, zeros_minus_one=version == "gptq")
    assert torch.equal(weights_of(stack), torch.cat(weights, dim=1))
    assert (stack.group_size, stack.zero_point) == (32, 2 ** (bits - 1) if sym else -1)


def test_a_zero_point_of_zero_is_read_from_v1_which_stores_it_as_the_largest_code() -> None:
    packed, _ = parts(sym=False)
    packed[0]["qzeros"] = torch.full_like(packed[0]["qzeros"], -1)
    stack = gptq_stack(packed[:1], bits=4, zeros_minus_one=True)
    assert stack.zero_point == 0
    assert not stack.zeros.any()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
def test_a_stack_is_taken_apart_into_the_same_layers(interleaved: bool, desc_act: bool) -> None:
    packed, _ = parts(sym=False, desc_act=desc_act)
    stack = gptq_stack(packed, bits=4, zeros_minus_one=True, interleaved=interleaved)
    again = gptq_layers(stack, parts=2, zeros_minus_one=True, interleaved=interleaved)
    for own, found in zip(packed, again, strict=True):
        assert all(torch.equal(own[name], found[name]) for name in own)


def test_interleaved_parts_alternate_outputs() -> None:
    packed, weights = parts(sym=False)
    stack = gptq_stack(packed, bits=4, zeros_minus_one=True, interleaved=True)
    assert torch.equal(weights_of(stack)[:, ::2], weights[0])
    assert torch.equal(weights_of(stack)[:, 1::2], weights[1])


def test_parts_with_orders_of_their_own_share_finer_groups() -> None:
    packed, weights = parts(sym=False, desc_act=True, own_order=True)
    assert not torch.equal(packed[0]["g_idx"], packed[1]["g_idx"])
    stack = gptq_stack(packed, bits=4, zeros_minus_one=True)
    assert torch.equal(weights_of(stack), torch.cat(weights, dim=1))
    assert stack.group_size == 0
    assert stack.scales.shape[1] == 4


def test_layers_of_awq_are_repacked_without_a_change_of_a_weight_and_back() -> None:
    layers = [
        round_linear(torch.randn(OUTPUTS, INPUTS), bits=4, group_size=32, desc_act=False, sym=False)
        for _ in range(EXPERTS)
    ]
    awq = {
        "qweight": torch.stack([pack_awq(layer.codes) for layer in layers]),
        "qzeros": torch.stack([pack_awq(layer.zeros) for layer in layers]),
        "scales": torch.stack([layer.scales for layer in layers]),
    }
    part = from_awq(awq)
    stack = gptq_stack([part], bits=4, zeros_minus_one=False)
    assert torch.equal(weights_of(stack), torch.stack([layer.dequantize() for layer in layers]))
    assert all(torch.equal(awq[name], tensor) for name, tensor in to_awq(part).items())
