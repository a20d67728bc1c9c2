"""oneDNN's product of float32 matrices, checked on PyTorch itself."""

from __future__ import annotations

import pytest
import torch

from langchain_quantllm.compat import onednn


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_pytorch_has_the_product() -> None:
    assert onednn.has_linear()


@pytest.mark.skipif(not onednn.has_linear(), reason="this PyTorch has no such product")
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_rows_are_multiplied_by_weights_of_any_strides(rows: int) -> None:
    x, weight = torch.randn(rows, 33), torch.randn(7, 33)
    expected = (x.double() @ weight.double().t()).float()
    for given in (weight, weight.t().contiguous().t()):
        torch.testing.assert_close(onednn.linear(x, given), expected, rtol=1e-5, atol=1e-5)
