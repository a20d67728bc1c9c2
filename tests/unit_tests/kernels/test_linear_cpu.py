"""Quantized linear layers on a CPU: repacked 4-bit weights in one call, 8-bit weights without rounding activations."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm import NF4, QuantizedHuggingFaceLLM
from langchain_quantllm.bench.random_models import SHAPES, random_checkpoint
from langchain_quantllm.compat import bitsandbytes
from langchain_quantllm.engine.fusion.fuse import LINEAR, Fusion
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels import reference
from langchain_quantllm.kernels.linear import cpu as cpu_linear
from langchain_quantllm.kernels.linear import reference as linear_reference
from langchain_quantllm.kernels.linear.weights import GPTQWeight, Int8Weight, RepackedWeight, weight_of
from tests.support.adapters import add_adapter, enable_adapters, quietly
from tests.support.fusion import dense_twin, forwards_in, in_engine, logits_of

PROMPTS = ["hello", "a longer prompt, of more than a page of tokens", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    SHAPES["wide"] = {**SHAPES["tiny"], "num_key_value_heads": 2, "initializer_range": 0.2}
    made = random_checkpoint("wide", tmp_path_factory.mktemp("wide"))
    del SHAPES["wide"]
    return made


def make(folder: Path, quantization: Any = "nf4", **fields: Any) -> QuantizedHuggingFaceLLM:
    given = {"max_new_tokens": 24, "ignore_eos": True, "progress": False, "device": "cpu", "dtype": "bfloat16"}
    return QuantizedHuggingFaceLLM(model_id=str(folder), quantization=quantization, **{**given, **fields})


def repacked(folder: Path, quantization: Any = "nf4") -> QuantizedHuggingFaceLLM:
    """Load a model whose weights were repacked, as they are with the first forward on some CPUs."""
    llm = make(folder, quantization).load()
    logits_of(llm.pipeline.model, [1, 2, 3])
    if not isinstance(weight_of(llm.pipeline.model.model.layers[0].mlp.up_proj), RepackedWeight):
        pytest.skip("bitsandbytes repacks nothing on this CPU")
    return llm


@pytest.mark.parametrize("quantization", ["nf4", "fp4", NF4(double_quantization=True)])
@pytest.mark.compat
def test_texts_are_the_same_with_fewer_calls(folder: Path, quantization: Any) -> None:
    repacked(folder, quantization)
    plain = make(folder, quantization, fuse=False, engine="fast")
    expected = plain.batch(PROMPTS)
    assert plain.engine_info.fused == {}
    plain.unload()
    llm = make(folder, quantization, engine="fast")
    assert llm.engine_info.fused[LINEAR] == 14
    assert llm.batch(PROMPTS) == expected
    assert [llm.invoke(prompt) for prompt in PROMPTS] == [make(folder, quantization).invoke(p) for p in PROMPTS]
    llm.unload()


def test_layers_have_their_parts_of_one_memory(folder: Path) -> None:
    llm = repacked(folder)
    model: Any = llm.pipeline.model
    expected = logits_of(model, list(range(5, 17)))
    attention = model.model.layers[1].self_attn
    fusion = Fusion(model, kernels=reference, linear_kernels=cpu_linear, kinds=(LINEAR,))
    [found] = fusion.summary
    assert (found.fused, found.left) == (14, {})
    query, key, value = (getattr(attention, name).weight.data for name in ("q_proj", "k_proj", "v_proj"))
    assert query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    assert key.data_ptr() == query.data_ptr() + query.numel()
    assert torch.equal(logits_of(model, list(range(5, 17))), expected)
    with in_engine(fusion):
        assert torch.equal(logits_of(model, list(range(5, 17))), expected)
    fusion.build()  # as after a change of the model's modules
    with in_engine(fusion):
        assert torch.equal(logits_of(model, list(range(5, 17))), expected)
    fusion.close()
    assert forwards_in(model) == []
    assert torch.equal(logits_of(model, list(range(5, 17))), expected)
    llm.unload()


def test_a_call_for_layers_of_one_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes, "_library_product", lambda kind: None)  # the profiler sees operations alone
    llm = repacked(folder)
    model: Any = llm.pipeline.model
    fusion = Fusion(model, kernels=reference, linear_kernels=cpu_linear, kinds=(LINEAR,))
    with torch.profiler.profile() as profile, in_engine(fusion):
        logits_of(model, [1])
    calls = [event.name for event in profile.events() if event.name == "bitsandbytes::gemv_4bit"]
    assert len(calls) == 2 * 4
    fusion.close()
    llm.unload()


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_reference_dequantizes_what_was_repacked(folder: Path, quantization: str) -> None:
    from bitsandbytes.functional import dequantize_4bit

    module: Any = make(folder, quantization).pipeline.model.model.layers[0].mlp.down_proj
    expected = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    with torch.no_grad():
        module(torch.ones(1, 1, 512, dtype=torch.bfloat16))
    weight = weight_of(module)
    if not isinstance(weight, RepackedWeight):
        pytest.skip("bitsandbytes repacks nothing on this CPU")
    # The scales were rounded to bfloat16.
    torch.testing.assert_close(linear_reference.dequantize(weight, torch.float32), expected, rtol=2**-7, atol=1e-6)


def test_other_weights_are_refused() -> None:
    weight = GPTQWeight(
        in_features=16, out_features=32, bits=4, words=torch.zeros(2, 32, dtype=torch.int32),
        zeros=torch.zeros(1, 4, dtype=torch.int32), scales=torch.ones(1, 32), groups=torch.zeros(16, dtype=torch.int32),
        group_size=16, zero_point=0, bias=None,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="no CPU kernel multiplies"):
        cpu_linear.quantized_linear(torch.ones(1, 16), weight)


@pytest.fixture
def slow_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without AVX512, whichever this is."""
    monkeypatch.setattr(cpu_linear, "has_16_bit_products", lambda: False)


