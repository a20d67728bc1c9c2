"""PyTorch's products with 4 and 8 bits on a CPU, checked on PyTorch itself."""

from __future__ import annotations

import sys

import pytest
import torch

from langchain_quantllm.compat import torch_products


@pytest.mark.skipif(sys.platform == "win32", reason="slow there, and not used")
def test_pytorch_multiplies_by_8_bits() -> None:
    product = torch_products.int8_product()
    assert product is not None
    codes = torch.randint(-127, 128, (40, 64), dtype=torch.int8)
    x, scales = torch.randn(3, 64).bfloat16(), torch.rand(40).bfloat16()
    expected = x.float() @ (codes.float() * scales.float()[:, None]).t()
    torch.testing.assert_close(product(x, codes, scales).float(), expected, rtol=2**-7, atol=0.5)


def test_pytorch_multiplies_by_4_bits_in_groups() -> None:
    product = torch_products.int4_product()
    assert product is not None
    codes = torch.randint(0, 16, (96, 128), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    x, pairs = torch.randn(3, 128).bfloat16(), torch.rand(2, 96, 2).bfloat16()
    scales, offsets = (pairs[..., i].float().repeat_interleave(64, 0).t() for i in range(2))
    expected = x.float() @ ((codes.float() - 8) * scales + offsets).t()
    torch.testing.assert_close(product(x, packed, 64, pairs).float(), expected, rtol=2**-6, atol=0.5)
