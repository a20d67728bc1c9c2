"""The attentions of Bloom, MPT and Falcon that bias scores by distance: their parts, and their biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from langchain_quantllm.compat.transformers_alibi import (
    attend_biased,
    biases_of,
    has_known_biases,
    ignored_mask,
    is_biased_by_distance,
)
from tests.support.families import FAST, family_model, random_ids

BIASED = ("bloom", "bloom-6-heads", "mpt", "mpt-6-heads", "falcon-alibi", "falcon-alibi-6-heads")
TOKENS = 300
"""More than bfloat16 can count, in which Falcon rounds its biases."""


@pytest.mark.parametrize("name", BIASED)
@torch.no_grad()
def test_an_attention_with_its_biases_gives_the_output_of_its_own_forward(name: str) -> None:
    model = family_model(FAST[name])
    attentions = [module for module in model.modules() if has_known_biases(module)]
    assert len(attentions) == 2
    assert is_biased_by_distance(model.config)
    calls: dict[int, Any] = {}

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls[id(module)] = args, kwargs, output

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in attentions]
    model(input_ids=torch.tensor([random_ids(TOKENS)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer, module in enumerate(attentions):
        args, kwargs, output = calls[id(module)]

        def attend(
            query: Any, key: Any, value: Any, number: int, scale: float, module: Any = module, layer: int = layer
        ) -> Any:
            assert number == layer
            biases = biases_of(module, TOKENS, query.dtype, query.device)
            assert (biases.shape, biases.dtype) == ((query.shape[1], TOKENS), torch.float32)
            assert biases.is_contiguous()
            causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
            mask = biases[:, None].expand(-1, TOKENS, -1).masked_fill(~causal, -torch.inf)
            attended = scaled_dot_product_attention(
                query, key, value, attn_mask=mask[None], scale=scale, enable_gqa=key.shape[1] != query.shape[1]
            )
            return attended.transpose(1, 2).flatten(2)

        found, shares = attend_biased(module, attend, args, kwargs)
        assert shares is None
        torch.testing.assert_close(found, output[0], rtol=1e-4, atol=1e-4)


def test_attentions_without_biases_are_not_known() -> None:
    for name in ("llama", "falcon-7b"):
        model = family_model(FAST[name])
        assert not any(map(has_known_biases, model.modules()))
        assert not is_biased_by_distance(model.config)


def test_biases_that_are_not_used_as_they_are_are_not_known() -> None:
    model = family_model(FAST["bloom"])
    for module in model.modules():
        if hasattr(module, "pretraining_tp"):
            module.pretraining_tp, module.slow_but_exact = 2, True
    assert not any(map(has_known_biases, model.modules()))


@torch.no_grad()
def test_only_mpt_computes_with_its_mask_before_the_attention() -> None:
    masks = {name: ignored_mask(family_model(FAST[name]).config) for name in ("mpt", "bloom", "falcon-alibi", "llama")}
    assert [name for name, mask in masks.items() if mask is not None] == ["mpt"]
    assert ignored_mask(None) is None
