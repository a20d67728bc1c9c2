"""Attentions that cache latents: the names of their parts, what they cache, and how the heads' keys follow from it."""

from __future__ import annotations

import pytest
import torch

from langchain_quantllm.compat.transformers_latent import LatentDimensions, expansion_of, latent_attentions
from tests.support.families import FAST, LATENT, family_model

SIZES = {"rank": 40, "rotary": 8, "plain": 12, "value": 20}


@pytest.mark.parametrize("name", LATENT)
def test_every_layers_attention_is_found_with_its_sizes(name: str) -> None:
    model = family_model(LATENT[name])
    found = list(latent_attentions(model))
    assert [sizes for _, sizes in found] == [LatentDimensions(layer=i, **SIZES) for i in range(2)]
    for attention, sizes in found:
        weight = expansion_of(attention).weight
        assert weight.shape == (4 * (sizes.plain + sizes.value), sizes.rank)


def test_other_attentions_are_none() -> None:
    assert not list(latent_attentions(family_model(FAST["llama"])))


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "minicpm3"])
def test_the_expansion_holds_each_heads_key_and_then_its_value(name: str) -> None:
    [(attention, sizes), _] = latent_attentions(family_model(LATENT[name]))
    if not hasattr(attention, "expand_kv"):
        pytest.skip("this transformers caches keys and values of all heads")
    latents, rotated = torch.randn(1, 1, 3, sizes.rank), torch.randn(1, 1, 3, sizes.rotary)
    key, value = attention.expand_kv(latents, rotated)
    expanded = expansion_of(attention)(latents).view(3, 4, -1).transpose(0, 1)
    torch.testing.assert_close(key[0], torch.cat([expanded[..., : sizes.plain], rotated[0].expand(4, -1, -1)], -1))
    torch.testing.assert_close(value[0], expanded[..., sizes.plain :])
