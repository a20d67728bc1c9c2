"""CountedLinear of quantized layers in the engine: exact ones, several at once, and nobody else sees any of it.

On the CPU, the plain versions of the kernels run; everything around them is as on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from langchain_quantllm import GPTQ, QuantizedHuggingFaceLLM
from langchain_quantllm.bench.random_models import SHAPES, random_checkpoint
from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.engine.cuda_graphs import no_graph_reason
from langchain_quantllm.engine.fusion.fuse import LINEAR, Fusion
from langchain_quantllm.kernels import reference
from langchain_quantllm.kernels.linear import reference as linear_reference
from langchain_quantllm.kernels.linear.weights import weight_of
from tests.support.adapters import make_adapter, quietly
from tests.support.families import generated_ids, random_ids
from tests.support.fusion import CountedLinear, dense_twin, forwards_in, in_engine, logits_of, write
from tests.support.models import tiny_model
from tests.support.selection import skip_without_gptqmodel

SCHEMES = {"int8": "int8", "gptq4": GPTQ(kernel="torch"), "gptq3": GPTQ(kernel="torch")}
"""Schemes whose weights every CPU keeps as stored: some CPUs repack nf4 and fp4 in the first forward."""


@pytest.fixture(scope="module", params=SCHEMES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny quantized model in float32, loaded."""
    SHAPES["wide"] = {**SHAPES["tiny"], "num_key_value_heads": 2, "initializer_range": 0.2}
    name = request.param
    if name.startswith("gptq"):
        skip_without_gptqmodel()
    options = {"gptq": True, "bits": int(name[4:])} if name.startswith("gptq") else {}
    folder = random_checkpoint("wide", tmp_path_factory.mktemp(name), **options)
    del SHAPES["wide"]
    llm = QuantizedHuggingFaceLLM(
        model_id=str(folder), quantization=SCHEMES[request.param], dtype="float32", device="cpu", progress=False
    )
    yield llm.pipeline
    llm.unload()


def fuse(model: Any, products: Any, **options: Any) -> Fusion:
    return Fusion(model, kernels=reference, linear_kernels=products, **options)


@pytest.mark.compat
def test_texts_are_those_of_the_dequantized_weights(loaded: Any) -> None:
    model, prompts = loaded.model, [random_ids(count) for count in (23, 5)]
    expected = [generated_ids(dense_twin(model), prompt, 16) for prompt in prompts]
    fusion = fuse(model, CountedLinear())
    [found] = [kind for kind in fusion.summary if kind.kind == LINEAR]
    assert (found.fused, found.left) == (14, {})
    engine = ContinuousEngine(loaded, fusion=fusion)
    assert engine.info.fused[LINEAR] == 14
    assert write(engine, prompts, 16) == expected
    engine.close()
    fusion.close()
    assert forwards_in(model) == []


def test_layers_of_one_input_are_one_product(loaded: Any) -> None:
    products = CountedLinear()
    fusion = fuse(loaded.model, products)
    engine = ContinuousEngine(loaded, fusion=fusion)
    products.calls.clear()
    write(engine, [random_ids(9)], 2)
    layer = [3, 1, 2, 1]  # query, key and value; output; gate and up; down
    assert products.calls == [(count, rows) for rows in (9, 1) for _ in range(2) for count in layer]
    engine.close()
    fusion.close()


class CountedFloat(CountedLinear):
    """With a kernel for weights that are not quantized, too."""

    MOST_FLOAT_ROWS = 4


def test_layers_that_are_not_quantized_are_multiplied_for_few_rows() -> None:
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    products = CountedFloat()
    fusion = Fusion(model, kernels=reference, linear_kernels=products, kinds=(LINEAR,))
    [found] = fusion.summary
    assert (found.fused, found.left) == (15, {})
    for rows, expected in ((1, [3, 1, 2, 1] * 2 + [1]), (4, [3, 1, 2, 1] * 2 + [1]), (5, [])):
        products.calls.clear()
        ids = random_ids(rows)
        plain = logits_of(model, ids)
        with in_engine(fusion):
            fused = logits_of(model, ids)
        assert products.calls == [(count, rows) for count in expected]
        torch.testing.assert_close(fused, plain, rtol=0.05, atol=0.05)
    fusion.close()
    # Kernels without such a product have no such steps.
    without = Fusion(model, kernels=reference, linear_kernels=CountedLinear(), kinds=(LINEAR,))
    assert without.steps == {}
    without.close()


def test_the_model_itself_is_as_it_was(loaded: Any) -> None:
    ids, products = random_ids(12), CountedLinear()
    expected = logits_of(loaded.model, ids)
    fusion = fuse(loaded.model, products)
    products.calls.clear()
    assert torch.equal(logits_of(loaded.model, ids), expected)
    assert products.calls == []
    with fusion.exact():
        exact = logits_of(loaded.model, ids)
    torch.testing.assert_close(exact, logits_of(dense_twin(loaded.model), ids), rtol=1e-3, atol=1e-3)
    with torch.enable_grad():
        assert torch.equal(logits_of(loaded.model, ids), expected)
    fusion.close()


