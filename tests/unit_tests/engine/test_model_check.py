"""The check of a model when its engine is made: what it refuses, and how long its texts are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import pad
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.tiny_models import tiny_model as tiny_architecture
from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.attention import PagedForward
from langchain_quantllm.engine.checked_length import checked_length, turning_points
from langchain_quantllm.engine.forward_context import ForwardContext, forward_context
from langchain_quantllm.engine.forward_patch import ForwardPatch
from langchain_quantllm.engine.gather_attention import GatherAttention
from langchain_quantllm.engine.own_logits import difference, plain, sample_ids
from langchain_quantllm.engine.rounding_spread import RoundedLayers
from tests.support.families import FAST, family_model
from tests.support.models import llm_of, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[dict[str, Any]], dict[str, Any]]
FAULTS: dict[str, tuple[str, Change]] = {
    "no window": ("mistral-window", lambda given: given | {"window": 0}),
    "a smaller window": ("mistral-window", lambda given: given | {"window": given["window"] and 20}),
    "a larger window": ("gemma3", lambda given: given | {"window": given["window"] and 30}),
    "no chunks": ("llama4", lambda given: given | {"chunk": 0}),
    "a window for a chunk": ("llama4", lambda given: given | {"window": given["chunk"], "chunk": 0}),
    "other chunks": ("llama4", lambda given: given | {"chunk": given["chunk"] and 32}),
    "no sinks": ("gpt_oss", lambda given: given | {"sinks": None}),
    "other sinks": ("granite_swa", lambda given: given | {"sinks": given["sinks"] + 0.5}),
    "no biases": ("bloom", lambda given: given | {"biases": None}),
    "a window where there is none": ("gpt_neo", lambda given: given | {"window": given["window"] or 22}),
    "no window beside full attention": ("gpt_neo", lambda given: given | {"window": 0}),
    "another scale": ("gpt_neo", lambda given: given | {"scale": 0.25}),
    "no biases by distance": ("inkling", lambda given: given | {"relative": None}),
    "biases of the next distance": ("inkling", lambda given: given | {"relative": given["relative"].roll(1, -1)}),
    "a bias of keys far away": (
        "inkling2",
        lambda given: given | {"relative": pad(given["relative"], (0, 1), value=1.0)},
    ),
    "no sinks of tokens": ("inkling2", lambda given: given | {"sinks": None}),
    "other biases": ("mpt", lambda given: given | {"biases": given["biases"] * 1.1}),
}
"""Attention that a family does not have."""


def llm_with(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, change: Change) -> Any:
    """Make an LLM while attention over blocks has a fault."""
    attend = GatherAttention.attend

    def wrong(self: Any, pool: Any, query: torch.Tensor, batch: Any, **given: Any) -> torch.Tensor:
        return attend(self, pool, query, batch, **change(given))

    with monkeypatch.context() as patched:
        patched.setattr(GatherAttention, "attend", wrong)
        llm = llm_of(model, tokenizer)
        assert llm.engine_info is not None  # makes the engine
    return llm


@pytest.mark.parametrize("fault", FAULTS)
def test_attention_of_another_kind_than_the_model_s_is_refused(
    fault: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, change = FAULTS[fault]
    llm: QuantizedHuggingFaceLLM = llm_with(family_model(FAST[name]), tokenizer, monkeypatch, change)
    assert llm.engine_info.name == "pipeline"
    assert "its logits over KV cache blocks are not its own" in llm.engine_info.reason
    llm.unload()


def test_positions_that_do_not_begin_at_0_are_refused(tokenizer: Any) -> None:
    llm = llm_of(tiny_architecture("kosmos-2.5", images=True), tokenizer)
    assert llm.engine_info.name == "pipeline"
    assert "its logits over KV cache blocks are not its own" in llm.engine_info.reason
    llm.unload()


@pytest.mark.parametrize("name", ["llama4", "inkling"])
def test_positions_that_a_layer_counts_wrongly_are_refused(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 4's layers without rotary positions scale their queries by positions that they count themselves.

    So do Inkling's without a window.
    """
    with monkeypatch.context() as patched:
        offsets = PagedForward.offsets
        patched.setattr(PagedForward, "offsets", lambda self, layer: 0 * offsets(self, layer))
        llm = llm_of(family_model(FAST[name]), tokenizer)
        assert "its logits over KV cache blocks are not its own" in llm.engine_info.reason
    llm.unload()


