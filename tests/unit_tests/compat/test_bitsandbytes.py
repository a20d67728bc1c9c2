"""The state of bitsandbytes' layers and the results of its operations, checked on bitsandbytes itself."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from langchain_quantllm.compat import bitsandbytes as compat

bnb = pytest.importorskip("bitsandbytes")

INPUTS, OUTPUTS, BLOCK = 128, 64, 64


def layer_of(kind: str, *, nested: bool = False) -> Any:
    """Make a layer, quantized on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weight = nn.Linear(INPUTS, OUTPUTS).weight
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(INPUTS, OUTPUTS, bias=False, has_fp16_weights=False, threshold=6.0)
    else:
        layer = bnb.nn.Linear4bit(
            INPUTS, OUTPUTS, bias=False, quant_type=kind, compress_statistics=nested, compute_dtype=torch.float32
        )
    layer.load_state_dict({"weight": weight})
    layer.plain = weight.detach().clone()
    return layer.to("cpu") if layer.weight.device.type != "cpu" else _quantized(layer)


def _quantized(layer: Any) -> Any:
    """Quantize a layer by moving its weight to the CPU."""
    layer.weight = type(layer.weight)(layer.plain.clone(), **_options(layer)).to("cpu")
    return layer


def _options(layer: Any) -> dict[str, Any]:
    if compat.is_int8_layer(layer):
        return {"requires_grad": False, "has_fp16_weights": False}
    weight = layer.weight
    return {
        "requires_grad": False,
        "quant_type": weight.quant_type,
        "compress_statistics": weight.compress_statistics,
        "blocksize": BLOCK,
    }


class TestFourBits:
    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    @pytest.mark.parametrize("nested", [False, True])
    def test_state(self, kind: str, nested: bool) -> None:
        layer = layer_of(kind, nested=nested)
        state = compat.four_bit_state(layer.weight)
        assert state is not None
        assert (state.shape, state.kind, state.block_size) == ((OUTPUTS, INPUTS), kind, BLOCK)
        assert state.code.shape == (16,)
        assert not state.repacked
        assert (state.nested is not None) == nested
        assert compat.is_quantized(layer.weight)
        assert compat.shape_of(layer) == (OUTPUTS, INPUTS)
        blocks = layer.plain.abs().view(-1, BLOCK).amax(1)
        assert state.scales.shape == blocks.shape
        scales = state.scales.float()
        if state.nested is not None:
            assert state.scales.dtype == torch.uint8
            own = state.nested.scales.repeat_interleave(state.nested.block_size)[: len(scales)]
            scales = state.nested.code[state.scales.long()] * own + state.nested.offset
        torch.testing.assert_close(scales, blocks, rtol=0.05, atol=1e-3)
        found = compat.block_magnitudes(layer)
        assert found is not None
        torch.testing.assert_close(found[0], scales)
        assert found[1] == BLOCK

    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    def test_dequantized(self, kind: str) -> None:
        layer = layer_of(kind)
        state = compat.four_bit_state(layer.weight)
        assert state is not None
        octets = layer.weight.data.view(torch.uint8).flatten()
        found = compat.dequantized(octets, state.scales, BLOCK, kind, state.shape, torch.float32)  # type: ignore[arg-type]
        # The first of two is in the upper half of a byte.
        codes = torch.stack([octets >> 4, octets & 15], 1).flatten().long()
        expected = state.code[codes] * state.scales.repeat_interleave(BLOCK)
        torch.testing.assert_close(found, expected.view(OUTPUTS, INPUTS))
        torch.testing.assert_close(found, layer.plain, rtol=0, atol=0.03)

    def test_states(self) -> None:
        [state] = compat.states_of(layer_of("nf4", nested=True).weight)
        assert compat.is_state(state)
        assert any(compat.is_state(inner) for inner in vars(state).values())


class TestEightBits:
    def test_scales_before_and_after_the_first_forward(self) -> None:
        layer = layer_of("int8")
        assert compat.is_int8_layer(layer)
        expected = layer.plain.abs().amax(1)
        for _ in range(2):
            scales = compat.int8_scales(layer)
            assert scales is not None
            torch.testing.assert_close(scales.flatten(), expected, rtol=1e-3, atol=1e-4)
            assert compat.is_quantized(layer.weight)
            assert compat.shape_of(layer) == (OUTPUTS, INPUTS)
            with torch.no_grad():
                layer(torch.ones(2, INPUTS))
        codes = (layer.plain * 127 / expected[:, None]).round()
        assert (layer.weight.data.float() - codes).abs().max() <= 1

    def test_states(self) -> None:
        layer = layer_of("int8")
        assert len(compat.states_of(layer.weight)) >= 1
        assert compat.is_state(layer.state)
        found = compat.block_magnitudes(layer)
        assert found is not None
        assert found[1] == 0


