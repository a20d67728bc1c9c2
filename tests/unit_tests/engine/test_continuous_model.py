"""The fast engine leaves the user's model as it is, and notices its changes."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import GenerationError
from tests.support.adapters import add_adapter, enable_adapters
from tests.support.engine import Background, MakeLLM, ids_after, ids_of, plan
from tests.support.families import FAST, family_model, generated_ids
from tests.support.models import fail_at, forwards, greedy_text, llm_of, slowly, tiny_model, wait_for_rest

pytestmark = pytest.mark.usefixtures("one_thread")
HAS_PEFT = importlib.util.find_spec("peft") is not None


class TestTheUsersModel:
    """It stays the user's: nothing of it is changed, and it may be used in other threads meanwhile."""

    def test_the_config_names_the_same_attention_as_before(self, tiny: QuantizedHuggingFaceLLM) -> None:
        config = tiny.pipeline.model.config
        before = config._attn_implementation
        tiny.invoke("Sea")
        assert config._attn_implementation == before == "sdpa"
        with forwards(tiny, fail_at(2, RuntimeError("broken"))), pytest.raises(GenerationError):
            tiny.invoke("Sea")
        assert config._attn_implementation == before

    @pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "mixtral", "gpt_oss", "bloom", "mpt"])
    def test_generate_runs_in_another_thread_meanwhile(self, tokenizer: Any, family: str) -> None:
        """With padding, whose mask only the user's own attention knows."""
        model = family_model(FAST[family])
        before = model.config._attn_implementation
        llm = llm_of(model, tokenizer)
        prompt_ids = [20 + i for i in range(30)]
        alone = ids_after(llm, prompt_ids, max_new_tokens=40)
        pad = torch.zeros(2, 9, dtype=torch.long)
        given = torch.cat([torch.cat([pad, torch.arange(50, 90).reshape(2, 20)], 1), torch.arange(100, 129)[None]])
        mask = torch.cat(
            [torch.cat([pad, torch.ones(2, 20, dtype=torch.long)], 1), torch.ones(1, 29, dtype=torch.long)]
        )

        def generate() -> list[list[int]]:
            return model.generate(
                given, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0
            ).tolist()

        expected = generate()
        done = threading.Event()

        def keep_running() -> list[list[int]]:
            found = []
            while not done.is_set():
                found.append(ids_after(llm, prompt_ids, max_new_tokens=40))
            return found

        with forwards(llm, slowly(0.001)), Background(keep_running) as running:
            try:
                for _ in range(4):
                    assert generate() == expected
            finally:
                done.set()
        assert all(ids == alone for ids in running.result)
        assert model.config._attn_implementation == before

    def test_two_pipelines_over_one_model_run_at_once(self, tokenizer: Any) -> None:
        """Each has an engine of its own, and both drive the model at once."""
        model = tiny_model(len(tokenizer))
        llms = [llm_of(model, tokenizer) for _ in range(2)]
        expected = [ids_after(llm, ids_of(7)) for llm in llms]
        assert expected[0] == expected[1]
        with forwards(llms[0], slowly(0.002)):
            for _ in range(3):
                with (
                    Background(lambda: ids_after(llms[0], ids_of(7), max_new_tokens=30)) as one,
                    Background(lambda: ids_after(llms[1], ids_of(7), max_new_tokens=23)) as other,
                ):
                    pass
                assert one.result[:12] == other.result[:12] == expected[0]
        assert model.config._attn_implementation == "sdpa"

    def test_gradients_stay_on_outside_the_engine(self, tiny: QuantizedHuggingFaceLLM) -> None:
        tiny.invoke("Sea")
        assert torch.is_grad_enabled()
        assert all(p.requires_grad for p in tiny.pipeline.model.parameters())

    def test_a_checkpoint_that_says_use_cache_false_is_fast(self, tokenizer: Any) -> None:
        """As fine-tuning with gradient checkpointing leaves it in the config; it changes no text."""
        model = tiny_model(len(tokenizer))
        model.config.use_cache = model.generation_config.use_cache = False
        llm = llm_of(model, tokenizer, max_new_tokens=5)
        assert llm.engine_info.name == "fast"
        expected = greedy_text(llm, "Sea", max_new_tokens=5)
        with forwards(llm) as seen:
            assert llm.invoke("Sea") == expected
        sizes = [tokens for _, tokens in seen.shapes]
        assert sizes[1:] == [1] * 4  # the pipeline engine, without a cache, runs all the text at each token
        assert QuantizedHuggingFaceLLM(pipeline=llm.pipeline, engine="fast", max_new_tokens=5).invoke("Sea") == expected


