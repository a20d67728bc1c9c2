"""Rules for single layers in the config of a GPTQ checkpoint (`dynamic`), read and written as GPTQModel and vLLM do.

A rule is a regular expression that is matched from the start of a layer's name; the first that matches counts. "-:"
before it leaves the layer unquantized; "+:" or nothing before it gives the layer settings of its own.

Source: gptqmodel/quantization/config.py, `_resolve_dynamic_override`; vllm/model_executor/layers/quantization/utils/
gptq_utils.py, `get_dynamic_override`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_quantllm.compat.name_patterns import may_take_long
from langchain_quantllm.errors import CheckpointError
from langchain_quantllm.schemes import GPTQ_BITS

SETTINGS = ("bits", "group_size", "sym", "desc_act")
"""Settings of a rule that change how a packed layer is read; others are for quantizing."""

_UNREADABLE = ("adapter", "checkpoint_format", "format", "method", "pack_dtype", "quant_method")
"""Settings of a rule that change what is stored in a way that is not read here."""

_JOINED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
"""vLLM's name of layers that it joins, by which it asks for their settings; theirs must be the same. Source:
`packed_modules_mapping` of vllm/model_executor/models."""


def checked_rules(dynamic: Any, source: str) -> dict[str, dict[str, Any]]:
    """Check the rules of a checkpoint, and keep the settings that its layers are read by.

    Args:
        dynamic: The value of `dynamic`.
        source: Name of the file, for errors.

    Raises:
        CheckpointError: If they are no rules, or ask for what cannot be read.
    """
    if not isinstance(dynamic, Mapping) or not all(isinstance(own or {}, Mapping) for own in dynamic.values()):
        msg = f"dynamic={dynamic!r} in {source} must be an object of rules, each with an object of settings."
        raise CheckpointError(msg)
    found: dict[str, dict[str, Any]] = {}
    for rule, given in dynamic.items():
        _compiled(rule)
        own = {} if rule.startswith("-:") else dict(given or {})
        if unreadable := next((name for name in _UNREADABLE if own.get(name) is not None), None):
            msg = (
                f"the rule {rule!r} of dynamic in {source} sets {unreadable}={own[unreadable]!r}, which differs by "
                "layer in no checkpoint that is loaded here."
            )
            raise CheckpointError(msg)
        own = {name: own[name] for name in SETTINGS if own.get(name) is not None}
        _check_settings(own, rule, source)
        found[rule] = own
    return found


def _check_settings(own: Mapping[str, Any], rule: str, source: str) -> None:
    size = own.get("group_size", -1)
    bits = own.get("bits", 4)
    allowed = {
        "bits": type(bits) is int and bits in GPTQ_BITS,
        "group_size": type(size) is int and (size == -1 or size > 0),
    }
    allowed |= {name: isinstance(own.get(name, True), bool) for name in ("sym", "desc_act")}
    if wrong := next((name for name, right in allowed.items() if not right), None):
        msg = (
            f"the rule {rule!r} of dynamic in {source} sets {wrong}={own[wrong]!r}; bits are one of "
            f"{', '.join(map(str, GPTQ_BITS))}, a group size is -1 or positive, sym and desc_act are true or false."
        )
        raise CheckpointError(msg)


def rule_of(config: Mapping[str, Any], name: str) -> str | None:
    """Return the rule of a layer; None if there is none.

    Args:
        config: The checkpoint's `quantization_config`.
        name: Full name of the layer, such as `"model.layers.0.self_attn.q_proj"`.

    Raises:
        CheckpointError: If a rule is no regular expression, or one that may take forever.
    """
    return next((rule for rule in config.get("dynamic") or {} if _compiled(rule).match(name)), None)


def settings_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """Return the config of a layer, with the settings of its rule; None if the rule leaves it unquantized."""
    rule = rule_of(config, name)
    if rule is None:
        return config
    return None if rule.startswith("-:") else {**config, **config["dynamic"][rule]}


def bits_rules(
    prefix: str, bits_of: Mapping[tuple[int, tuple[str, ...]], int], usual: int
) -> dict[str, dict[str, Any]]:
    """Write rules that give layers their bits.

    Args:
        prefix: Name of the list of blocks, such as `"model.layers"`.
        bits_of: The bits of each group of layers, by the block's number and their names inside it; a name that ends in
            a dot stands for all layers below. Layers that vLLM joins are in one group.
        usual: The bits of the config itself, for which no rule is written.

    Returns:
        The rules, for GPTQModel's names of layers and for vLLM's.
    """
    blocks: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for (index, names), bits in bits_of.items():
        if bits != usual:
            blocks.setdefault((bits, names), []).append(index)
    rules = {}
    for (bits, names), found in blocks.items():
        numbers = "|".join(map(str, sorted(found)))
        rules[f"+:{re.escape(prefix)}\\.({numbers})\\.({_alternatives(names)})$"] = {"bits": bits}
    return rules


def _alternatives(names: Sequence[str]) -> str:
    """Write the names of layers, and vLLM's of those that it joins, as alternatives of a regular expression."""
    found = [f"{re.escape(name[:-1])}(\\..*)?" if name.endswith(".") else re.escape(name) for name in names]
    for joined, parts in _JOINED.items():
        paths = {name.removesuffix(parts[0]) for name in names if name.split(".")[-1] == parts[0]}
        found += [
            re.escape(f"{path}{joined}") for path in sorted(paths) if {f"{path}{part}" for part in parts} <= {*names}
        ]
    return "|".join(found)


@functools.cache  # of large models, each layer may have a rule: more than `re` keeps
def _compiled(rule: str) -> re.Pattern[str]:
    pattern = rule[2:] if rule[:2] in ("-:", "+:") else rule
    if may_take_long(pattern):
        msg = (
            f"the rule {rule[:200]!r} of the checkpoint's dynamic may take forever to match, as it is long, has many "
            "repetitions or repeats what repeats; write it with fewer of them, or as several rules."
        )
        raise CheckpointError(msg)
    try:
        return re.compile(pattern)
    except re.error as error:
        msg = f"the rule {rule!r} of the checkpoint's dynamic is no regular expression: {error}."
        raise CheckpointError(msg) from error
