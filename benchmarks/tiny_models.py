"""A tiny random model of any architecture of transformers, from its default config.

Sizes are set by the names of a config's fields, in configs inside it too. Of the layers, as many are kept as show each
kind of layer. What a name does not tell stands in `OWN`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 500
CONTEXT = 512

_SIZES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size|unpadded_vocab_size|decoder_vocab_size|vocab_size_per_layer_input", VOCAB),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length", CONTEXT),
    (r"hidden_size|d_model|n_embd|embedding_dim|emb_dim|dim_model_base|lru_width|word_embed_proj_dim|hidden_dim", 64),
    (r"attention_hidden_size|input_embedding_size|output_embedding_size|embed_dim|projection_dim|out_hidden_size", 64),
    (r"intermediate_size|ffn_dim|decoder_ffn_dim|encoder_ffn_dim|ffn_hidden_size|n_inner|dff|dim_ff|d_inner", 128),
    (r"intermediate_size_mlp|dense_intermediate_size|shared_intermediate_size|feed_forward_size|mlp_dim", 128),
    (r".*(moe|expert)\w*(intermediate|ffn_hidden)_size", 64),
    (r"(num_|n_|swa_num_|decoder_|encoder_)?attention_heads|n_heads?|num_heads|num_(de|en)coder_attention_heads", 4),
    (r"(swa_)?num_key_value_heads|num_kv_heads|num_query_groups", 2),
    (r"(swa_)?head_dim|dim_head|kv_channels|attention_head_dim|attention_head_size|d_head|global_head_dim", 16),
    (r"num_hidden_layers|n_layers?|num_layers|num_(de|en)coder_layers|(de|en)coder_layers|num_blocks|depth", 2),
    (r"num_layers_per_stack|n_input_layers|n_recurrent_layers|n_output_layers", 1),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r"zero_expert_num", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(q|kv|o)_lora_rank", 32),
    (r"qk_rope_head_dim", 8),
    (r"qk_nope_head_dim|v_head_dim", 16),
    (r"qk_head_dim", 24),
    (r"rotary_dim", 8),
    (r"linear_(num_key_heads)", 2),
    (r"linear_(num_value_heads|num_heads)|mamba_n_heads|mamba_num_heads", 4),
    (r"linear_(key_|value_)?head_dim|mamba_d_state|state_size|ssm_state_size|mamba_dt_rank|time_step_rank", 16),
    (r"chunk_size|mamba_chunk_size|block_size", 16),
    (r"sliding_window|sliding_window_size|window_size|attention_window_size|local_attention", 24),
    (r"attention_chunk_size|local_attention_window_len", 24),
    (r"index_n_heads", 16),  # with few, many scores are equal to 0, and chance decides between them
    (r"index_head_dim", 16),
    (r"index_topk", 16),
    (r"query_pre_attn_scalar", 16),
    (r"hidden_size_per_layer_input|laurel_rank|router_hidden_size|adapter_rank|gated_norm_rank|loop_gate_rank", 16),
    (r"image_size", 32),
    (r"patch_size", 8),
    (r"text_hidden_size|vision_hidden_size|mm_hidden_size", 64),
    (r"num_kv_shared_layers", 0),
)  # fmt: skip
"""Sizes by the names of fields."""

_ONE_OF_TWO = ["full_attention", "sliding_attention"]
OWN: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"mamba_d_head": 32, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_head": 32, "mamba_d_ssm": 128},
    "mamba2": {"head_dim": 32, "n_groups": 2},
    "nemotron_h": {"mamba_head_dim": 32, "n_groups": 2},
    "zamba2": {
        "mamba_headdim": 32,
        "n_mamba_heads": 4,
        "attention_head_dim": 32,
        "num_query_groups": 4,
        "attention_hidden_size": 128,
        "num_key_value_heads": 4,
        "kv_channels": 16,
        "hybrid_layer_ids": [1, 3],
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "use_mamba_kernels": False,
    },
    "dory": {"num_hidden_layers": 3},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "dots3_note_text": {"per_layer_config": None, "head_dim": 24},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "mamba_d_head": 32},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "hrm_text": {"num_hidden_layers": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_key_value_heads": 1},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "n_mamba_heads": 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "use_mamba_kernels": False,
    },
    "hunyuan_vl_text": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "xdrope_section": [2, 2, 2, 2]},
    },
    "xlstm": {"hidden_size": 64, "num_heads": 4, "qk_dim_factor": 1.0},
}
"""Fields of single architectures, by the type of their config."""
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_WITH_SECTIONS = (
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "paddleocr_vl_text",
    "glm4v_text",
    "glm46v_text",
    "glm_ocr_text",
    "glmga_text",
)
OWN = {
    **{name: {"rope_parameters": _SECTIONS} for name in _WITH_SECTIONS},
    "glm4v_moe_text": {
        "rope_parameters": {**_SECTIONS, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
        "head_dim": 16,
    },
    **OWN,
}

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
_IDS = re.compile(r".*_token_id|.*_token_index")


def tiny_config(model_type: str) -> Any:
    """Make the config of a tiny model of a type, such as `"llama"`.

    Raises:
        Exception: What transformers raises for a config that it does not take.
    """
    kind = CONFIG_MAPPING[model_type]
    return _shrunk(kind())


def is_decoder_only(model_type: str) -> bool:
    """Whether models of a type are decoders as they are published, and no part of an encoder-decoder."""
    config = CONFIG_MAPPING[model_type]()
    return not _value(config, "is_encoder_decoder") and _value(config, "is_decoder") is not False


def _shrunk(config: Any) -> Any:
    kind = type(config)
    given: dict[str, Any] = {}
    kept = _kept_layers(config)
    for name, value in config.to_dict().items():
        inner = _inner_config(config, name)
        if inner is not None:
            given[name] = _shrunk(inner).to_dict()
        elif isinstance(value, list) and kept is not None and len(value) == kept[0]:
            given[name] = [value[i] for i in kept[1]]
        elif _IDS.fullmatch(name) and isinstance(value, int) and not isinstance(value, bool):
            given[name] = value if 0 <= value < 10 else VOCAB - 1 - len(name) % 16
        elif isinstance(value, int) and not isinstance(value, bool):
            given[name] = _size(name, value)
        elif name in ("rope_parameters", "rope_scaling"):
            given[name] = copy.deepcopy(value)
            _set_sections(given[name], _value(config, "qk_rope_head_dim") is not None)
        elif name == "per_layer_config" and kept is not None:
            of_kept = {i: value.get(f"{old:02d}", value.get(str(old))) for i, old in enumerate(kept[1])}
            given[name] = {i: {n: 2 * _size(n, v) for n, v in own.items()} for i, own in of_kept.items() if own}
    if kept is not None:
        given.update({name: len(kept[1]) for name in _LAYER_COUNTS if name in given})
    if given.get("kv_lora_rank"):  # latent attention: every head has its own keys
        given["num_key_value_heads"] = given["num_attention_heads"]
        if _value(config, "head_dim") == _value(config, "qk_rope_head_dim"):
            given["head_dim"] = given["qk_rope_head_dim"]
    if given.get("is_decoder", _value(config, "is_decoder")) is False:
        given["is_decoder"] = True
    given |= dict(OWN.get(config.model_type, {}))
    given.pop("model_type", None)
    return kind(**given)


def _set_sections(rope: Any, is_latent: bool) -> None:
    """Divide the rotary dimensions among time, height and width, where a model does that."""
    if not isinstance(rope, dict):
        return
    for value in rope.values():
        _set_sections(value, is_latent)
    if isinstance(rope.get("mrope_section"), list):
        half = 4 if is_latent else int(8 * rope.get("partial_rotary_factor", 1.0))
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def _value(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except (AttributeError, RuntimeError):  # it differs between layers
        return None


def _inner_config(config: Any, name: str) -> Any:
    inner = _value(config, name)
    return inner if isinstance(inner, PreTrainedConfig) else None


def _size(name: str, value: int) -> int:
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, name):
            return min(size, value) if value > 0 else value
    return value


def _kept_layers(config: Any) -> tuple[int, list[int]] | None:
    """Choose the layers that show every kind of layer: how many there are, and the numbers of those that are kept."""
    count = next((n for name in _LAYER_COUNTS if isinstance(n := getattr(config, name, None), int)), None)
    if count is None:
        return None
    lists = [v for v in config.to_dict().values() if isinstance(v, list) and len(v) == count and count > 2]
    kept: list[int] = []
    for values in lists:
        for value in {str(v): v for v in values}.values():
            if not any(values[i] == value for i in kept):
                kept.append(values.index(value))
    kept += [i for i in range(count) if i not in kept][: max(0, 2 - len(kept))]
    return count, sorted(kept)[:6]


def tiny_model(model_type: str, *, seed: int = 0, gain: float = 0.3, images: bool = False) -> Any:
    """Make a tiny random model of a type, in float32, with wide weights, so that texts change from token to token."""
    config = tiny_config(model_type)
    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(copy.deepcopy(config)).parameters())
    if size > 30e6:
        msg = f"{model_type} has {size / 1e6:.0f}M parameters"
        raise ValueError(msg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1:
                    weight.normal_(0.0, gain)
                elif name.endswith("bias"):
                    weight.normal_(0.0, 0.1)
    model.generation_config = GenerationConfig(eos_token_id=None)
    return model