@pytest.mark.compat
class TestChanges:
    """Keys and values that were computed with other weights are no use."""

    def test_weights_changed_in_place_are_noticed(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        model = llm.pipeline.model
        before = ids_after(llm, ids_of(40))
        weight = model.model.layers[0].self_attn.v_proj.weight
        wait_for_rest()
        with torch.no_grad():
            weight.mul_(-1.5)
        after = ids_after(llm, ids_of(40))
        assert after == generated_ids(model, ids_of(40), 12)
        assert after != before
        wait_for_rest()
        weight.data = weight.data / -1.5
        assert ids_after(llm, ids_of(40)) == before
        wait_for_rest()
        model.load_state_dict({name: -value for name, value in model.state_dict().items()})
        assert ids_after(llm, ids_of(40)) == generated_ids(model, ids_of(40), 12)

    def test_a_hook_is_noticed(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        model = llm.pipeline.model
        before = ids_after(llm, ids_of(40))
        shift = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
        handle = model.model.layers[0].register_forward_hook(lambda module, args, output: output + shift)
        steered = generated_ids(model, ids_of(40), 12)
        assert steered != before
        wait_for_rest()
        assert ids_after(llm, ids_of(40)) == steered
        handle.remove()
        wait_for_rest()
        assert ids_after(llm, ids_of(40)) == before

    @pytest.mark.parametrize(
        ("family", "path", "values"),
        [
            ("mpt", "transformer.blocks.0.attn", "Wqkv"),
            ("gpt_neo", "transformer.h.0.attn.attention", "v_proj"),
        ],
    )
    def test_a_replaced_attention_reads_blocks_too(self, tokenizer: Any, family: str, path: str, values: str) -> None:
        """The engine stands in for all of it, or for a part of it."""
        model, other = family_model(FAST[family]), family_model(FAST[family])
        with torch.no_grad():
            other.get_submodule(path).get_submodule(values).weight.mul_(-1.5)
        llm, prompt_ids = llm_of(model, tokenizer), [20 + i for i in range(30)]
        before = ids_after(llm, prompt_ids)
        wait_for_rest()
        model.set_submodule(path, other.get_submodule(path))
        after = ids_after(llm, prompt_ids)
        assert after == generated_ids(model, prompt_ids, 12)
        assert after != before

    def test_a_change_right_after_a_call_is_noticed(self, make_tiny: MakeLLM) -> None:
        """When the engine's thread is not asleep yet."""
        llm = make_tiny()
        weight = llm.pipeline.model.model.layers[0].self_attn.v_proj.weight
        for _ in range(5):
            ids_after(llm, ids_of(40))
            with torch.no_grad():
                weight.mul_(-1.1)
            assert ids_after(llm, ids_of(40)) == generated_ids(llm.pipeline.model, ids_of(40), 12)

    def test_a_change_while_others_run_is_noticed(self, make_tiny: MakeLLM) -> None:
        llm = make_tiny()
        llm._engine()
        model = llm.pipeline.model
        with forwards(llm, slowly(0.005)) as seen, llm._engine().submit(plan(llm, ids_of(5), max_new_tokens=3000)):
            seen.wait_for(3)
            before = ids_after(llm, ids_of(40))
            with torch.no_grad():
                model.model.layers[0].self_attn.v_proj.weight.mul_(-1.5)
            after = ids_after(llm, ids_of(40))
        assert after == generated_ids(model, ids_of(40), 12)
        assert after != before

    @pytest.mark.skipif(not HAS_PEFT, reason="needs peft")
    @pytest.mark.parametrize("wraps", [True, False])
    def test_an_adapter_of_peft_is_noticed(self, tokenizer: Any, wraps: bool) -> None:
        import peft

        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = tiny_model(len(tokenizer))
        plain = generated_ids(model, ids_of(40), 12)
        llm = llm_of(model, tokenizer)

        def check(what: str, expected: Sequence[int] | None = None) -> None:
            wait_for_rest()
            assert ids_after(llm, ids_of(40)) == (expected or generated_ids(model, ids_of(40), 12)), what

        check("before", plain)  # its keys are in the prefix cache now
        torch.manual_seed(0)
        if wraps:
            model = peft.get_peft_model(model, config)
        else:
            add_adapter(model, config)
        adapted = generated_ids(model, ids_of(40), 12)
        assert adapted != plain
        check("added", adapted)
        if wraps:
            with model.disable_adapter():
                check("disabled", plain)
        else:
            enable_adapters(model, False)
            check("disabled", plain)
            enable_adapters(model, True)
        check("enabled", adapted)
        layers = [module for module in model.modules() if hasattr(module, "set_scale")]
        for layer in layers:
            layer.merge()
        check("merged")
        for layer in layers:
            layer.unmerge()
        check("unmerged", adapted)
        for layer in layers:
            layer.set_scale("default", -4.0)
        check("scaled")

    @pytest.mark.skipif(not HAS_PEFT, reason="needs peft")
    def test_a_model_wrapped_by_peft_is_fast(self, tokenizer: Any) -> None:
        import peft

        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(tiny_model(len(tokenizer)), config)
        llm = llm_of(model, tokenizer)
        assert llm.engine_info.name == "fast"
        for _ in range(2):
            assert ids_after(llm, ids_of(40)) == generated_ids(model, ids_of(40), 12)