def test_plain_layers() -> None:
    layer = nn.Linear(4, 4)
    assert not compat.is_quantized(layer.weight)
    assert compat.four_bit_state(layer.weight) is compat.int8_scales(layer) is compat.shape_of(layer) is None
    assert compat.block_magnitudes(layer) is None
    assert compat.states_of(layer.weight) == []


@pytest.mark.parametrize("nested", [False, True])
def test_the_product_of_a_repacked_weight(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of("nf4", nested=nested)
    x = torch.randn(1, INPUTS, dtype=torch.bfloat16)
    layer.compute_dtype = torch.bfloat16
    layer.eval()
    with torch.no_grad():
        layer(x)
    state = compat.four_bit_state(layer.weight)
    assert state is not None
    if not state.repacked:
        pytest.skip("this CPU has no AVX512-BF16, for which bitsandbytes repacks")
    assert state.nested is None
    assert state.shape == (OUTPUTS, INPUTS)
    shape = (OUTPUTS, INPUTS)
    given = (layer.weight.data, shape, state.scales, state.code, state.block_size, "nf4")
    found = compat.four_bit_product(*given)(x)
    torch.testing.assert_close(found.float(), layer(x).float(), rtol=0.02, atol=0.02)
    # bitsandbytes calls its library with these arguments: the same call without its operation gives the same bits.
    assert compat._library_product("nf4") is not None
    assert compat._library_product("fp4") is not None
    by_library = compat.four_bit_product(*given)
    monkeypatch.setattr(compat, "_library_product", lambda kind: None)
    by_operation = compat.four_bit_product(*given)
    for rows in (x, x.expand(3, -1), torch.randn(INPUTS, 4).bfloat16().t()[None]):
        assert torch.equal(by_library(rows), by_operation(rows.contiguous()))


@pytest.fixture
def cast_logger() -> Iterator[logging.Logger]:
    """The logger of cast warnings, without the filter."""
    logger = logging.getLogger(compat._CASTS)
    before, logger.filters = logger.filters, []
    yield logger
    logger.filters = before


def test_only_cast_warnings_are_dropped(cast_logger: logging.Logger, caplog: pytest.LogCaptureFixture) -> None:
    compat.filter_cast_warnings(nn.Linear(4, 4))
    assert cast_logger.filters == []
    layer = layer_of("int8")
    for _ in range(2):
        compat.filter_cast_warnings(layer)
    assert len(cast_logger.filters) == 1
    source = inspect.getsource(sys.modules[compat._CASTS])
    [sentence] = re.findall(r'"(MatMul8bitLt: inputs will be cast[^"]*)"', source)
    with caplog.at_level(logging.WARNING):
        cast_logger.warning(sentence)
        cast_logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bitsandbytes_logs_cast_warnings_by_this_logger(
    cast_logger: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    # Quantized on its way to the GPU: one that was quantized on the CPU leaves a part of its state there.
    layer = bnb.nn.Linear8bitLt(INPUTS, OUTPUTS, bias=False, has_fp16_weights=False, threshold=6.0).to("cuda")
    x = torch.ones(2, INPUTS, dtype=torch.bfloat16, device="cuda")
    with caplog.at_level(logging.WARNING), torch.no_grad():
        layer(x)
        assert {record.name for record in caplog.records if "MatMul8bitLt" in record.message} == {cast_logger.name}
        caplog.clear()
        compat.filter_cast_warnings(layer)
        layer(x)
        assert caplog.records == []


def test_the_logger_of_kernels_is_there() -> None:
    assert compat._KERNELS in logging.root.manager.loggerDict


@pytest.mark.parametrize(("inputs", "outputs", "is_packed"), [(128, 64, True), (128, 40, False), (96, 64, False)])
def test_layers_that_the_kernel_of_a_cpu_cannot_take_are_not_packed_for_it(
    inputs: int, outputs: int, is_packed: bool
) -> None:
    """On a CPU with AVX512-BF16 their first forward fails otherwise."""
    layer = bnb.nn.Linear4bit(inputs, outputs, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(torch.randn(outputs, inputs), requires_grad=False, quant_type="nf4").to("cpu")
    layer.support_avx512bf16_for_cpu = True  # as its constructor finds it there
    compat.keep_odd_layers_unpacked(nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is is_packed
