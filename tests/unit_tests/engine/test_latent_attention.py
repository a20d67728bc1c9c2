"""Attention over latents: the memory of a token, the absorbed products, and quantized and changed weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from langchain_quantllm.engine.forward_context import ForwardContext, forward_context
from langchain_quantllm.engine.kv_cache import LayerShape
from langchain_quantllm.engine.latent_attention import Absorption, LatentLayers
from langchain_quantllm.engine.model_probe import inspect_model
from langchain_quantllm.errors import GenerationError, UnsupportedError
from tests.support.adapters import quietly
from tests.support.families import LATENT, family_model, generated_ids, likeliest_ids, random_ids
from tests.support.models import llm_of
from tests.unit_tests.engine.test_families import complete

pytestmark = pytest.mark.usefixtures("one_thread")

RANK, ROTARY, PLAIN, VALUE, HEADS = 40, 8, 12, 20, 4  # of the families


@pytest.mark.parametrize("name", ["deepseek_v3", "minicpm3"])
def test_a_token_takes_the_memory_of_its_latents(name: str, tokenizer: Any) -> None:
    llm = llm_of(family_model(LATENT[name]), tokenizer, kv_cache_memory="1MiB")
    info = llm.engine_info
    assert info.name == "fast", info.reason
    layers, float32_bytes, padding_tokens = 2, 4, 16
    assert info.kv_cache_bytes == (info.kv_cache_tokens + padding_tokens) * layers * (RANK + ROTARY) * float32_bytes
    llm.unload()


def build(latents: LatentLayers, model: Any) -> list[LayerShape]:
    """Find the layers of a model that cache latents; returns what each layer keeps."""
    probe = inspect_model(model)
    return latents.build(probe.layers, probe.shapes)


def test_absorbed_products_are_those_of_the_heads_keys_and_values() -> None:
    made = torch.Generator().manual_seed(0)
    key, value = torch.randn(HEADS, PLAIN, RANK, generator=made), torch.randn(HEADS, VALUE, RANK, generator=made)
    absorption = Absorption(key=key, value=value)
    query = torch.randn(1, HEADS, 3, PLAIN + ROTARY, generator=made)
    latents, rotated = torch.randn(7, RANK, generator=made), torch.randn(7, ROTARY, generator=made)
    keys = torch.cat([latents @ key.transpose(1, 2), rotated.expand(HEADS, -1, -1)], -1)
    expected = query[0] @ keys.transpose(1, 2)
    found = absorption.absorb(query)[0] @ torch.cat([rotated, latents], -1).T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    shares = expected.softmax(-1)
    attended = (shares @ latents).transpose(0, 1)[None]
    expected = (shares @ (latents @ value.transpose(1, 2))).transpose(0, 1)[None]
    torch.testing.assert_close(absorption.expand(attended), expected, rtol=1e-4, atol=1e-4)


def test_weights_in_full_precision_are_not_copied() -> None:
    model = family_model(LATENT["deepseek_v3"])
    latents = LatentLayers(model)
    shapes = build(latents, model)
    assert [(shape.kv_heads, shape.key_dim, shape.value_dim) for shape in shapes] == [(1, ROTARY, RANK)] * 2
    assert all(shape.is_latent for shape in shapes)
    assert latents.copied_bytes == 0
    for layer in model.model.layers:
        absorption = latents.absorptions[id(layer.self_attn)]
        assert absorption.key.untyped_storage().data_ptr() == layer.self_attn.kv_b_proj.weight.data_ptr()


def test_a_cache_of_whole_keys_and_values_stays_one() -> None:
    model = family_model(LATENT["deepseek_v3"])
    shape = LayerShape(
        kv_heads=HEADS, key_dim=PLAIN + ROTARY, value_dim=VALUE, dtype=torch.float32, device=torch.device("cpu")
    )
    latents = LatentLayers(model)
    assert latents.build([0, 1], [shape, shape]) == [shape, shape]
    assert not latents.absorptions


@pytest.fixture
def quantized(tmp_path: Path) -> Any:
    """A model whose linear layers are in nf4, and compute in float32; their inputs are multiples of 64."""
    sizes = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 32}
    sizes["moe_intermediate_size"] = 64
    family = LATENT["deepseek_v3"]
    family_model(replace(family, options={**family.options, **sizes})).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model


def test_quantized_matrices_are_dequantized_once(quantized: Any, tokenizer: Any) -> None:
    attention = quantized.model.layers[0].self_attn
    assert type(attention.kv_b_proj) is not torch.nn.Linear
    latents = LatentLayers(quantized)
    build(latents, quantized)
    assert latents.copied_bytes == 2 * HEADS * (64 + 32) * 64 * 4
    absorption = latents.absorptions[id(attention)]
    given = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    expected = attention.kv_b_proj(given).view(3, HEADS, 96).transpose(0, 1)
    found = torch.cat([given @ absorption.key.transpose(1, 2), given @ absorption.value.transpose(1, 2)], -1)
    # On some CPUs, bitsandbytes rounds the inputs and outputs of 4-bit layers to bfloat16.
    assert (found - expected).norm() <= 2**-7 * expected.norm()
    latents.close()
    llm = llm_of(quantized, tokenizer)
    assert llm.engine_info.name == "fast", llm.engine_info.reason
    assert "dequantized" in llm.engine_info.reason
    for count in (5, 40):
        text = complete(llm, random_ids(count), 24).token_ids
        with forward_context(ForwardContext()):  # the copies in place of the layers that round
            assert likeliest_ids(quantized, random_ids(count), text) == text
    llm.unload()
    assert "forward" not in vars(attention.kv_b_proj)


def test_changed_matrices_count_from_the_next_request_on(tokenizer: Any) -> None:
    model = family_model(LATENT["glm4_moe_lite"])
    llm = llm_of(model, tokenizer)
    ids = random_ids(20)
    before = complete(llm, ids, 16).token_ids
    old = model.model.layers[0].self_attn.kv_b_proj
    changed = torch.nn.Linear(old.in_features, old.out_features, bias=False)
    torch.nn.init.normal_(changed.weight, 0.0, 0.4, generator=torch.Generator().manual_seed(1))
    model.model.layers[0].self_attn.kv_b_proj = changed
    after = complete(llm, ids, 16).token_ids
    assert after == generated_ids(model, ids, 16) != before
    llm.unload()


def test_matrices_that_can_be_read_again_end_the_refusal(tokenizer: Any) -> None:
    model = family_model(LATENT["deepseek_v3"])
    llm = llm_of(model, tokenizer)
    ids = random_ids(20)
    expected = complete(llm, ids, 16).token_ids
    attention = model.model.layers[0].self_attn
    own = attention.kv_b_proj
    attention.kv_b_proj = torch.nn.Linear(own.in_features, own.out_features)
    with pytest.raises(GenerationError, match="the model was changed: .* with a bias"):
        complete(llm, ids, 16)
    attention.kv_b_proj = own
    assert complete(llm, ids, 16).token_ids == expected
    llm.unload()


def test_an_adapter_of_the_matrices_is_refused(tokenizer: Any) -> None:
    with quietly():
        import peft

        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["kv_b_proj"], init_lora_weights=False)
        model = peft.get_peft_model(family_model(LATENT["deepseek_v3"]), config).eval()
    with pytest.raises(UnsupportedError, match="an adapter changes how its latents become keys and values"):
        build(LatentLayers(model), model)


def test_a_bias_of_the_matrices_is_refused() -> None:
    model = family_model(LATENT["deepseek_v3"])
    shapes = inspect_model(model).shapes
    model.model.layers[1].self_attn.kv_b_proj = torch.nn.Linear(RANK, HEADS * (PLAIN + VALUE))
    with pytest.raises(UnsupportedError, match="with a bias"):
        LatentLayers(model).build([0, 1], shapes)
