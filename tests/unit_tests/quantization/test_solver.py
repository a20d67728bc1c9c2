"""GPTQ of single weights, and the packed format."""

from __future__ import annotations

import pytest
import torch

from langchain_quantllm.kernels.linear.bit_packing import pack_bits, unpack_bits
from langchain_quantllm.quantization.packing import RoundedLinear
from langchain_quantllm.quantization.solver import InputStatistics, solve
from tests.support.quantization import rounding


def correlated_inputs(seed: int = 0, tokens: int = 512, features: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, features, generator=generator) @ torch.randn(features, features, generator=generator)
    return mixed * torch.rand(features, generator=generator)


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics(inputs.shape[-1], "cpu")
    for part in inputs.split(100):
        statistics.add(part)
    return statistics


# --- the packed format ---


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_packed_as_one_stream_of_bits(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (6, 96), dtype=torch.uint8, generator=generator)
    words = pack_bits(codes, bits)
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        stream = sum(code << bits * i for i, code in enumerate(row))  # the first code in the lowest bits
        assert sum((word % 2**32) << 32 * i for i, word in enumerate(packed)) == stream
    assert torch.equal(unpack_bits(words, bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_a_packed_layer_is_read_back(bits: int, sym: bool) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    rounded = solve(weight, statistics_of(correlated_inputs()), rounding(bits=bits, sym=sym, desc_act=True))
    again = RoundedLinear.unpack(rounded.pack(), bits)
    assert torch.equal(again.dequantize(), rounded.dequantize())
    assert torch.equal(again.zeros, rounded.zeros)


# --- the arithmetic ---


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("group_size", [32, -1, 256])
def test_outputs_change_less_than_by_rounding_to_nearest(bits: int, sym: bool, desc_act: bool, group_size: int) -> None:
    inputs = correlated_inputs(features=256)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    how = rounding(bits=bits, sym=sym, desc_act=desc_act, group_size=group_size)

    def error(statistics: InputStatistics | None) -> float:
        rounded = solve(weight, statistics, how).dequantize()
        return float((inputs @ (rounded - weight).t()).norm() / (inputs @ weight.t()).norm())

    assert error(statistics_of(inputs)) < 0.8 * error(None)


def test_without_inputs_each_weight_is_rounded_to_its_nearest_code() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    rounded = solve(weight, None, rounding(sym=False))
    scales = rounded.scales.float()[rounded.g_idx.long()].t()
    zeros = rounded.zeros.float()[rounded.g_idx.long()].t()
    nearest = ((weight / scales + zeros).round().clamp(0, 15) - zeros) * scales
    assert torch.allclose(rounded.dequantize(), nearest)
    assert torch.equal(solve(weight, InputStatistics(64, "cpu"), rounding(sym=False)).codes, rounded.codes)


def test_weights_that_are_codes_already_stay_unchanged() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (128, 64), generator=generator).float()
    codes[::32], codes[1::32] = 0, 15  # so that every group has the whole range
    weight = ((codes - 8) * 0.0625).t()
    rounded = solve(weight, statistics_of(correlated_inputs()), rounding(sym=False))
    assert torch.allclose(rounded.dequantize(), weight, atol=1e-6)


def test_scales_are_numbers_of_both_dtypes_of_16_bits() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(4))
    scales = solve(weight, statistics_of(correlated_inputs()), rounding()).scales
    assert scales.dtype == torch.float16
    assert torch.equal(scales.bfloat16().half(), scales)


def test_groups_of_neighbours_unless_ordered_by_activation() -> None:
    inputs = correlated_inputs()
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(5))
    in_order = torch.arange(128, dtype=torch.int32) // 32
    assert torch.equal(solve(weight, statistics_of(inputs), rounding()).g_idx, in_order)
    by_size = solve(weight, statistics_of(inputs), rounding(desc_act=True)).g_idx
    sizes = statistics_of(inputs).hessian.diagonal()
    assert sizes[by_size == 0].min() >= sizes[by_size == 1].max()


def test_weights_of_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    inputs = correlated_inputs()
    inputs[:, 40:60] = 0
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(6))
    rounded = solve(weight, statistics_of(inputs), rounding())
    scales = rounded.scales.float()[rounded.g_idx.long()].t()
    error = (rounded.dequantize() - weight).abs()[:, 40:60]
    clipped = ((weight / scales + 8).round() != (weight / scales + 8).round().clamp(0, 15))[:, 40:60]
    assert (error[~clipped] <= 0.501 * scales[:, 40:60][~clipped]).all()


def test_statistics_are_the_same_for_any_batches_of_the_inputs() -> None:
    inputs = correlated_inputs()
    whole = InputStatistics(128, "cpu")
    whole.add(inputs.view(4, 128, 128))
    assert torch.allclose(whole.hessian, statistics_of(inputs).hessian, rtol=1e-4, atol=1e-3)
    assert torch.allclose(whole.hessian, 2 * inputs.t() @ inputs / len(inputs), rtol=1e-4, atol=1e-3)


def test_inputs_of_rank_one_are_damped_until_they_can_be_used() -> None:
    inputs = torch.randn(300, 1, generator=torch.Generator().manual_seed(7)) @ torch.ones(1, 128)
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(8))
    rounded = solve(weight, statistics_of(inputs), rounding(damping=1e-12)).dequantize()
    assert rounded.isfinite().all()
    nearest = solve(weight, None, rounding()).dequantize()
    assert (inputs @ (rounded - weight).t()).norm() < (inputs @ (nearest - weight).t()).norm()
