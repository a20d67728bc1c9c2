"""Single matrices of bitsandbytes: quantized as its layers do it, and stored as its layers store themselves."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch

from langchain_quantllm.compat.bitsandbytes_matrices import (
    FOUR_BIT_NAMES,
    INT8_NAMES,
    quantize_four_bit,
    quantize_int8,
    read_four_bit,
    stored_four_bit,
    stored_int8,
)
from langchain_quantllm.compat.bitsandbytes_scales import refine_scales

WEIGHT = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("kind", "least_error"), [("nf4", False), ("nf4", True), ("fp4", False)])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_are_stored_as_a_layer_stores_itself(kind: str, nested: bool, least_error: bool) -> None:
    layer = bitsandbytes.nn.Linear4bit(256, 128, bias=False, quant_type=kind, compress_statistics=nested)
    layer.weight = bitsandbytes.nn.Params4bit(
        WEIGHT.clone(), requires_grad=False, quant_type=kind, compress_statistics=nested
    )
    layer = layer.to("cpu")
    if least_error:
        refine_scales(layer.weight, WEIGHT)
    expected = dict(layer.state_dict())
    octets, state = quantize_four_bit(WEIGHT, kind, nested=nested, least_error=least_error)
    found = stored_four_bit(octets, state, dtype=torch.float32, storage=torch.uint8)
    assert found.keys() == expected.keys() <= set(FOUR_BIT_NAMES)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    again, read = read_four_bit(found)
    assert torch.equal(again, octets)
    assert torch.equal(read.scales, state.scales)
    assert (read.nested is not None) == nested
    if read.nested is not None and state.nested is not None:
        assert read.nested.offset == state.nested.offset
        assert torch.equal(read.nested.scales, state.nested.scales)


def test_eight_bits_are_stored_as_a_layer_stores_itself() -> None:
    layer = bitsandbytes.nn.Linear8bitLt(256, 128, bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(WEIGHT.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    expected = dict(layer.state_dict())
    if "SCB" not in expected:  # quantized on an accelerator alone
        codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(WEIGHT.half())
        expected = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    found = stored_int8(*quantize_int8(WEIGHT))
    assert found.keys() == expected.keys() == set(INT8_NAMES)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
