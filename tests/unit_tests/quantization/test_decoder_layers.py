"""Decoder blocks run one by one, compared with the model."""

from __future__ import annotations

import pytest
import torch

from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.quantization.decoder_layers import DecoderLayers, find_layout
from tests.support import families

WITHOUT_BLOCKS = (
    *("longcat_flash",),  # its config counts two layers for each block
    *("glm_moe_dsa", "glm_moe_dsa-eager", "hy_v4"),  # layers take over the choice of the indexer of another one
    *("inkling2_loop", "zaya"),  # blocks run twice, or hand on more than hidden states
)
"""Families whose blocks cannot be run one by one: refused."""

WITHOUT_LINEAR = ("gpt2", "bigcode", "openai-gpt")
"""Parts of the names of families whose layers are of another kind."""


@pytest.mark.parametrize(
    "name",
    [n for n in families.FAST if n not in WITHOUT_BLOCKS and not any(part in n for part in WITHOUT_LINEAR)],
)
def test_blocks_one_by_one_give_what_the_model_gives(name: str) -> None:
    model = families.family_model(families.FAST[name])
    layout = find_layout(model)
    ids = [families.random_ids(40, seed=seed) for seed in range(3)]
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(layout.prefix)[-1].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(input_ids=torch.tensor(ids), use_cache=False)
    handle.remove()
    blocks = DecoderLayers(model, layout, ids, "cpu")
    for index in range(layout.count):
        blocks.advance(index)
    assert torch.allclose(torch.cat(blocks.states), seen[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WITHOUT_BLOCKS)
def test_blocks_that_are_not_those_of_the_config_are_refused(name: str) -> None:
    model = families.family_model(families.FAST[name])
    with pytest.raises(UnsupportedError, match="cannot be run one by one"):
        DecoderLayers(model, find_layout(model), [families.random_ids(20)], "cpu")


def test_layers_are_grouped_by_input_in_the_order_of_use() -> None:
    model = families.family_model(families.FAST["qwen3"])
    layout = find_layout(model)
    blocks = DecoderLayers(model, layout, [families.random_ids(20)], "cpu")
    assert blocks.groups(0, layout.layers[0]) == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_observed_inputs_are_those_of_the_model() -> None:
    model = families.family_model(families.FAST["llama"])
    layout = find_layout(model)
    ids = [families.random_ids(20, seed=seed) for seed in range(2)]
    expected: list[torch.Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor(ids), use_cache=False)
    handle.remove()
    blocks = DecoderLayers(model, layout, ids, "cpu")
    blocks.advance(0)
    seen: list[torch.Tensor] = []
    blocks.observe(1, ["mlp.down_proj"], seen.append)
    assert torch.allclose(torch.cat(seen), torch.cat(expected), atol=1e-5)
    assert not layer._forward_pre_hooks


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="have no torch.nn.Linear"):
        find_layout(families.family_model(families.FAST["gpt2"]))