@pytest.mark.parametrize("name", ["llama4", "inkling"])
def test_layers_that_count_positions_in_an_unknown_way_are_refused(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(
            "langchain_quantllm.compat.transformers_attention.WritingCache.get_seq_length", lambda self, layer=None: 0
        )
        llm = llm_of(family_model(FAST[name]), tokenizer)
        assert "its layer 1 counts positions in an unknown way" in llm.engine_info.reason
    llm.unload()


class TestLength:
    def test_a_text_goes_beyond_the_longest_change_that_there_is_room_for(self) -> None:
        model = tiny_model(512)
        assert checked_length(model, [0, 0], 1000) == 0
        assert checked_length(model, [24, 0], 1000) == 40
        assert checked_length(model, [24, 512], 1000) == 576
        assert checked_length(model, [24, 512], 575) == 40
        assert checked_length(model, [24, 512], 39) == 0

    def test_a_text_is_as_long_as_a_second_allows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model(512)
        assert checked_length(model, [24, 1024], 8000) == 1152
        assert checked_length(model, [24, 4096], 8000) == 40
        monkeypatch.setattr("langchain_quantllm.engine.checked_length._CPU_PRODUCTS", 2**25)
        assert checked_length(model, [24, 1024], 8000) == 40

    def test_factors_that_change_with_length_are_found_in_the_config(self) -> None:
        config = family_model(FAST["llama4"]).config
        assert turning_points(config, [24, 0]) == {24, 16}
        assert turning_points(family_model(FAST["inkling"]).config, [24, 0]) == {24, 20, 8}
        config.attn_temperature_tuning = False
        assert turning_points(config, [24, 0]) == {24}
        config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 128}
        assert turning_points(config, []) == {128}
        config.rope_parameters = {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": None}
        assert turning_points(config, []) == {config.max_position_embeddings}
        config.rope_parameters = {"rope_type": "yarn", "llama_4_scaling_beta": 0.1}
        config.rope_parameters["original_max_position_embeddings"] = 64
        assert turning_points(config, []) == {64}


class TestRounding:
    """In 16 bits a model's own logits say how far one more rounding in each layer moves them."""

    @pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma3", "qwen3_moe"])
    def test_layers_that_round_otherwise_move_logits_a_little_in_one_thread(self, name: str) -> None:
        model = family_model(FAST[name]).to(torch.bfloat16)
        ids = sample_ids(model, 21)
        expected = plain(model, ids).logits[0].float()
        rounded = RoundedLayers(model)
        try:
            with forward_context(ForwardContext()):
                found = plain(model, ids).logits[0].float()
            others: list[torch.Tensor] = []

            def run() -> None:
                with torch.no_grad(), forward_context(ForwardContext()):
                    others.append(plain(model, ids).logits[0].float())

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        finally:
            rounded.close()
        assert 1e-3 < difference(found, expected) < 0.1
        assert torch.equal(others[0], expected)
        with forward_context(ForwardContext()):
            assert torch.equal(plain(model, ids).logits[0].float(), expected)

    @pytest.mark.parametrize("fault", ["no sinks", "a larger window", "no biases"])
    def test_another_attention_is_refused_in_16_bits_too(
        self, fault: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        name, change = FAULTS[fault]
        llm = llm_with(family_model(FAST[name]).to(torch.bfloat16), tokenizer, monkeypatch, change)
        assert "its logits over KV cache blocks are not its own" in llm.engine_info.reason
        llm.unload()

    def test_only_layers_of_the_text_round_otherwise(self) -> None:
        text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        text |= {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0}
        vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        for model in (Qwen2_5_VLForConditionalGeneration(config), family_model(FAST["stablelm-2"])):
            layers = RoundedLayers(model)
            patched = [module for module in model.modules() if isinstance(module.__dict__.get("forward"), ForwardPatch)]
            layers.close()
            assert len(patched) == 2
            assert all(type(module).__name__.endswith("DecoderLayer") for module in patched)
