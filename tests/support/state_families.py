"""Recipes of tiny models whose layers keep a state; see `families`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

_VOCAB, _CONTEXT = 500, 512

_BASE = {
    "vocab_size": _VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": _CONTEXT,
}
_DELTA = {
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_expand": 2, "mamba_chunk_size": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_PURE = {"vocab_size": _VOCAB, "hidden_size": 64, "num_hidden_layers": 2}
_BOTH = ["hybrid_sliding", "hybrid"]
_INKLING = {
    **_BASE,
    "unpadded_vocab_size": _VOCAB,
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 24,
    "sliding_window_size": 24,
    "d_rel": 8,
    "rel_extent": 20,  # nothing is added to the scores of keys that are further away
    "log_scaling_n_floor": 8,  # scores grow from there
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}

STATE_RECIPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3_next": ("Qwen3Next", {**_BASE, **_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_5": ("Qwen3_5Text", {**_BASE, **_DELTA}),
    "qwen3_5_moe": ("Qwen3_5MoeText", {**_BASE, **_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 64}),
    "kimi_linear": (
        "KimiLinear",
        {
            **_BASE,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
    ),
    "olmo_hybrid": (
        "OlmoHybrid",
        {
            **_BASE,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "lfm2": ("Lfm2", {**_BASE, "conv_L_cache": 3, "layer_types": ["conv", "full_attention"]}),
    "lfm2_moe": (
        "Lfm2Moe",
        {**_BASE, **_EXPERTS, "conv_L_cache": 3, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    ),
    "lfm3": (
        "Lfm3",
        {
            **_BASE,
            "head_dim": 16,
            "sliding_window": 24,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "sliding_attention", "full_attention"],
        },
    ),
    "minimax": (
        "MiniMax",
        {
            **_BASE,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **_BASE,
            **_MAMBA2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 64,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "bamba": ("Bamba", {**_BASE, **_MAMBA2, "attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1", {**_BASE, **_MAMBA2, "mamba_d_ssm": 128}),
    "nemotron_h": (
        "NemotronH",
        {
            **{name: value for name, value in _BASE.items() if name != "num_hidden_layers"},
            "layers_block_type": ["linear_attention", "moe", "full_attention"],
            "head_dim": 16,
            "ssm_state_size": 16,
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 64,
        },
    ),
    "zamba": (
        "Zamba",
        {
            **_BASE,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "zamba2": (
        "Zamba2",
        {
            **_BASE,
            "num_key_value_heads": 4,
            "layers_block_type": ["linear_attention", "hybrid"],
            "mamba_d_state": 16,
            "n_mamba_heads": 4,
            "chunk_size": 16,
            "use_mamba_kernels": False,
        },
    ),
    "jamba": (
        "Jamba",
        {
            **_BASE,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "zaya": (
        "Zaya",
        {
            **_BASE,
            "head_dim": 16,
            "num_experts": 4,
            "moe_intermediate_size": 64,
            "router_hidden_size": 16,
            "sliding_window": 24,
            "layer_types": ["hybrid", "hybrid_sliding"],
        },
    ),
    "inkling": (
        "InklingText",
        {**_INKLING, "n_shared_experts": 1, "layer_types": _BOTH, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "inkling2": ("Inkling2Text", {**_INKLING, "layer_types": _BOTH, "n_layers_per_attn_res_block": 1}),
    "inkling2_loop": (
        "Inkling2LoopText",
        {
            **_INKLING,
            "num_hidden_layers": 3,
            "layer_types": ["hybrid_sliding", *_BOTH],
            "n_layers_per_attn_res_block": 1,
            "loop_layer_index_start": 1,
            "loop_layer_index_end": 3,
            "loop_num_passes": 2,
            "loop_gate_rank": 16,
        },
    ),
    "mamba": ("Mamba", {**_PURE, "state_size": 8}),
    "mamba2": (
        "Mamba2",
        {**_PURE, "num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 2, "chunk_size": 16},
    ),
    "falcon_mamba": ("FalconMamba", {**_PURE, "state_size": 8}),
}
"""By the family's name: the name of its config, and the config's options."""

SINGLE_TOKENS = ("jamba", "zamba", "mamba", "falcon_mamba")
"""Families of Mamba 1, whose layers in transformers go on from a state by single tokens only."""


def inputs_of(module: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what a module with a state is called with beside its cache, by hidden states of its model's width.

    Inkling's convolutions see the width of keys or of values as well, and some take what these were computed from.
    """
    if not hasattr(module, "conv_idx"):
        return (hidden,)
    width = module.conv1d.in_channels if hasattr(module, "conv1d") else module.static_weight.shape[1]
    further = (hidden,) if "dynamic_input" in inspect.signature(type(module).forward).parameters else ()
    return (hidden[..., :width], *further)