def four_bit_weight(outputs: int, inputs: int, kind: str, *, nested: bool) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    made = torch.Generator().manual_seed(outputs + inputs)
    layer = Linear4bit(inputs, outputs, bias=False, quant_type=kind)
    numbers = torch.randn(outputs, inputs, generator=made)
    layer.weight = Params4bit(numbers, requires_grad=False, quant_type=kind, compress_statistics=nested).to("cpu")
    found = weight_of(layer)
    if found is None:
        pytest.fail("a layer of bitsandbytes cannot be read")
    return found


@pytest.mark.usefixtures("slow_16_bits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4_bits_are_multiplied_in_pieces(
    kind: str, nested: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded is the sum, once. Blocks of 64 may reach into the next output, and the last need not be full."""
    for piece in (1, 3000, 1 << 20):
        monkeypatch.setattr(cpu_linear, "_PIECE", piece)
        for outputs, inputs in ((1, 64), (3, 72), (16, 72), (72, 200), (130, 576)):
            weight, bias = four_bit_weight(outputs, inputs, kind, nested=nested), torch.randn(outputs)
            for rows in (1, 2, 33):
                x = torch.randn(inputs, 2 * rows).to(dtype).t()[::2]
                expected = linear_reference.quantized_linear(x, weight, bias)
                norms = linear_reference.dequantize(weight).norm(dim=1) * x.double().norm(dim=1)[:, None]
                found = cpu_linear.quantized_linear(x.reshape(1, rows, inputs), weight, bias)
                assert (found.dtype, found.shape) == (dtype, (1, rows, outputs))
                rounded = 2**-8 if dtype == torch.bfloat16 else 2**-11
                assert (
                    float(((found[0].double() - expected).abs() / (rounded * expected.abs() + 1e-5 * norms)).max()) <= 1
                )


@pytest.mark.usefixtures("slow_16_bits")
@pytest.mark.parametrize("quantization", ["nf4", NF4(double_quantization=True)])
def test_4_bits_that_are_not_repacked(folder: Path, quantization: Any) -> None:
    llm = make(folder, quantization, engine="fast")
    model, ids = llm.pipeline.model, list(range(5, 29))
    plain = logits_of(model, ids)
    if isinstance(weight_of(model.model.layers[0].mlp.up_proj), RepackedWeight):
        pytest.skip("bitsandbytes repacks them on this CPU")
    exact = logits_of(torch.nn.Module.float(dense_twin(model)), ids)
    fusion = Fusion(model, kernels=reference, linear_kernels=cpu_linear, kinds=(LINEAR,))
    assert [(kind.fused, kind.left) for kind in fusion.summary] == [(14, {})]
    with in_engine(fusion):
        fused = logits_of(model, ids)
    fusion.close()
    assert (fused - exact).norm() < 1.1 * (plain - exact).norm()
    assert not torch.equal(fused, plain)
    assert torch.equal(logits_of(model, ids), plain)
    assert llm.engine_info.fused[LINEAR] == 14
    assert len(llm.batch(PROMPTS)) == len(PROMPTS)
    llm.unload()


def test_4_bits_in_float32_are_left_to_the_layer(folder: Path) -> None:
    llm = make(folder, "nf4", dtype="float32", engine="fast")
    logits_of(llm.pipeline.model, [1, 2, 3])
    if isinstance(weight_of(llm.pipeline.model.model.layers[0].mlp.up_proj), RepackedWeight):
        pytest.skip("bitsandbytes repacks them on this CPU")
    fusion = Fusion(llm.pipeline.model, kernels=reference, linear_kernels=cpu_linear, kinds=(LINEAR,))
    assert [(kind.fused, kind.left) for kind in fusion.summary] == [
        (0, {"this CPU multiplies float32 as fast in the layer itself": 14})
    ]
    llm.unload()


def int8_weight(outputs: int, inputs: int) -> Int8Weight:
    made = torch.Generator().manual_seed(outputs + inputs)
    codes = torch.randint(-127, 128, (outputs, inputs), generator=made, dtype=torch.int8)
    scales = torch.rand(outputs, generator=made) + 0.5
    words = codes.view(-1).view(torch.int32)
    return Int8Weight(in_features=inputs, out_features=outputs, words=words, scales=scales, bias=None)


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 70])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 4), (3, 36), (64, 64), (130, 100), (96, 576)])
def test_8_bits_are_multiplied_as_they_are(rows: int, outputs: int, inputs: int) -> None:
    """Rounded are the sums, and what they are when scaled."""
    weight, bias = int8_weight(outputs, inputs), torch.randn(outputs)
    x = torch.randn(inputs, 2 * rows).bfloat16().t()[::2]
    expected = linear_reference.quantized_linear(x, weight)
    norms = linear_reference.dequantize(weight).norm(dim=1) * x.double().norm(dim=1)[:, None]
    found = cpu_linear.quantized_linear(x, weight)
    assert (found.dtype, found.shape) == (torch.bfloat16, (rows, outputs))
    assert float(((found.double() - expected).abs() / (2**-7 * expected.abs() + 1e-5 * norms)).max()) <= 1
    biased = cpu_linear.quantized_linear(x.reshape(1, rows, inputs), weight, bias)
    assert biased.shape == (1, rows, outputs)
    torch.testing.assert_close(biased[0].double(), expected + bias.double(), rtol=2**-7, atol=0.1)
    shifted = torch.cat([torch.zeros(1).bfloat16(), x.flatten()])[1:].view(rows, inputs)  # not where vectors begin
    assert torch.equal(cpu_linear.quantized_linear(shifted, weight), found)
    both = cpu_linear.grouped_linear(x, [weight, int8_weight(outputs + 1, inputs)])
    assert torch.equal(both[0], found)
    assert both[1].shape == (rows, outputs + 1)


def test_8_bits_are_closer_to_the_weights_than_the_layers_themselves(folder: Path) -> None:
    llm = make(folder, "int8", engine="fast")
    model, ids = llm.pipeline.model, list(range(5, 29))
    plain = logits_of(model, ids)
    assert llm.engine_info.fused[LINEAR] == 14
    engine_text = llm.invoke(PROMPTS[1])
    exact = logits_of(torch.nn.Module.float(dense_twin(model)), ids)
    fusion = Fusion(model, kernels=reference, linear_kernels=cpu_linear, kinds=(LINEAR,))
    with in_engine(fusion):
        fused = logits_of(model, ids)
    fusion.close()
    assert (fused - exact).norm() < 0.5 * (plain - exact).norm()
    assert torch.equal(logits_of(model, ids), plain)  # the user's own use of the model is as it was
    assert llm.invoke(PROMPTS[1]) == engine_text  # what a sum is rounded to may hang on the other rows of its step
    llm.unload()
    left = make(folder, "int8", fuse=False, engine="fast")
    assert left.engine_info.fused == {}
    left.unload()


def test_8_bits_in_float32_are_left_to_the_layer(folder: Path) -> None:
    llm = make(folder, "int8", dtype="float32", engine="fast")
    fusion = Fusion(llm.pipeline.model, kernels=reference, linear_kernels=cpu_linear, kinds=(LINEAR,))
    [found] = fusion.summary
    assert found.fused == 0
    assert found.left == {"CPUs have no fast product of 8-bit weights and float32": 14}
    assert llm.engine_info.fused[LINEAR] == 0
    assert llm.invoke("hello")
    llm.unload()


def test_a_small_adapter_of_the_users_own_is_not_left_out(folder: Path) -> None:
    """A layer of peft's shows the weight of the layer inside, and is none."""
    peft = pytest.importorskip("peft")
    llm = repacked(folder)
    model: Any = llm.pipeline.model
    with quietly():
        targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
        add_adapter(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(3e-3)
    expected = logits_of(model, [5, 6, 7, 8])
    fusion = Fusion(model, kernels=reference, linear_kernels=cpu_linear, kinds=(LINEAR,))
    [found] = fusion.summary
    assert found.fused == 14
    assert {type(module).__name__ for module in model.modules() if id(module) in fusion.steps} == {"Linear4bit"}
    assert sorted({len(step.group) for step in fusion.steps.values()}) == [0, 2, 3]
    with in_engine(fusion):
        assert torch.equal(logits_of(model, [5, 6, 7, 8]), expected)
    enable_adapters(model, False)
    fusion.build()  # as if it were for a model whose adapters are off
    assert sorted({len(step.group) for step in fusion.steps.values()}) == [0, 2, 3]
    assert not torch.equal(logits_of(model, [5, 6, 7, 8]), expected)
    fusion.close()
    llm.unload()


def test_a_model_is_pickled_while_its_layers_are_stood_in_for(folder: Path) -> None:
    llm = repacked(folder)
    model: Any = llm.pipeline.model
    fusion = Fusion(model, kernels=reference, linear_kernels=cpu_linear, kinds=(LINEAR,))
    layer = model.model.layers[0].mlp.up_proj
    twin = pickle.loads(pickle.dumps(layer.__dict__["forward"]))
    assert twin.__func__ is type(layer).forward
    fusion.close()
    llm.unload()
