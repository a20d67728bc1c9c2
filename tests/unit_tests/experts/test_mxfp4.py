"""Experts in mxfp4: blocks and scales of a checkpoint, and rounding to them."""

from __future__ import annotations

import torch

from langchain_quantllm.experts.mxfp4 import mxfp4_blocks, mxfp4_stack, round_to_mxfp4
from langchain_quantllm.kernels.experts.reference import E2M1, dequantize

VALUES = torch.tensor(E2M1)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Round a weight of one expert, and return what it stands for."""
    blocks, scales = round_to_mxfp4(weight[None])
    return dequantize(mxfp4_stack(blocks, scales), 0, torch.float32)


def test_blocks_and_scales_go_into_a_stack_and_back() -> None:
    blocks = torch.randint(0, 256, (2, 8, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 8, 3), dtype=torch.uint8)
    stack = mxfp4_stack(blocks, scales)
    assert (stack.in_features, stack.out_features, stack.experts) == (96, 8, 2)
    again = mxfp4_blocks(stack)
    assert torch.equal(again[0], blocks)
    assert torch.equal(again[1], scales)


def test_every_value_of_the_format_is_kept() -> None:
    weight = torch.stack([torch.cat([VALUES, VALUES]) * 2.0**e for e in range(-20, 20)])
    assert torch.equal(rounded(weight), weight)


def test_each_weight_becomes_the_nearest_value_of_its_block() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64) * torch.logspace(-3, 3, 16)[:, None]
    grouped = weight.view(16, 2, 32)
    scales = 2 ** (torch.floor(torch.log2(grouped.abs().amax(-1, keepdim=True))) - 2)
    distances = (grouped.unsqueeze(-1) - scales.unsqueeze(-1) * VALUES).abs()
    expected = VALUES[distances.argmin(-1)] * scales
    torch.testing.assert_close(rounded(weight), expected.view(16, 64), rtol=0, atol=0)


def test_a_weight_in_the_middle_goes_to_the_even_code() -> None:
    weight = torch.zeros(1, 32)
    weight[0, :8] = torch.tensor([4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert rounded(weight)[0, :8].tolist() == [4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_a_block_of_zeros_stays_zero() -> None:
    assert not rounded(torch.zeros(4, 32)).any()
