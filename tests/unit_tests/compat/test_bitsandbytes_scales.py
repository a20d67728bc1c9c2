"""Scales of least error in bitsandbytes' own format, read and multiplied by bitsandbytes itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from langchain_quantllm.compat.bitsandbytes import keep_odd_layers_unpacked
from langchain_quantllm.compat.bitsandbytes_scales import refine_scales

bnb = pytest.importorskip("bitsandbytes")


def quantized(kind: str, outputs: int, inputs: int, **options: Any) -> tuple[Any, torch.Tensor]:
    """Make a 4-bit layer, and return it with its plain weight."""
    plain = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.float32, quant_type=kind)
    layer.weight = bnb.nn.Params4bit(plain.clone(), requires_grad=False, quant_type=kind, **options).to("cpu")
    return layer, plain


def relative_error(layer: Any, plain: torch.Tensor) -> float:
    held = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return float((held - plain).square().sum() / plain.square().sum())


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.85), ("fp4", 0.95)])
@pytest.mark.parametrize("nested", [False, True])
def test_the_error_is_less_and_the_size_the_same(kind: str, most: float, nested: bool) -> None:
    layer, plain = quantized(kind, 64, 256, compress_statistics=nested)
    state = layer.weight.quant_state
    before, shapes = relative_error(layer, plain), (layer.weight.shape, state.absmax.shape, state.absmax.dtype)
    refine_scales(layer.weight, plain)
    assert relative_error(layer, plain) < most * before
    assert (layer.weight.shape, state.absmax.shape, state.absmax.dtype) == shapes


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 256), (30, 34), (3, 10), (5, 7)])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_bitsandbytes_multiplies_by_what_it_reads(outputs: int, inputs: int, storage: torch.dtype) -> None:
    if storage is torch.bfloat16 and outputs * inputs % 4:
        pytest.skip("bitsandbytes packs whole numbers of the storage's dtype")
    layer, plain = quantized("nf4", outputs, inputs, quant_storage=storage)
    before = relative_error(layer, plain)
    refine_scales(layer.weight, plain)
    assert relative_error(layer, plain) < before
    held = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(1))
    keep_odd_layers_unpacked(nn.Sequential(layer))
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), x @ held.T, rtol=0.02, atol=0.05 * inputs**0.5)  # bfloat16 inside


def test_zeros_stay_zeros() -> None:
    layer, plain = quantized("nf4", 8, 64)
    plain[3] = 0
    refine_scales(layer.weight, plain)
    held = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert not held[3].any()
    assert held.isfinite().all()


def test_another_shape_is_refused() -> None:
    layer, plain = quantized("nf4", 8, 64)
    with pytest.raises(ValueError, match=r"\(8, 64\)"):
        refine_scales(layer.weight, plain.T)