def test_a_layer_that_somebody_watches_is_seen(loaded: Any) -> None:
    seen: list[torch.Size] = []
    fusion, products = None, CountedLinear()
    watched = loaded.model.model.layers[0].self_attn.k_proj
    handle = watched.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    try:
        fusion = fuse(loaded.model, products)
        engine = ContinuousEngine(loaded, fusion=fusion)
        products.calls.clear()
        seen.clear()
        write(engine, [random_ids(9)], 1)
        engine.close()
    finally:
        handle.remove()
        if fusion is not None:
            fusion.close()
    assert len(seen) == 1
    assert [count for count, _ in products.calls] == [3, 1, 2, 1] * 2


def test_what_gives_something_else_is_left_alone(loaded: Any) -> None:
    class Wrong(CountedLinear):
        def quantized_linear(self, x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
            found = super().quantized_linear(x, weight, bias)
            # As a kernel that is wrong for a single row would.
            return found * 1.5 if x.shape[-2] == 1 and weight.out_features == 512 else found

    fusion = fuse(loaded.model, Wrong(), kinds=(LINEAR,))
    [found] = fusion.summary
    assert found.fused == 14 - 4
    [reason] = found.left
    assert "it gives something else" in reason
    fusion.close()


def test_layers_that_are_never_called_are_known(loaded: Any) -> None:
    fusion = fuse(loaded.model, CountedLinear(), kinds=(LINEAR,))
    linears = {id(module) for module in loaded.model.modules() if weight_of(module) is not None}
    assert fusion.replaced_ids == linears
    assert no_graph_reason(loaded.model, fusion.replaced_ids) == "weights on cpu"
    fusion.close()
    assert fusion.replaced_ids == frozenset()


def test_products_are_together_without_other_steps(loaded: Any) -> None:
    products = CountedLinear()
    fusion = fuse(loaded.model, products, kinds=(LINEAR,))
    products.calls.clear()
    with in_engine(fusion):
        found = logits_of(loaded.model, random_ids(5))
    assert [count for count, _ in products.calls] == [3, 1, 2, 1] * 2
    torch.testing.assert_close(found, logits_of(dense_twin(loaded.model), random_ids(5)), rtol=1e-3, atol=1e-3)
    fusion.close()


def test_an_input_that_was_written_over_is_multiplied_anew(loaded: Any) -> None:
    products = CountedLinear()
    fusion = fuse(loaded.model, products, kinds=(LINEAR,))
    mlp = loaded.model.model.layers[0].mlp
    x = torch.randn(1, 3, 256)
    with in_engine(fusion), torch.no_grad():
        products.calls.clear()
        mlp.gate_proj(x)
        x.mul_(2.0)
        found = mlp.up_proj(x)
        assert products.calls == [(2, 3), (2, 3)]
    weight = weight_of(mlp.up_proj)
    torch.testing.assert_close(found, linear_reference.quantized_linear(x, weight, weight.bias, dtype=torch.float32))
    fusion.close()


@pytest.mark.compat
def test_adapters_over_quantized_layers(tmp_path: Path, tokenizer: Any) -> None:
    """Each row with its own adapter, over products of ours."""
    pytest.importorskip("peft")
    base = tmp_path / "base"
    tiny_model(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    llm = QuantizedHuggingFaceLLM(
        model_id=str(base), quantization="int8", dtype="float32", device="cpu", progress=False
    )
    model = llm.pipeline.model
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    with quietly():
        for seed, name in enumerate(("one", "two")):
            make_adapter(base, tmp_path / name, seed=seed, target_modules=targets)
            model.load_adapter(str(tmp_path / name), adapter_name=name)
    products = CountedLinear()
    fusion = fuse(model, products)
    [found] = [kind for kind in fusion.summary if kind.kind == LINEAR]
    assert found.fused == 14
    prompt, switch = random_ids(9), AdapterSwitch(model, ("one", "two"))
    engine = ContinuousEngine(llm.pipeline, adapters=switch, fusion=fusion)
    products.calls.clear()
    texts = {name: write(engine, [prompt], 12, adapter=name)[0] for name in ("one", "two", "base")}
    assert len({tuple(ids) for ids in texts.values()}) == 3
    assert [count for count, _ in products.calls[:8]] == [3, 1, 2, 1] * 2
    for name, ids in texts.items():
        with switch.chosen(name), fusion.exact():
            assert generated_ids(model, prompt, 12) == ids
    engine.close()
    fusion.close()
    llm.unload()


def test_a_model_that_is_not_quantized_has_none(tokenizer: Any) -> None:
    fusion = fuse(tiny_model(len(tokenizer)), CountedLinear(), kinds=(LINEAR,))
    [found] = fusion.summary
    assert (found.fused, found.left) == (0, {})
