"""Rules for single layers: read as GPTQModel reads them, written for its names of layers and for vLLM's."""

from __future__ import annotations

from typing import Any

import pytest

from langchain_quantllm.compat.gptqmodel_import import gptqmodel_imported
from langchain_quantllm.compat.gptqmodel_rules import bits_rules, checked_rules, rule_of, settings_of
from langchain_quantllm.errors import CheckpointError, InvalidOptionError
from langchain_quantllm.schemes import GPTQ, scheme_of_config
from tests.support.selection import skip_without_gptqmodel

NAMES = [
    f"model.layers.{block}.{name}"
    for block in (0, 1, 11)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.experts.3.up_proj")
]
RULES: list[dict[str, Any]] = [
    {"-:.*down_proj": {}, "+:.*\\.layers\\.1\\..*": {"bits": 8, "group_size": 32}},
    {".*layers\\.1\\.": {"bits": 2}, "-:.*gate": {}, "+:^model\\.layers\\.11\\.mlp\\.gate_proj$": {"bits": 8}},
    {"layers": {"bits": 8}},  # matched from the start of a name
    {"+:.*": {"sym": False, "mse": 2.4}},
]


@pytest.mark.compat
@pytest.mark.parametrize("rules", RULES)
def test_the_settings_of_a_layer_are_those_that_gptqmodel_finds(rules: dict[str, Any]) -> None:
    skip_without_gptqmodel()
    with gptqmodel_imported():
        from gptqmodel.quantization.config import dynamic_get
    config = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "dynamic": checked_rules(rules, "a file")}
    for name in NAMES:
        own = settings_of(config, name)
        if dynamic_get(rules, name) is False:
            assert own is None
            continue
        assert own is not None
        for key in ("bits", "group_size", "sym"):
            assert own[key] == dynamic_get(rules, name, key, config[key]), (name, key)


def test_written_rules_are_for_each_layer_and_for_those_that_vllm_joins() -> None:
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    bits_of = {(0, attention): 8, (11, attention): 8, (1, attention): 4, (1, ("mlp.gate_proj", "mlp.up_proj")): 8}
    bits_of[1, ("mlp.experts.",)] = 8
    config = {"bits": 4, "dynamic": bits_rules("model.layers", bits_of, 4)}

    def bits(name: str) -> int:
        own = settings_of(config, f"model.layers.{name}")
        assert own is not None
        return int(own["bits"])

    for block, expected in ((0, 8), (1, 4), (11, 8), (2, 4), (10, 4)):
        assert {bits(f"{block}.self_attn.{name}_proj") for name in ("q", "k", "v", "qkv")} == {expected}
        assert bits(f"{block}.self_attn.o_proj") == 4
    assert [bits(f"1.mlp.{name}") for name in ("gate_proj", "gate_up_proj", "down_proj")] == [8, 8, 4]
    assert [bits(f"1.mlp.{name}") for name in ("experts", "experts.0.down_proj", "experts_gate")] == [8, 8, 4]
    assert rule_of(config, "model.layers.1.self_attn.q_proj") is None


@pytest.mark.parametrize("rule", [r"-:(([a-z_.]|\d)+)+!", r"+:(([a-z_.]|\d)+)+!", "(a|a)*b", ".*" * 7, "("])
def test_a_rule_that_may_take_forever_or_is_none_is_refused_before_a_name_is_matched(rule: str) -> None:
    with pytest.raises(CheckpointError, match="may take forever to match|is no regular expression"):
        checked_rules({rule: {"bits": 8}}, "a file")
    with pytest.raises(CheckpointError, match="may take forever to match|is no regular expression"):
        rule_of({"dynamic": {rule: {"bits": 8}}}, NAMES[0])  # of a config that nobody has checked


@pytest.mark.parametrize(
    "dynamic",
    [[1], "x", 5, {"a": 5}, {"a": [1]}, {"a": "bits"}]
    + [{"+:.*q": {"bits": bits}, "+:.*k": {"bits": 3}} for bits in ("8", [8], 8.0, True, 5, {"a": 1})],
)
def test_rules_of_another_type_are_refused_wherever_they_are_read(dynamic: Any) -> None:
    with pytest.raises(CheckpointError, match="must be an object of rules|sets bits="):
        checked_rules(dynamic, "a file")
    with pytest.raises(InvalidOptionError, match="must be an object of rules|of a checkpoint's rule must be one of"):
        scheme_of_config({"quant_method": "gptq", "bits": 4, "dynamic": dynamic})


def test_rules_without_settings_are_rules() -> None:
    dynamic: Any = {"-:a": None, "-:b": {}, "c": {"bits": None}, "d": {"bits": 8}}
    assert list(checked_rules(dynamic, "a file")) == list(dynamic)
    assert scheme_of_config({"quant_method": "gptq", "bits": 4, "dynamic": dynamic}) == GPTQ(bits=4, other_bits=(8,))
