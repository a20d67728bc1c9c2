"""Our own attention in a model of transformers: the model finds it, and passes the expected arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from langchain_quantllm.compat.transformers_attention import (
    INERT_ARGUMENTS,
    WritingCache,
    attends_to_text,
    attention_name,
    attention_of,
    chunk_of,
    counting_layers,
    heads_in_turn,
    mask_maker_of,
    missing_attention_api,
    names_attention,
    register,
    set_attention_name,
    values_of,
)
from langchain_quantllm.compat.transformers_models import cache_name
from langchain_quantllm.engine.model_probe import unsupported_reason
from tests.support.families import FAST, family_model
from tests.support.models import tiny_model

WITH_SINKS = ("gpt_oss", "mimo_v2_flash", "granite_swa", "granitemoe_swa", "flint")
IDS = torch.arange(1, 8)[None]
COMPUTED = {"scaling", "sliding_window", "softcap", "s_aux"}


@pytest.fixture(params=["llama", "qwen2", "mistral"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(512, request.param)


def test_all_is_there() -> None:
    assert missing_attention_api() is None


@torch.no_grad()
def test_a_registered_attention_is_called_with_its_own_mask(model: Any) -> None:
    expected = model(input_ids=IDS).logits
    asked: list[set[str]] = []
    masks: list[Any] = []
    name = attention_name(model.config)

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        asked.append({n for n, given in kwargs.items() if given is not None and not n.startswith("output_")})
        masks.append(attention_mask)
        assert query.shape[2] == key.shape[2] == IDS.shape[1]
        return attention_of(name, module)(module, query, key, value, attention_mask, **kwargs)

    def make_mask(*args: Any, **kwargs: Any) -> Any:
        return mask_maker_of(name)(*args, **kwargs)

    register("compat_test", attend, make_mask)
    assert names_attention(model.config)
    set_attention_name(model.config, "compat_test")
    found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected)
    assert len(asked) == model.config.num_hidden_layers
    assert set.union(*asked) <= INERT_ARGUMENTS | COMPUTED


@torch.no_grad()
def test_the_eager_attention_is_found_beside_the_class(model: Any) -> None:
    expected = model(input_ids=IDS).logits
    layer = next(m for name, m in model.named_modules() if name.endswith("self_attn"))
    eager = attention_of("eager", layer)
    assert eager.__module__ == type(layer).__module__
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_cache_is_given_what_is_new_and_what_it_returns_is_used(model: Any) -> None:
    expected = model(input_ids=IDS).logits
    written: list[tuple[int, torch.Size, torch.Size]] = []

    def write(key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        written.append((layer, key.shape, value.shape))
        return key, value

    positions = torch.arange(IDS.shape[1])[None]
    options = {cache_name(model): WritingCache(write), "position_ids": positions, "use_cache": True}
    found = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options).logits
    torch.testing.assert_close(found, expected)
    config = model.config
    shape = torch.Size((1, config.num_key_value_heads, IDS.shape[1], config.hidden_size // config.num_attention_heads))
    assert written == [(layer, shape, shape) for layer in range(config.num_hidden_layers)]


def test_without_the_registry_the_fast_engine_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionMaskInterface

    [home] = [base for base in AttentionMaskInterface.__mro__ if "register" in vars(base)]
    missing_attention_api.cache_clear()
    monkeypatch.delattr(home, "register")
    try:
        assert missing_attention_api() == "this transformers has no AttentionInterface.register"
        assert unsupported_reason(tiny_model(512)) == missing_attention_api()
    finally:
        monkeypatch.undo()
        missing_attention_api.cache_clear()


@pytest.mark.parametrize("name", [name for name in WITH_SINKS if name in FAST])
@torch.no_grad()
def test_sinks_come_as_an_argument_beside_the_window(name: str) -> None:
    model = family_model(FAST[name])
    eager = attention_name(model.config)
    found: list[tuple[int | None, Any]] = []

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        found.append((kwargs.get("sliding_window"), kwargs.get("s_aux")))
        return attention_of(eager, module)(module, *args, **kwargs)

    register("compat_test", attend, mask_maker_of(eager))
    set_attention_name(model.config, "compat_test")
    model(input_ids=IDS)
    assert [window for window, _ in found] == [24, None]
    kinds = [None if sinks is None else sinks.shape for _, sinks in found]
    assert kinds == [(4,), None if name == "mimo_v2_flash" else (4,)]


def test_the_chunks_of_a_layer_are_in_its_config() -> None:
    for name, expected in {"llama4": [24, 0], "gemma3": [0, 0], "llama": [0, 0]}.items():
        attentions = [m for n, m in family_model(FAST[name]).named_modules() if n.endswith("self_attn")]
        assert [chunk_of(module) for module in attentions] == expected
    assert chunk_of(torch.nn.Linear(1, 1)) == 0


@torch.no_grad()
def test_a_layer_that_counts_positions_itself_adds_the_offsets_of_its_tokens() -> None:
    model = family_model(FAST["llama4"])
    attention = next(m for n, m in model.named_modules() if n.endswith("layers.1.self_attn"))
    found: list[torch.Tensor] = []

    def attend(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(query)
        return query.transpose(1, 2), None

    register("compat_test", attend, lambda *args, **kwargs: None)
    set_attention_name(model.config, "compat_test")
    hidden = torch.randn(1, 1, 64).expand(1, 40, 64)
    asked: list[int] = []

    def offsets(layer: int) -> torch.Tensor:
        asked.append(layer)
        return torch.tensor([0] * 20 + [-20] * 20) if len(found) < 1 else torch.zeros(7)

    cache = WritingCache(lambda key, value, layer: (key, value), offsets)
    attention(hidden, None, None, **{cache_name(model): cache})
    assert asked == [1]
    [query] = found  # of two texts of 20 tokens, behind each other
    torch.testing.assert_close(query[:, :, :20], query[:, :, 20:])
    assert not torch.allclose(query[:, :, 0], query[:, :, 19])  # the temperature changes at 16
    assert cache.get_seq_length() == 0
    asked.clear()
    model(input_ids=IDS, **{cache_name(model): cache})
    assert asked == [1]  # no mask does
    assert counting_layers(model.config) == {1}
    model.config.attn_temperature_tuning = False
    assert counting_layers(model.config) == set()


def test_values_of_a_config_show_every_change_but_the_attention_s_name(model: Any) -> None:
    before = list(values_of(model.config))
    set_attention_name(model.config, "eager")
    assert list(values_of(model.config)) == before
    model.config.rms_norm_eps = 0.5
    assert list(values_of(model.config)) != before
    before = list(values_of(model.config))
    model.config.rope_parameters["rope_theta"] = 7.0
    assert list(values_of(model.config)) != before


def test_setting_the_name_in_a_config_leaves_those_inside_it() -> None:
    from transformers import LlavaConfig

    config = LlavaConfig(attn_implementation="sdpa")
    config.vision_config._attn_implementation = "eager"
    set_attention_name(config, "compat_test")
    assert attention_name(config) == "compat_test"
    assert (attention_name(config.vision_config), attention_name(config.text_config)) == ("eager", "sdpa")


@torch.no_grad()
def test_the_query_heads_of_a_key_head_take_turns_in_jetmoe() -> None:
    model = family_model(FAST["jetmoe"])
    attentions = [module for module in model.modules() if heads_in_turn(module)]
    assert [heads_in_turn(module) for module in attentions] == [2, 2]
    keys: list[Any] = []
    name = attention_name(model.config)

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        assert query.shape[1] == 6
        keys.append(key)
        return attention_of(name, module)(module, query, key, value, attention_mask, **kwargs)

    register("compat_turns", attend, lambda *args, **kwargs: mask_maker_of(name)(*args, **kwargs))
    set_attention_name(model.config, "compat_turns")
    model(input_ids=IDS)
    for key in keys:  # of each query head, as the module repeats them
        for head in range(6):
            assert torch.equal(key[:, head], key[:, head % 2])
        assert not torch.equal(key[:, 0], key[:, 1])
    assert not any(map(heads_in_turn, family_model(FAST["mixtral"]).modules()))


def test_attentions_between_layers_are_told_from_those_to_a_text() -> None:
    modules = list(family_model(FAST["inkling2"]).modules())
    others = {type(module).__name__ for module in modules if not attends_to_text(module)}
    assert others == {"Inkling2BlockAttentionResidual"}
    for name in ("llama", "gpt2", "falcon-7b", "gpt_bigcode", "opt"):
        assert all(map(attends_to_text, family_model(FAST[name]).modules()))


@torch.no_grad()
def test_a_layer_of_inkling_asks_the_cache_where_its_queries_are() -> None:
    model = family_model(FAST["inkling"])
    config = model.config
    assert counting_layers(config) == {1}
    config.log_scaling_n_floor = None
    assert counting_layers(config) == set()
    asked: list[int] = []

    def offsets(layer: int) -> torch.Tensor:
        asked.append(layer)
        return torch.arange(len(IDS[0]))

    cache = WritingCache(lambda key, value, layer: (key, value), offsets)
    assert cache.get_query_offset(1) == 0  # a function that makes a mask
    cache.answers_queries = True
    assert torch.equal(cache.get_query_offset(1), torch.arange(len(IDS[0])))
    assert asked == [1]
