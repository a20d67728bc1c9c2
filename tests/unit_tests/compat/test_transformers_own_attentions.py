"""Attentions that compute their scores by themselves: their parts, layers, windows and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from langchain_quantllm.compat.transformers_models import cache_of
from langchain_quantllm.compat.transformers_own_attentions import (
    computes_scores_itself,
    layer_of,
    run_attention,
    uncached_heads,
    value_repeats_of,
    window_of,
)
from tests.support.families import FAST, OWN_ATTENTION, family_model, random_ids

TOKENS = 60
"""More than a window."""


@pytest.mark.parametrize("name", OWN_ATTENTION)
@torch.no_grad()
def test_an_attention_gives_the_output_of_its_own_forward(name: str) -> None:
    model = family_model(FAST[name])
    attentions = [module for module in model.modules() if computes_scores_itself(module)]
    assert len(attentions) == 2
    calls: dict[int, Any] = {}

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls[id(module)] = args, kwargs, output

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in attentions]
    cache = cache_of(model(input_ids=torch.tensor([random_ids(TOKENS)]), use_cache=True))
    for hook in hooks:
        hook.remove()
    for layer, module in enumerate(attentions):
        args, kwargs, output = calls[id(module)]

        def attend(query: Any, key: Any, value: Any, scale: float | None = None, module: Any = module) -> Any:
            heads = uncached_heads(module) or cache.layers[layer_of(module)].keys.shape[1::2]
            assert (key.shape[1], key.shape[3]) == tuple(heads)
            assert value.shape[3] == heads[1] * value_repeats_of(module)
            visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
            if window := window_of(module):
                visible = visible.triu(1 - window)
            attended = scaled_dot_product_attention(
                query, key, value, attn_mask=visible, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
            )
            return attended.transpose(1, 2)

        found = run_attention(module, attend, args, kwargs)
        assert type(found) is type(output)
        torch.testing.assert_close(found[0], output[0], rtol=1e-4, atol=1e-4)
        assert layer_of(module) == (None if name == "openai-gpt" else layer)


def test_layers_with_a_window_are_those_of_the_config() -> None:
    windows = {
        name: [window_of(m) for m in family_model(family).modules() if computes_scores_itself(m)]
        for name, family in OWN_ATTENTION.items()
    }
    own = {"gpt_neo": [0, 24], "gpt_neo-local": [24, 24]}
    assert windows == {name: own.get(name, [0, 0]) for name in OWN_ATTENTION}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon-alibi", "jetmoe"])
def test_other_attentions_are_not_known(name: str) -> None:
    assert not any(map(computes_scores_itself, family_model(FAST[name]).modules()))


def test_an_attention_that_does_not_know_its_layer_is_not_known() -> None:
    model = family_model(FAST["git"])
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = None
    assert not any(map(computes_scores_itself, model.modules()))
