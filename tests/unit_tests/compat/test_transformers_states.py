"""States in models of transformers: the modules that keep them are found, and our cache is to them like its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from langchain_quantllm.compat.transformers_attention import WritingCache
from langchain_quantllm.compat.transformers_models import cache_of
from langchain_quantllm.compat.transformers_states import (
    OTHER_LAYER_TYPES,
    StateCache,
    StateKey,
    holds_nothing,
    is_cache,
    passing_for_own,
    state_modules,
    states_of,
)
from tests.support.families import FAST, WITH_STATES, family_model, random_ids
from tests.support.selection import slow_but
from tests.support.state_families import inputs_of


def filled(model: Any, count: int = 9) -> Any:
    with torch.no_grad():
        return cache_of(model(input_ids=torch.tensor([random_ids(count)]), use_cache=True))


def run(module: Any, hidden: torch.Tensor, cache: Any) -> torch.Tensor:
    if type(module).__name__ == "MiniMaxLightningAttention":
        return module(hidden, None, None, cache=cache)[0]
    output = module(*inputs_of(module, hidden), cache=cache)
    return torch.cat([part.flatten(2) for part in output], -1) if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", WITH_STATES)
def test_each_layer_with_states_has_one_module_that_keeps_them(name: str) -> None:
    model = family_model(FAST[name])
    states = states_of(filled(model))
    assert states
    modules = [module.layer_idx for module in state_modules(model)]
    if name.startswith("inkling"):  # four in each layer, and again in each pass of a loop, as further layers
        layers = model.config.num_hidden_layers
        assert modules == sorted([*range(layers)] * 4)
        passes = 2 if name == "inkling2_loop" else 0
        assert {key.layer for key in states} == {*range(layers + passes)}
        assert len(states) == 4 * (layers + passes)
    else:
        assert modules == sorted({key.layer for key in states})
    assert all(state.shape[0] == 1 for state in states.values())
    assert set(model.config.layer_types or ()) - {"full_attention", "sliding_attention"} <= OTHER_LAYER_TYPES


def test_modules_of_a_model_without_states_are_not_taken() -> None:
    assert list(state_modules(family_model(FAST["llama"]))) == []


def test_layers_hold_keys_and_values_states_both_or_nothing() -> None:
    layers = filled(family_model(FAST["nemotron_h"])).layers  # a state, experts, attention
    assert [holds_nothing(layer) for layer in layers] == [True, True, False]
    assert [holds_nothing(layer) for layer in filled(family_model(FAST["falcon_h1"])).layers] == [False, False]
    assert states_of(filled(family_model(FAST["llama"]))) == {}


@pytest.mark.parametrize("name", slow_but(["qwen3_next", "lfm2", "mamba2", "jamba"], WITH_STATES))
@torch.no_grad()
def test_a_module_goes_on_from_our_states_as_from_its_own(name: str) -> None:
    model = family_model(FAST[name])
    module: Any = next(iter(state_modules(model)))
    theirs = type(filled(model))() if name == "minimax" else DynamicCache(config=model.config)
    ours: dict[StateKey, torch.Tensor] = {}

    def read(key: StateKey) -> torch.Tensor:
        return ours[key].clone()

    widths = {key: state.shape[-1] for key, state in states_of(filled(model)).items()}
    for start, count in ((0, 2), (2, 11), (13, 1), (14, 1), (15, 5)):
        hidden = torch.randn(1, count, 64, generator=torch.Generator().manual_seed(start))
        cache = StateCache(read, widths, begins=not start)
        found, expected = (run(module, hidden, one) for one in (cache, theirs))
        torch.testing.assert_close(found, expected)
        ours.update(cache.states)
        own = module.layer_idx, getattr(module, "conv_idx", None)
        kept = {k: state for k, state in states_of(theirs).items() if own in {(k.layer, k.number), (k.layer, None)}}
        assert ours.keys() == kept.keys()
        for key, state in kept.items():
            torch.testing.assert_close(ours[key], state)


def test_our_cache_passes_for_minimax_s_own() -> None:
    model = family_model(FAST["minimax"])
    own = type(filled(model))
    kind = passing_for_own(WritingCache, model)
    cache = WritingCache(lambda key, value, layer: (key, value))
    cache.__class__ = kind
    assert isinstance(cache, own)
    assert isinstance(cache, WritingCache)
    assert cache.get_seq_length() == 0
    assert torch.equal(cache.update(torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)[0], torch.ones(1, 1, 2, 4))
    assert passing_for_own(WritingCache, family_model(FAST["llama"])) is WritingCache
    assert passing_for_own(WritingCache, family_model(FAST["qwen3_next"])) is WritingCache


def test_a_cache_says_whether_there_are_states() -> None:
    key = StateKey(3, "conv", 0)
    begins, goes_on = (StateCache(lambda key: torch.ones(1, 2, 4), {key: 4}, begins=b) for b in (True, False))
    assert is_cache(begins)
    assert not is_cache(torch.ones(1))
    assert begins.get_conv_state(3) is None
    assert begins.get_recurrent_state(3) is None
    assert not begins.has_previous_state(3)
    assert torch.equal(goes_on.get_conv_state(3), torch.ones(1, 2, 4))
    assert goes_on.get_recurrent_state(3) is None
    assert goes_on.has_previous_state(3, 0)
    assert not goes_on.is_recording_past(3)
    new = torch.arange(6.0).view(1, 2, 3)
    assert begins.update_conv_state(new, 3).shape == (1, 2, 4)  # zeros before the text
    assert torch.equal(goes_on.update_conv_state(new, 3), torch.cat([torch.ones(1, 2, 4), new], -1))
    assert torch.equal(goes_on.states[key], torch.cat([torch.ones(1, 2, 1), new], -1))
