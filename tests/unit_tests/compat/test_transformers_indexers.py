"""Indexers in models of transformers: which are known, what they keep and return, and how models use the indices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.tiny_models import tiny_config
from langchain_quantllm.compat.transformers_attention import attention_of, mask_maker_of, register, set_attention_name
from langchain_quantllm.compat.transformers_indexers import (
    INDICES_ARGUMENT,
    MASKED_ATTENTIONS,
    IndexCache,
    arguments_for,
    has_unknown_indexer,
    hide_unchosen,
    ignored_index_mask,
    index_keys_of,
    indexed_layers,
    indexers,
    limited_forward,
)
from langchain_quantllm.compat.transformers_models import cache_of
from langchain_quantllm.engine.attention_interface import configs_of
from tests.support.families import FAST, INDEXED, family_model, random_ids

NAMES = list(INDEXED)
LAYERS = {"dots3_note_text": {0, 2}, "deepseek_v32": {0, 1}, "axk2": {0, 1}}
WITH_INDEXERS = {"dots3_note_text": [0, 2], "deepseek_v32": [0, 1], "axk2": [0, 1]}

pytestmark = pytest.mark.skipif(not NAMES, reason="this transformers is older than 5.24")


def model_of(name: str) -> Any:
    return family_model(INDEXED[name])


def run(model: Any, count: int) -> Any:
    with torch.no_grad():
        return model(torch.tensor([random_ids(count)]), use_cache=True)


@pytest.mark.parametrize("name", NAMES)
def test_indexers_and_the_layers_that_use_their_choice_are_found(name: str) -> None:
    model = model_of(name)
    assert [module.layer_idx for module in indexers(model)] == WITH_INDEXERS.get(name, [0, 2])
    assert indexed_layers(model.config) == LAYERS.get(name, {0, 1, 2})
    assert not has_unknown_indexer(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_keeps_one_key_of_its_indexer_for_each_token(name: str) -> None:
    model = model_of(name)
    layers = cache_of(run(model, 9)).layers
    keys = {i: index_keys_of(layer) for i, layer in enumerate(layers)}
    found = {i: tuple(of_layer.shape) for i, of_layer in keys.items() if of_layer is not None}
    assert found == dict.fromkeys(WITH_INDEXERS.get(name, [0, 2]), (1, 9, 16))


def test_other_models_have_no_indexers() -> None:
    for name in ("llama", "deepseek_v3", "mistral-window"):
        model = family_model(FAST[name])
        assert not list(indexers(model))
        assert not has_unknown_indexer(model)
        assert ignored_index_mask(model.config) is None


def test_indexers_of_other_kinds_are_unknown() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("qwen4_exp_text"))
    assert not list(indexers(model))
    assert has_unknown_indexer(model)
    model = family_model(FAST["llama"])
    model.config.index_topk = 8
    assert has_unknown_indexer(model)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_indexer_chooses_the_same_with_our_cache_as_with_its_own(name: str) -> None:
    model = model_of(name)
    module = next(iter(indexers(model)))
    theirs, ours = DynamicCache(config=model.config), torch.zeros(1, 0, 16)

    def update(keys: torch.Tensor) -> torch.Tensor:
        nonlocal ours
        ours = torch.cat([ours, keys], 1)
        return ours

    made = torch.Generator().manual_seed(0)
    for start, count in ((0, 20), (20, 1), (21, 9)):
        length = start + count
        hidden, residual = (torch.randn(1, count, dim, generator=made) for dim in (64, 24))
        angles = torch.randn(1, count, module.qk_rope_head_dim, generator=made)
        mask = (torch.arange(start, length)[:, None] >= torch.arange(length))[None]
        positions = torch.arange(start, length)[None]
        args = (hidden, residual, (angles.cos(), angles.sin()), mask)
        expected = module(*args, position_ids=positions, cache=theirs)
        wrong = {"position_ids": positions, "cache": theirs}
        given = arguments_for(module, (*args[:3], None), wrong, take=lambda t: t, mask=mask, cache=IndexCache(update))
        found = module(**given)
        assert found.dtype == expected.dtype == torch.int32
        assert torch.equal(found, expected)
        assert found.shape == (1, count, min(12, length))


@torch.no_grad()
def test_a_limited_indexer_chooses_the_best_of_its_choice() -> None:
    model = model_of(NAMES[0])
    module = next(iter(indexers(model)))
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    module.register_forward_pre_hook(see, with_kwargs=True)
    run(model, 30)
    [(args, kwargs)] = seen
    given = {**kwargs, "cache": None}
    whole = module(*args, **given)
    limited = limited_forward(module, 5)(*args, **given)
    assert torch.equal(limited[:, 5:], whole[:, 5:, :5])  # tokens that see so many
    assert whole.shape[-1] == module.index_topk == 12


@pytest.mark.parametrize("name", NAMES)
def test_models_hide_other_tokens_by_a_mask_or_hand_on_the_indices(name: str) -> None:
    model = model_of(name)
    own = model.config._attn_implementation
    assert own in MASKED_ATTENTIONS
    expected = run(model, 30).logits
    layers = set()

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        indices = kwargs.pop(INDICES_ARGUMENT)
        if indices is not None:
            layers.add(module.layer_idx)
            mask = hide_unchosen(mask, indices, key.shape[2])
        return attention_of(own, module)(module, query, key, value, mask, **kwargs)

    register("hides_unchosen", attend, mask_maker_of(own))
    for config in configs_of(model):
        set_attention_name(config, "hides_unchosen")
    torch.testing.assert_close(run(model, 30).logits, expected)
    assert layers == indexed_layers(model.config)
