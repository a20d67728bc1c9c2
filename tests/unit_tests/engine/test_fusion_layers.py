"""Whole layers as one function on a CPU: the texts of the model's own modules, and what stays with these."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.engine.fusion.fuse import CPU_KINDS, LAYER, LINEAR, Fusion
from langchain_quantllm.engine.fusion.layers import LayerStep
from langchain_quantllm.kernels import cpu as cpu_kernels
from langchain_quantllm.kernels import reference
from langchain_quantllm.kernels.linear import cpu as cpu_linear
from tests.support.families import FAST, family_model, generated_ids, random_ids
from tests.support.fusion import forwards_in, write
from tests.support.gptq_checkpoints import make_gptq_checkpoint
from tests.support.models import pipeline_of, tiny_model
from tests.support.selection import slow_but

WHOLE = {
    "exaone4": "its additions are not fused",
    "gemma": None,
    "gemma2": None,
    "glm4": None,
    "granite": "its additions are not fused",
    "llama-grouped": None,
    "llama-head-80": None,
    "mixtral": None,
    "phi3": None,
    "phi3-window": None,
    "qwen2": None,
    "qwen3": None,
    "stablelm": None,
}
"""Families, and why their layers are not whole; None where they are. Of a mixture, all but its experts."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of this size take longer on several cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fuse(model: Any) -> Fusion:
    return Fusion(model, kernels=cpu_kernels, linear_kernels=cpu_linear, kinds=CPU_KINDS)


def whole_layers(fusion: Fusion) -> int:
    return sum(isinstance(step, LayerStep) for step in fusion.steps.values())


@pytest.mark.parametrize("name", slow_but({"gemma2", "granite", "llama-grouped", "mixtral", "phi3", "qwen3"}, WHOLE))
@pytest.mark.compat
def test_families_write_the_same(name: str, tokenizer: Any) -> None:
    model = family_model(FAST[name])
    prompts = [random_ids(count) for count in (23, 5, 40)]
    expected = [generated_ids(model, prompt, 24) for prompt in prompts]
    fusion = fuse(model)
    [found] = [kind for kind in fusion.summary if kind.kind == LAYER]
    if WHOLE[name] is None:
        assert (found.fused, found.left) == (model.config.num_hidden_layers, {})
    else:
        assert (found.fused, dict(found.left)) == (0, {WHOLE[name]: model.config.num_hidden_layers})
    engine = ContinuousEngine(pipeline_of(model, tokenizer), fusion=fusion)
    assert engine.info.fused[LAYER] == found.fused
    assert write(engine, prompts, 24) == expected
    engine.close()
    fusion.close()
    assert forwards_in(model) == []
    assert generated_ids(model, prompts[0], 24) == expected[0]


def test_a_hook_within_a_layer_is_called(tokenizer: Any) -> None:
    """The layer with the hook runs by its modules; the engine sees the hook with the next request."""
    model, seen = tiny_model(len(tokenizer)), []
    fusion = fuse(model)
    layers = whole_layers(fusion)
    engine = ContinuousEngine(pipeline_of(model, tokenizer), fusion=fusion)
    prompt = random_ids(9)
    expected = write(engine, [prompt], 8)
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    assert write(engine, [prompt], 8) == expected
    assert len(seen) >= 8
    assert layers == whole_layers(fusion) > 0  # its MLP alone is called by module
    hook.remove()
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    seen.clear()
    assert write(engine, [prompt], 8) == expected
    assert len(seen) >= 8
    assert whole_layers(fusion) == layers - 1
    hook.remove()
    engine.close()
    fusion.close()


def test_changed_weights_are_used(tokenizer: Any) -> None:
    """Products are prepared from tensors that a new parameter would leave behind."""
    model = tiny_model(len(tokenizer))
    fusion = fuse(model)
    engine = ContinuousEngine(pipeline_of(model, tokenizer), fusion=fusion)
    prompt = random_ids(9)
    before = write(engine, [prompt], 8)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = torch.nn.Parameter(-3 * layer.mlp.up_proj.weight.detach())
        layer.self_attn.o_proj.weight.data.mul_(-2)
    expected = [generated_ids(model, prompt, 8)]
    assert expected != before
    assert write(engine, [prompt], 8) == expected
    engine.close()
    fusion.close()


@pytest.mark.parametrize("desc_act", [False, True])
def test_gptq_in_4_bits_runs_by_the_packed_weights(desc_act: bool, smollm2: Path, tmp_path: Path) -> None:
    folder = make_gptq_checkpoint(smollm2, tmp_path / "gptq", desc_act=desc_act, small=True)
    fields = {"model_id": str(folder), "device": "cpu", "dtype": "bfloat16", "progress": False, "ignore_eos": True}
    fused = QuantizedHuggingFaceLLM(engine="fast", max_new_tokens=12, **fields)
    plain = QuantizedHuggingFaceLLM(engine="fast", max_new_tokens=12, fuse=False, **fields)
    expected = plain.batch(["a", "a b c d"])
    assert plain.engine_info.fused == {}
    plain.unload()
    assert fused.engine_info.fused[LINEAR] == 7
    assert fused.engine_info.fused[LAYER] == 1
    assert fused.batch(["a", "a b c d"]) == expected
    fused.unload()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_small_steps_are_those_of_the_reference_to_the_last_bit(tokens: int, dtype: torch.dtype) -> None:
    made = torch.Generator().manual_seed(tokens)
    x, y = (torch.randn(1, tokens, 96, generator=made).to(dtype) for _ in range(2))
    weight = torch.randn(96, generator=made).to(dtype)
    for offset in (0.0, 1.0):
        for rounds_first in (True, False):
            options = {"offset": offset, "rounds_first": rounds_first}
            kept = x.clone()
            assert torch.equal(
                cpu_kernels.rms_norm(x, weight, 1e-5, **options), reference.rms_norm(x, weight, 1e-5, **options)
            )
            ours = cpu_kernels.add_rms_norm(x, y, weight, 1e-5, **options)
            assert all(map(torch.equal, ours, reference.add_rms_norm(x, y, weight, 1e-5, **options)))
            assert torch.equal(x, kept)
    for activation in (reference.SILU, reference.GELU, reference.GELU_TANH):
        gate, up = torch.cat([x, y], -1).chunk(2, -1)
        assert torch.equal(
            cpu_kernels.activation_mul(gate, up, activation), reference.activation_mul(gate, up, activation)
        )
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [reference.HALVES, reference.PAIRS, reference.PAIRS_OF_HALVES])
@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("width", [16, 8])
def test_rotations_are_those_of_the_reference_to_the_last_bit(
    width: int, rounds: bool, layout: int, dtype: torch.dtype
) -> None:
    made = torch.Generator().manual_seed(width)
    x = torch.randn(5, 3, 16, generator=made).to(dtype)
    cos, sin = (torch.randn(1, 5, width, generator=made).to(dtype) for _ in range(2))
    at = torch.arange(5, dtype=torch.int32)
    blocks = (torch.zeros(2, 16, 3, 32, dtype=dtype), torch.ones(1, 1, dtype=torch.int32), torch.zeros_like(at), at)
    headed = x.transpose(0, 1)[None]
    expected = reference.rotate_and_write(headed, headed, headed, cos, sin, *blocks, layout=layout, rounds=rounds)
    found = cpu_kernels.rotate(x, cpu_kernels.rotation(cos, sin, layout), layout=layout, rounds=rounds)
    assert torch.equal(found, expected[0].transpose(0, 1))
