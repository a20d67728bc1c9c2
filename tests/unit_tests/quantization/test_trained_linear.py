"""A rounded layer in training: its gradients, the codes that places stand for, and groups in any order."""

from __future__ import annotations

import pytest
import torch

from langchain_quantllm.quantization.packing import RoundedLinear
from langchain_quantllm.quantization.solver import InputStatistics, solve
from langchain_quantllm.quantization.trained_linear import TrainedLinear
from tests.support.quantization import rounding

INPUTS, OUTPUTS = 64, 24


def weight_and(seed: int = 0, **options: object) -> tuple[torch.Tensor, RoundedLinear]:
    """A random weight, and what the solver makes of it."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    statistics = InputStatistics(INPUTS, "cpu")
    statistics.add(torch.randn(200, INPUTS, generator=generator) * torch.linspace(0.1, 3, INPUTS).flip(0))
    return weight, solve(weight, statistics, rounding(**options))


def each_kind() -> pytest.MarkDecorator:
    kinds = [{}, {"sym": False}, {"desc_act": True}, {"bits": 8}, {"bits": 2, "group_size": -1}]
    return pytest.mark.parametrize("options", kinds, ids=str)


@each_kind()
@pytest.mark.parametrize("trains_codes", [False, True])
def test_untrained_it_is_the_rounded_layer(options: dict[str, object], trains_codes: bool) -> None:
    weight, rounded = weight_and(**options)
    bias = torch.randn(OUTPUTS)
    layer = TrainedLinear(rounded, bias=bias, weight=weight if trains_codes else None)
    x = torch.randn(2, 5, INPUTS)
    torch.testing.assert_close(layer(x), x @ rounded.dequantize().t() + bias)
    again = layer.rounded()
    assert torch.equal(again.codes, rounded.codes)
    assert torch.equal(again.dequantize(), rounded.dequantize())


@each_kind()
def test_gradients_are_those_of_the_dequantized_weight(options: dict[str, object]) -> None:
    _, rounded = weight_and(**options)
    layer = TrainedLinear(rounded, bias=None, weight=None)
    x = torch.randn(5, INPUTS, requires_grad=True)
    change = torch.zeros_like(layer.change, requires_grad=True)
    centered = (rounded.codes.float() - rounded.zeros.float()[rounded.group_of]) * rounded.scales.float()[
        rounded.group_of
    ]
    expected = x @ (centered * (1 + change)[rounded.group_of])
    grad = torch.randn(5, OUTPUTS)
    ours = torch.autograd.grad(layer(x), (x, layer.change), grad)
    theirs = torch.autograd.grad(expected, (x, change), grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@each_kind()
def test_products_of_16_bits_give_outputs_and_gradients_of_the_dtype_of_the_inputs(options: dict[str, object]) -> None:
    _, rounded = weight_and(**options)
    bias, grad, x = torch.randn(OUTPUTS), torch.randn(5, OUTPUTS), torch.randn(5, INPUTS)

    def results(dtype: torch.dtype | None) -> list[torch.Tensor]:
        layer = TrainedLinear(rounded, bias=bias, weight=None, product_dtype=dtype)
        inputs = x.clone().requires_grad_()
        outputs = layer(inputs)
        return [outputs.detach(), *torch.autograd.grad(outputs, (inputs, layer.change), grad)]

    for exact, found in zip(results(None), results(torch.bfloat16), strict=True):
        assert found.dtype == torch.float32
        assert 0 < (found - exact).norm() < 0.01 * exact.norm()


@each_kind()
def test_codes_follow_the_gradient_within_their_range(options: dict[str, object]) -> None:
    weight, rounded = weight_and(**options)
    layer = TrainedLinear(rounded, bias=None, weight=weight)
    x = torch.randn(50, INPUTS)
    wanted = x @ weight.t()
    before = float((layer(x) - wanted).square().mean())
    for step in range(60):
        layer.step = 0.02 * (1 - step / 60)
        (layer(x) - wanted).square().mean().backward()
    trained = layer.rounded()
    after = float((x @ trained.dequantize().t() - wanted).square().mean())
    assert after < 0.9 * before
    assert not torch.equal(trained.codes, rounded.codes)
    assert int(trained.codes.max()) < 2**rounded.bits
    assert torch.equal(trained.zeros, rounded.zeros)
    torch.testing.assert_close(layer(x), x @ trained.dequantize().t(), rtol=1e-3, atol=1e-3)


def test_places_stay_where_no_step_is_given() -> None:
    weight, rounded = weight_and()
    layer = TrainedLinear(rounded, bias=None, weight=weight)
    before = layer.places.clone()
    layer(torch.randn(5, INPUTS)).square().sum().backward()
    assert torch.equal(layer.places, before)
