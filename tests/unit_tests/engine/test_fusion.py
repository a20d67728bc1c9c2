"""Fused steps give the logits and texts of the modules that they replace, in the engine's forwards only.

On a CPU the kernels run in plain torch; everything else is as on a GPU.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.engine.cuda_graphs import no_graph_reason
from langchain_quantllm.engine.fingerprint import fingerprint
from langchain_quantllm.engine.fusion.fuse import (
    COS_SIN,
    EXPERTS,
    GATED_MLP,
    KINDS,
    LINEAR,
    NORM,
    RESIDUAL,
    ROTARY,
    FusedKind,
    Fusion,
)
from langchain_quantllm.engine.fusion.patterns import GatedMlpStep, NormStep
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.kernels import reference
from langchain_quantllm.kernels.linear import reference as linear_reference
from tests.support.adapters import choose_adapter, enable_adapters, make_adapter, quietly
from tests.support.families import FAST, family_model, generated_ids, random_ids
from tests.support.fusion import Counted, forwards_in, in_engine, logits_of, write
from tests.support.models import byte_fallback_tokenizer, pipeline_of, tiny_model
from tests.support.selection import QUICK_FAMILIES, slow_but

WHOLE = {
    "llama",
    "llama-grouped",
    "llama-one-kv-head",
    "llama-head-80",
    "llama-3-rope",
    "llama-eager",
    "mistral-window",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "glm",
    "glm4",
    "stablelm",
}
"""Families whose norms, MLPs, attentions and additions are all fused."""

LEFT = {
    ("granite", RESIDUAL): "it gives something else",  # what is added is multiplied first
    ("cohere", COS_SIN): "it gives something else",  # each twice, beside each other
    ("olmo-clipped", ROTARY): "it gives something else",  # states are clipped
    ("phi", RESIDUAL): "it has parts other than",  # attention and MLP beside each other
    ("opt", ROTARY): "no cosines and sines",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices of this size take longer on several cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fuse(model: Any, **options: Any) -> Fusion:
    return Fusion(model, kernels=reference, linear_kernels=linear_reference, **options)


def is_whole(name: str, kind: FusedKind) -> bool:
    """Whether a family of `WHOLE` has all modules of a kind fused, and at least one."""
    # Nothing is quantized, no family has experts; angles of two kinds.
    if kind.kind in (LINEAR, EXPERTS) or (name, kind.kind) == ("gemma3", COS_SIN):
        return kind.fused == 0 and not kind.left
    return kind.fused > 0 and not kind.left


@pytest.mark.parametrize("name", slow_but(QUICK_FAMILIES, FAST, pytest.mark.compat))
def test_every_family_writes_the_same(name: str, tokenizer: Any) -> None:
    model = family_model(FAST[name])
    prompts = [random_ids(count) for count in (23, 5, 40)]
    expected = [generated_ids(model, prompt, 24) for prompt in prompts]
    fusion = fuse(model)
    assert fusion.unsupported_reason is None
    found = {kind.kind: kind for kind in fusion.summary}
    assert list(found) == list(KINDS)
    if name in WHOLE:
        assert all(is_whole(name, kind) for kind in found.values()), fusion.summary
    engine = ContinuousEngine(pipeline_of(model, tokenizer), fusion=fusion)
    assert write(engine, prompts, 24) == expected
    engine.close()
    fusion.close()
    assert forwards_in(model) == []
    assert generated_ids(model, prompts[0], 24) == expected[0]


@pytest.mark.parametrize(("name", "kind"), LEFT)
def test_what_does_not_match_is_left_alone_with_the_reason(name: str, kind: str, tokenizer: Any) -> None:
    model = family_model(FAST[name])
    fusion = fuse(model)
    [found] = [found for found in fusion.summary if found.kind == kind]
    assert found.fused == 0
    assert any(LEFT[name, kind] in reason for reason in found.left)
    engine = ContinuousEngine(pipeline_of(model, tokenizer), fusion=fusion)
    assert f"no {kind} steps are fused: " in engine.info.reason
    engine.close()


@pytest.mark.parametrize("name", ["llama-grouped", "gemma2", "glm4", "phi3", "cohere", "starcoder2"])
@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS])
@pytest.mark.compat
def test_same_logits_outside_of_pages(name: str, kinds: tuple[str, ...]) -> None:
    model = family_model(FAST[name])
    ids = random_ids(19)
    expected = logits_of(model, ids)
    fusion = fuse(model, kinds=kinds)
    with in_engine(fusion):
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(model, ids), expected)


def test_a_step_is_made_of_the_fused_kernels_alone(tokenizer: Any) -> None:
    model, kernels = tiny_model(len(tokenizer)), Counted()
    fusion = Fusion(model, kernels=kernels, linear_kernels=linear_reference)
    engine = ContinuousEngine(pipeline_of(model, tokenizer), fusion=fusion)
    kernels.calls.clear()
    write(engine, [[5, 6, 7]], 2)
    # Two forwards of two layers: the first norm has no addition before it, all others have.
    layers = ["rotate_and_write", "add_rms_norm", "activation_mul", "add_rms_norm"] * 2
    assert kernels.calls == ["cos_sin", "rms_norm", *layers] * 2
    engine.close()


class TestPatches:
    def test_only_where_it_is_applied(self) -> None:
        model, kernels = tiny_model(300), Counted()
        fusion = Fusion(model, kernels=kernels, linear_kernels=linear_reference)
        kernels.calls.clear()
        logits_of(model, [1, 2, 3])
        model.generate(torch.tensor([[4, 5]]), max_new_tokens=3, pad_token_id=0)
        assert kernels.calls == []
        with in_engine(fusion):
            logits_of(model, [1, 2, 3])
        assert kernels.calls.count("activation_mul") == 2

    def test_other_threads_see_the_modules_themselves(self) -> None:
        model, kernels = tiny_model(300), Counted()
        expected = logits_of(model, [1, 2, 3])
        fusion = Fusion(model, kernels=kernels, linear_kernels=linear_reference)
        kernels.calls.clear()
        found: list[torch.Tensor] = []
        with in_engine(fusion):
            thread = threading.Thread(target=lambda: found.append(logits_of(model, [1, 2, 3])))
            thread.start()
            thread.join()
        assert torch.equal(found[0], expected)
        assert kernels.calls == []

    def test_close_puts_everything_back(self) -> None:
        model = tiny_model(300)
        fusion = fuse(model)
        assert len(forwards_in(model)) == 5 + 2 + 1 + 2 + 2
        fusion.close()
        assert forwards_in(model) == []
        assert fusion.summary == ()
        with in_engine(fusion):
            assert logits_of(model, [1, 2]).isfinite().all()

    def test_a_forgotten_fusion_does_nothing(self) -> None:
        model = tiny_model(300)
        expected = logits_of(model, [1, 2, 3])
        fuse(model)
        assert torch.equal(logits_of(model, [1, 2, 3]), expected)

    def test_two_on_one_model_close_in_any_order(self) -> None:
        for first_closes in (True, False):
            model, kernels = tiny_model(300), (Counted(), Counted())
            first, second = (Fusion(model, kernels=counted, linear_kernels=linear_reference) for counted in kernels)
            for counted in kernels:
                counted.calls.clear()
            with in_engine(first):
                logits_of(model, [1, 2, 3])
            assert (len(kernels[0].calls), len(kernels[1].calls)) == (8, 0)
            closed, other, left = (first, second, kernels[1]) if first_closes else (second, first, kernels[0])
            closed.close()
            left.calls.clear()
            with in_engine(other):
                logits_of(model, [1, 2, 3])
            assert len(left.calls) == 8
            other.close()
            with in_engine(first), in_engine(second):
                logits_of(model, [1, 2, 3])
            assert len(left.calls) == 8

    def test_a_copy_of_the_model_is_its_own(self) -> None:
        model = tiny_model(300)
        fusion = fuse(model)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.model.norm.weight.mul_(2.0)
        expected = logits_of(model, [1, 2, 3])
        assert not torch.allclose(logits_of(twin, [1, 2, 3]), expected)
        fusion.close()
        assert torch.equal(logits_of(model, [1, 2, 3]), expected)

    def test_someone_in_front_of_a_module_is_left_there(self) -> None:
        model = tiny_model(300)
        norm, seen = model.model.layers[0].input_layernorm, []
        before = norm.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            seen.append(x.shape)
            return before(x)

        norm.forward = forward
        fusion = fuse(model)
        [found] = [found for found in fusion.summary if found.kind == NORM]
        assert (found.fused, found.left) == (4, {"other code has replaced its forward": 1})
        with in_engine(fusion):
            logits_of(model, [1, 2, 3])
        fusion.close()
        assert norm.forward is forward
        assert seen

    def test_hooks_of_a_norm_still_see_it(self) -> None:
        model, seen = tiny_model(300), []
        norm = model.model.layers[0].post_attention_layernorm
        norm.register_forward_hook(lambda module, args, output: seen.append(output))
        fusion = fuse(model)
        seen.clear()
        with in_engine(fusion):
            logits_of(model, [1, 2, 3])
        assert len(seen) == 1

    def test_hooks_that_come_later_see_it_too(self, tokenizer: Any) -> None:
        model, seen = tiny_model(len(tokenizer)), []
        fusion = fuse(model)
        engine = ContinuousEngine(pipeline_of(model, tokenizer), fusion=fusion)
        expected = write(engine, [random_ids(9)], 4)
        norm = model.model.layers[0].post_attention_layernorm
        assert id(norm) in fusion.steps
        without_hook = no_graph_reason(model)
        handle = norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        assert no_graph_reason(model) == (
            "a hook on model.layers.0.post_attention_layernorm, which a graph would not call"
        )
        seen.clear()
        assert write(engine, [random_ids(9)], 4) == expected
        assert len(seen) >= 4
        handle.remove()
        assert no_graph_reason(model) == without_hook
        engine.close()
        fusion.close()

    @pytest.mark.parametrize("part", ["mlp.act_fn", "mlp.gate_proj", "self_attn.q_proj", "self_attn", "mlp"])
    def test_hooks_see_every_part(self, part: str) -> None:
        model, seen = tiny_model(300), []
        model.model.layers[0].get_submodule(part).register_forward_hook(lambda *given: seen.append(given))
        fusion = fuse(model)
        seen.clear()
        with in_engine(fusion):
            logits_of(model, [1, 2, 3])
        assert len(seen) == 1

    def test_hidden_states_asked_for_once_change_nothing(self) -> None:
        """transformers leaves its hooks on the modules, and they do nothing from then on."""
        model = tiny_model(300)
        before = fingerprint(model)
        assert model(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states
        assert model.model.layers[0]._forward_hooks
        assert fingerprint(model) == before
        assert no_graph_reason(model) == "weights on cpu"

    def test_weights_are_read_when_they_are_used(self) -> None:
        model = tiny_model(300)
        fusion = fuse(model)
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight.mul_(3.0)
        expected = logits_of(model, [1, 2, 3])
        with in_engine(fusion):
            torch.testing.assert_close(logits_of(model, [1, 2, 3]), expected, rtol=1e-4, atol=1e-4)

    def test_on_a_cpu_nothing_is_fused_by_itself(self) -> None:
        model = tiny_model(300)
        fusion = Fusion(model)
        assert fusion.unsupported_reason == "there are no kernels for cpu"
        assert forwards_in(model) == []

    def test_an_unknown_kind(self) -> None:
        with pytest.raises(InvalidOptionError, match="nonsense"):
            Fusion(tiny_model(300), kinds=("nonsense",))


class TestFormulas:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(
        ("name", "offset", "rounds_first"), [("llama", 0.0, True), ("gemma2", 1.0, False), ("olmo2", 0.0, False)]
    )
    def test_norms(self, dtype: torch.dtype, name: str, offset: float, rounds_first: bool) -> None:
        model = family_model(FAST[name])
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "norm" in parameter_name:
                    parameter.normal_(0.0, 0.5)
        model.to(dtype)
        fusion = fuse(model, kinds=(NORM,))
        steps = [step for step in fusion.steps.values() if isinstance(step, NormStep)]
        assert steps
        assert {step.offset for step in steps} == {offset}
        if dtype == torch.bfloat16:  # elsewhere the order of rounding hardly ever shows in so few numbers
            assert {step.rounds_first for step in steps} == {rounds_first}

    @pytest.mark.parametrize(
        ("activation", "found"),
        [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh")],
    )
    def test_activations(self, activation: str, found: str) -> None:
        config = FAST["llama"]
        model = family_model(type(config)(config=config.config, options={**config.options, "hidden_act": activation}))
        fusion = fuse(model, kinds=(GATED_MLP,))
        assert {step.activation for step in fusion.steps.values() if isinstance(step, GatedMlpStep)} == {found}

    def test_an_activation_that_is_not_known(self) -> None:
        config = FAST["llama"]
        model = family_model(type(config)(config=config.config, options={**config.options, "hidden_act": "relu"}))
        [found] = fuse(model, kinds=(GATED_MLP,)).summary
        assert found.left == {"its activation is neither SiLU nor GELU": 2}

    @pytest.mark.parametrize("name", ["llama-grouped", "gemma3", "glm4"])
    def test_16_bits(self, name: str, tokenizer: Any) -> None:
        model = family_model(FAST[name]).to(torch.bfloat16)
        fusion = fuse(model)
        assert all(is_whole(name, kind) for kind in fusion.summary), fusion.summary
        engine = ContinuousEngine(pipeline_of(model, tokenizer), fusion=fusion)  # compares its logits with the model's
        assert [len(ids) for ids in write(engine, [random_ids(20)], 5)] == [5]
        engine.close()


@pytest.mark.compat
def test_adapters_of_several_rows(tmp_path: Path, smollm2: Path, tokenizer: Any) -> None:
    """LoRA inside of MLP and attention, a different one for each row."""
    pytest.importorskip("peft")
    base = tmp_path / "base"
    tiny_model(len(tokenizer)).save_pretrained(base)
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    with quietly():
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        for seed, name in enumerate(("one", "two")):
            make_adapter(base, tmp_path / name, seed=seed, target_modules=targets)
            model.load_adapter(str(tmp_path / name), adapter_name=name)
    prompt, expected = random_ids(9), {}
    for name in ("one", "two"):
        choose_adapter(model, name)
        expected[name] = generated_ids(model, prompt, 12)
    enable_adapters(model, False)
    expected["base"] = generated_ids(model, prompt, 12)
    assert len({tuple(ids) for ids in expected.values()}) == 3
    switch = AdapterSwitch(model, ("one", "two"))
    kernels = Counted()
    fusion = Fusion(model, kernels=kernels, linear_kernels=linear_reference)
    engine = ContinuousEngine(pipeline_of(model, tokenizer), adapters=switch, fusion=fusion)
    kernels.calls.clear()
    for name, ids in expected.items():
        assert write(engine, [prompt], 12, adapter=name) == [ids]
    assert {"rotate_and_write", "activation_mul", "add_rms_norm"} <= set(kernels.calls)
    engine.close()


def test_changed_weights_are_checked_anew(tokenizer: Any) -> None:
    model = tiny_model(len(tokenizer))
    fusion = fuse(model)
    engine = ContinuousEngine(pipeline_of(model, tokenizer), fusion=fusion)
    before = write(engine, [[5, 6, 7]], 8)
    with torch.no_grad():
        model.model.layers[0].mlp = copy.deepcopy(model.model.layers[0].mlp)
        model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    assert write(engine, [[5, 6, 7]], 8) == [generated_ids(model, [5, 6, 7], 8)] != before
    [found] = [found for found in fusion.summary if found.kind == GATED_MLP]
    assert found.fused == 1
    engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", ["llama-grouped", "llama-head-96", "qwen3", "gemma2", "glm", "phi3", "cohere", "phi"])
def test_graphs_of_fused_steps_write_the_same(name: str) -> None:
    model, tokenizer = family_model(FAST[name]).cuda(), byte_fallback_tokenizer()
    prompts = [random_ids(count) for count in (23, 5, 40)]
    plain = ContinuousEngine(pipeline_of(model, tokenizer), kv_cache_memory="64MiB")
    expected = write(plain, prompts, 24)
    plain.close()
    fusion = Fusion(model)
    assert fusion.unsupported_reason is None
    assert sum(kind.fused for kind in fusion.summary) > 0
    engine = ContinuousEngine(pipeline_of(model, tokenizer), kv_cache_memory="64MiB", fusion=fusion)
    for _ in range(3):  # the later ones from graphs, of prompts too
        assert write(engine, prompts, 24) == expected
    assert engine.info.graphs, engine.info.reason
    engine.close()
    fusion.close()
    assert forwards_in(model) == []
