"""Tiny mixtures of experts: random models in the layouts that transformers has."""

from __future__ import annotations

from typing import Any

import torch
import transformers

EXPERTS = 4
HIDDEN = 64
VOCAB = 512  # as the tokenizer of `checkpoints`

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "linear_num_key_heads": 2, "linear_num_value_heads": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "pad_token_id": 0},
    ),
    "aria": ("AriaTextConfig", {"moe_num_experts": EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32, "layers_block_type": ["attention", "moe"], "n_group": 1,
            "topk_group": 1,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
            "topk_group": 1, "q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
            "v_head_dim": 16, "first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 128},
    ),
    "jetmoe": ("JetMoeConfig", {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "kv_channels": 16}),
}  # fmt: skip


def mixture_config(kind: str, **options: Any) -> Any:
    """Make the config of a tiny mixture: `"qwen3_moe"`, `"mixtral"`, `"gpt_oss"` and others."""
    name, own = _CONFIGS[kind]
    return getattr(transformers, name)(**{**_COMMON, **own, **options})


def make_mixture(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Make a tiny random mixture whose weights are wide enough for its texts to vary."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(mixture_config(kind, **options), dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()
