"""Biases by distance that depend on the query: who computes them, who passes them on, and what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from langchain_quantllm.compat.transformers_relative import (
    counts_by_cache,
    is_relative_bias,
    passes_relative_bias,
    profiles_of,
)
from tests.support.families import FAST, family_model, random_ids

RELATIVE = ("inkling", "inkling2", "inkling2_loop")
TOKENS, EXTENT = 60, {True: 24, False: 20}
"""Tokens, and the distances that have a bias in layers with a window and in the others."""


@pytest.mark.parametrize("name", RELATIVE)
@torch.no_grad()
def test_the_profiles_hold_the_bias_of_each_distance(name: str) -> None:
    model = family_model(FAST[name])
    biases = [module for module in model.modules() if is_relative_bias(module)]
    assert len(biases) == model.config.num_hidden_layers
    calls: list[tuple[Any, Any, Any, Any]] = []

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((module, args, kwargs, output))

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in biases]
    model(input_ids=torch.tensor([random_ids(TOKENS)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    assert len(calls) >= len(biases)  # a loop calls them again
    for module, args, kwargs, dense in calls:
        profiles = profiles_of(module, args, kwargs)
        extent = module.proj.shape[1]
        assert extent in EXTENT.values()
        assert profiles.shape == (1, 4, TOKENS, extent)
        found = torch.zeros_like(dense)
        for distance in range(min(extent, TOKENS)):
            at = torch.arange(distance, TOKENS)
            found[:, :, at, at - distance] = profiles[:, :, at, distance]
        torch.testing.assert_close(found, dense)
        assert dense.abs().max() > 0.1


@pytest.mark.parametrize("name", RELATIVE)
def test_the_attentions_of_every_layer_pass_them_on(name: str) -> None:
    model = family_model(FAST[name])
    passing = [module for module in model.modules() if passes_relative_bias(module)]
    assert len(passing) == model.config.num_hidden_layers
    assert [counts_by_cache(module) for module in passing] == [name == "inkling"] * len(passing)


def test_other_models_have_none() -> None:
    modules = list(family_model(FAST["llama"]).modules())
    assert not any(check(m) for m in modules for check in (is_relative_bias, passes_relative_bias, counts_by_cache))
