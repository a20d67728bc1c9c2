"""Tiny random models of every family of decoder-only models in transformers, and of some others.

Two layers of 64 or what the family needs, in float32. The weights are wide, so that the likeliest token changes
from step to step and lies far above the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from tests.support.state_families import STATE_RECIPES

VOCAB = 500  # no multiple of 32, as a mask's words are
CONTEXT = 512
ORIGINAL_CONTEXT = 128  # beyond it, long rotary factors

_HIDDEN = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = {**_HIDDEN, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "n_inner": 128}
_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
}


_LLAMA4 = {
    "head_dim": 16,
    "intermediate_size_mlp": 128,
    "num_local_experts": 2,
    "attention_chunk_size": 24,
    "layer_types": ["chunked_attention", "full_attention"],
    "no_rope_layers": [1, 0],
    "floor_scale": 16,  # the temperature changes at each multiple
    "attn_scale": 0.5,
}
_GPT_NEO = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_layers": 2,
    "num_heads": 4,
    "max_position_embeddings": CONTEXT,
    "window_size": 24,
}
_MPT = {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT, "expansion_ratio": 2}


@dataclass(frozen=True, kw_only=True)
class Family:
    """The recipe of a tiny model of a family.

    Args:
        config: Name of the config's class in transformers.
        options: Options of the config.
        gain: Standard deviation of the weights; chosen so that texts vary and do not depend on rounding.
        attention: `attn_implementation`.
        seed: Seed of the weights; not 0 if a text would meet a tie between two tokens.
    """

    config: str
    options: Mapping[str, Any] = field(default_factory=dict)
    gain: float = 0.3
    attention: str | None = None
    seed: int = 0


def _family(config: str, base: Mapping[str, Any] = _HIDDEN, **options: Any) -> Family:
    own = {name: options.pop(name) for name in ("gain", "attention", "seed") if name in options}
    return Family(config=f"{config}Config", options={**base, **options}, **own)


FAST: dict[str, Family] = {
    "llama": _family("Llama"),
    "llama-grouped": _family("Llama", _GROUPED),
    "llama-one-kv-head": _family("Llama", num_key_value_heads=1),
    "llama-head-80": _family("Llama", _GROUPED, hidden_size=160, num_attention_heads=2, num_key_value_heads=1),
    "llama-head-96": _family("Llama", _GROUPED, head_dim=96),
    "llama-linear-rope": _family(
        "Llama", _GROUPED, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    ),
    "llama-3-rope": _family(
        "Llama",
        _GROUPED,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-dynamic-rope": _family("Llama", _GROUPED, rope_parameters=_DYNAMIC),
    "llama-longrope": _family("Llama", _GROUPED, rope_parameters=_LONGROPE),
    "llama-eager": _family("Llama", _GROUPED, attention="eager"),
    "mistral": _family("Mistral", _GROUPED, sliding_window=None),
    "mistral-window": _family("Mistral", _GROUPED, sliding_window=24),
    "qwen2": _family("Qwen2", _GROUPED),
    "qwen2-window": _family("Qwen2", _GROUPED, use_sliding_window=True, sliding_window=24, max_window_layers=1),
    "qwen3": _family("Qwen3", _GROUPED, head_dim=32),
    "gemma": _family("Gemma", _GROUPED, head_dim=32, num_key_value_heads=1),
    "gemma2": _family(
        "Gemma2",
        _GROUPED,
        head_dim=32,
        sliding_window=24,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3": _family(
        "Gemma3Text",
        _GROUPED,
        head_dim=32,
        sliding_window=24,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": _family("Phi"),
    "phi-qk-norm": _family("Phi", qk_layernorm=True),
    "phi3": _family("Phi3", _GROUPED),
    "phi3-window": _family("Phi3", _GROUPED, sliding_window=24),
    "phi3-longrope": _family(
        "Phi3", _GROUPED, rope_parameters=_LONGROPE, original_max_position_embeddings=ORIGINAL_CONTEXT
    ),
    "phi3-longrope-partial": _family(
        "Phi3",
        _GROUPED,
        rope_parameters={
            **_LONGROPE,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + i / 10 for i in range(6)],
            "long_factor": [1.5 + i / 2 for i in range(6)],
        },
        original_max_position_embeddings=ORIGINAL_CONTEXT,
    ),
    "phimoe-longrope": _family(
        "Phimoe",
        _GROUPED,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        rope_parameters={**_LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3},
    ),
    "gpt_neox": _family("GPTNeoX"),
    "gpt_neox-sequential": _family("GPTNeoX", use_parallel_residual=False, attention_bias=False),
    "gpt2": _family("GPT2", _GPT2),
    "gpt2-scaled": _family("GPT2", _GPT2, scale_attn_by_inverse_layer_idx=True),
    "opt": _family("OPT", ffn_dim=128, word_embed_proj_dim=64),
    "opt-350m": _family("OPT", ffn_dim=128, word_embed_proj_dim=32, do_layer_norm_before=False),
    "falcon-7b": _family("Falcon", ffn_hidden_size=128, multi_query=True, new_decoder_architecture=False),
    "falcon-40b": _family("Falcon", ffn_hidden_size=128, num_kv_heads=2, new_decoder_architecture=True),
    "falcon-many-heads": _family("Falcon", ffn_hidden_size=128, multi_query=False, parallel_attn=False, bias=True),
    "stablelm": _family("StableLm", _GROUPED),
    "stablelm-2": _family("StableLm", _GROUPED, qk_layernorm=True, use_parallel_residual=True, use_qkv_bias=True),
    "granite": _family(
        "Granite",
        _GROUPED,
        attention_multiplier=0.2,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        logits_scaling=4.0,
    ),
    "olmo": _family("Olmo", _GROUPED),
    "olmo-clipped": _family("Olmo", _GROUPED, clip_qkv=2.0),
    "olmo2": _family("Olmo2", _GROUPED),
    "olmo3": _family("Olmo3", _GROUPED, sliding_window=24, layer_types=["sliding_attention", "full_attention"]),
    "cohere": _family("Cohere", _GROUPED, use_qk_norm=True),
    "cohere2": _family("Cohere2", _GROUPED, sliding_window=24, layer_types=["sliding_attention", "full_attention"]),
    "starcoder2": _family("Starcoder2", _GROUPED, sliding_window=None),
    "starcoder2-window": _family("Starcoder2", _GROUPED, sliding_window=24),
    "smollm3": _family("SmolLM3", _GROUPED, no_rope_layer_interval=2),
    "glm": _family("Glm", _GROUPED, head_dim=16),
    "glm4": _family("Glm4", _GROUPED, head_dim=16),
    "nemotron": _family("Nemotron", _GROUPED),
    "persimmon": _family("Persimmon"),
    "gpt_bigcode": _family("GPTBigCode", _GPT2, multi_query=True),
    "gpt_bigcode-many-heads": _family("GPTBigCode", _GPT2, multi_query=False),
    "biogpt": _family("BioGpt"),
    "exaone4": _family("Exaone4", _GROUPED, sliding_window=24, layer_types=["sliding_attention", "full_attention"]),
    "mixtral": _family("Mixtral", _GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _family("Qwen3Moe", _GROUPED, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2),
    "qwen3_moe-window": _family(
        "Qwen3Moe",
        _GROUPED,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        use_sliding_window=True,
        sliding_window=24,
    ),
    "mixtral-window": _family("Mixtral", _GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=24),
    "mixtral-eager": _family("Mixtral", _GROUPED, num_local_experts=4, num_experts_per_tok=2, attention="eager"),
    "olmoe": _family("Olmoe", _GROUPED, num_experts=4, num_experts_per_tok=2),
    "granitemoe": _family("GraniteMoe", _GROUPED, num_local_experts=4, num_experts_per_tok=2, seed=1),
    "afmoe": _family(
        "Afmoe",
        _GROUPED,
        head_dim=16,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        num_dense_layers=1,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt_oss": _family("GptOss", _GROUPED, head_dim=16, sliding_window=24, num_local_experts=4, num_experts_per_tok=2),
    "mimo_v2_flash": _family(
        "MiMoV2Flash",
        _HIDDEN,
        num_key_value_heads=1,
        head_dim=24,
        v_head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        mlp_layer_types=["dense", "sparse"],
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
    ),
    "granite_swa": _family(
        "GraniteSWA",
        _GROUPED,
        attention_multiplier=0.2,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "granitemoe_swa": _family(
        "GraniteMoeSWA",
        _GROUPED,
        attention_multiplier=0.2,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "flint": _family(
        "Flint",
        _GROUPED,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "llama4": _family("Llama4Text", _GROUPED, **_LLAMA4),
    "llama4-eager": _family("Llama4Text", _GROUPED, **_LLAMA4, attention="eager"),
    "bloom": _family("Bloom", {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "bloom-6-heads": _family("Bloom", {"vocab_size": VOCAB, "hidden_size": 96, "n_layer": 2, "n_head": 6}),
    "mpt": _family("Mpt", _MPT),
    "mpt-6-heads": _family("Mpt", _MPT, d_model=96, n_heads=6),
    "falcon-alibi": _family("Falcon", ffn_hidden_size=128, alibi=True),
    "falcon-alibi-6-heads": _family(
        "Falcon", hidden_size=96, num_attention_heads=6, ffn_hidden_size=128, alibi=True, multi_query=False
    ),
    "jetmoe": _family(
        "JetMoe", _GROUPED, num_attention_heads=6, kv_channels=16, num_local_experts=4, num_experts_per_tok=3
    ),
}
"""Families with the common attention and cache."""

OWN_ATTENTION: dict[str, Family] = {
    "openai-gpt": _family(
        "OpenAIGPT", {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
    ),
    "gpt_neo": _family("GPTNeo", _GPT_NEO, attention_types=[[["global", "local"], 1]]),
    "gpt_neo-local": _family("GPTNeo", _GPT_NEO, attention_types=[[["local"], 2]]),
    "xglm": _family(
        "XGLM",
        {
            "vocab_size": VOCAB,
            "d_model": 64,
            "ffn_dim": 128,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": CONTEXT,
        },
    ),
    "git": _family(
        "Git",
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
    ),
    "diffllama": _family("DiffLlama", _GROUPED),
    "diffllama-4-kv-heads": _family("DiffLlama", _HIDDEN, num_attention_heads=8, num_key_value_heads=4, head_dim=16),
}
"""Families whose attention computes its scores by itself, without the one that a config names."""

_LATENT = {
    **_HIDDEN,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
_ROUTED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

LATENT: dict[str, Family] = {
    "deepseek_v2": _family("DeepseekV2", _LATENT, **_ROUTED),
    "deepseek_v2-lite": _family("DeepseekV2", _LATENT, **_ROUTED, q_lora_rank=None),
    "deepseek_v3": _family("DeepseekV3", _LATENT, **_ROUTED),
    "deepseek_v3-yarn": _family(
        "DeepseekV3",
        _LATENT,
        **_ROUTED,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "glm4_moe_lite": _family("Glm4MoeLite", _LATENT, **_ROUTED),
    "minicpm3": _family("MiniCPM3", _LATENT),
    "minicpm3-longrope": _family(
        "MiniCPM3",
        _LATENT,
        rope_parameters={**_LONGROPE, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    ),
    "youtu": _family("Youtu", _LATENT),
    "longcat_flash": _family(
        "LongcatFlash",
        _LATENT,
        head_dim=8,
        ffn_hidden_size=128,
        expert_ffn_hidden_size=32,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        num_layers=2,
    ),
    "axk1": _family("AXK1", _LATENT, **_ROUTED),
}
"""Families that cache latents instead of keys and values."""

_INDEXED = {
    **_LATENT,
    **{name: size for name, size in _ROUTED.items() if name != "first_k_dense_replace"},
    "mlp_layer_types": ["dense", "sparse"],
    "num_key_value_heads": 4,
    "index_topk": 12,
    "index_head_dim": 16,
    "index_n_heads": 16,  # with few heads, many scores are 0, and chance decides between equal ones
}
_THREE_LAYERS = {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}
_SHARED_INDICES = {**_THREE_LAYERS, "indexer_types": ["full", "shared", "full"]}

INDEXED: dict[str, Family] = {
    "deepseek_v32": _family("DeepseekV32", _INDEXED),
    "glm_moe_dsa": _family("GlmMoeDsa", _INDEXED, **_SHARED_INDICES),
    "glm_moe_dsa-eager": _family("GlmMoeDsa", _INDEXED, **_SHARED_INDICES, attention="eager"),
    "axk2": _family("AXK2", _INDEXED, gated_norm_rank=16),
    "hy_v4": _family("HYV4", _INDEXED, **_SHARED_INDICES),
    "dots3_note_text": _family(
        "Dots3NoteText",
        _INDEXED,
        **_THREE_LAYERS,
        per_layer_config=None,
        head_dim=20,
        sliding_window=24,
        shared_experts_intermediate_size=64,
        layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
    ),
}
"""Families with latents, and an indexer that chooses the tokens that their attention sees."""

_LATE: Mapping[str, Family] = {
    "gptj": _family("GPTJ", _GPT2, rotary_dim=8),
    "codegen": _family("CodeGen", _GPT2, n_ctx=CONTEXT, rotary_dim=8),
}
"""Families with the common attention since transformers 5.24."""


def _lets_attention_be_chosen(family: Family) -> bool:
    """Say whether the attention of a family can be chosen in this transformers."""
    model = getattr(transformers, f"{family.config.removesuffix('Config')}ForCausalLM")
    return bool(model._supports_attention_backend)


if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
    INDEXED = {}  # older releases keep the keys of indexers, and use their choice, in other ways

FAST |= LATENT | INDEXED | OWN_ATTENTION
FAST = {name: family for name, family in FAST.items() if hasattr(transformers, family.config)}
FAST |= {name: family for name, family in _LATE.items() if _lets_attention_be_chosen(family)}

WITH_STATES = tuple(STATE_RECIPES)
"""Families whose layers keep a state."""

FAST |= {name: _family(config, {}, **options) for name, (config, options) in STATE_RECIPES.items()}

NAMED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "gpt_neox", "gpt2", "opt", "falcon-7b", "falcon-40b")
NAMED += ("stablelm", "granite", "olmo")
"""Families that the fast engine must always drive."""

PLAIN: dict[str, tuple[Family, str]] = {
    "falcon-eager": (_family("Falcon", ffn_hidden_size=128, multi_query=True, attention="eager"), ""),
    # transformers adds the biases twice there
    "falcon-alibi-eager": (_family("Falcon", ffn_hidden_size=128, alibi=True, attention="eager"), "not its own"),
    "recurrent_gemma": (
        _family(
            "RecurrentGemma",
            _HIDDEN,
            lru_width=64,
            head_dim=16,
            num_key_value_heads=1,
            attention_window_size=24,
            block_types=["recurrent", "attention"],
        ),
        "no cache of keys and values",
    ),
}
"""Families that the fast engine cannot drive, each with a word of the reason."""

PLAIN |= {name: (family, "") for name, family in _LATE.items() if name not in FAST}


def family_model(family: Family) -> Any:
    """Make a tiny random model of a family."""
    config = getattr(transformers, family.config)(
        **{
            "bos_token_id": None,
            "eos_token_id": None,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            **family.options,
        }
    )
    chosen = {} if family.attention is None else {"attn_implementation": family.attention}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(family.seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **chosen).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1:
                    weight.normal_(0.0, family.gain)
                elif name.endswith("bias"):
                    weight.normal_(0.0, 0.1)
                elif name.endswith("sinks"):
                    weight.normal_(0.0, 1.0)
    model.generation_config.eos_token_id = None
    return model


def random_ids(count: int, *, seed: int = 0) -> list[int]:
    """Return random token ids, without the first ones, which are special in some tokenizers."""
    generator = torch.Generator().manual_seed(seed * 1009 + count)
    return torch.randint(10, VOCAB, (count,), generator=generator).tolist()


def generated_ids(model: Any, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Continue a text greedily with transformers' `generate`, the reference, beyond end tokens."""
    given = torch.tensor([list(prompt_ids)])
    output = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    return output[0, len(prompt_ids) :].tolist()


def likeliest_ids(model: Any, prompt_ids: Sequence[int], text_ids: Sequence[int]) -> list[int]:
    """Return the most likely token at each position of a text, computed in one forward without a cache.

    Equal to a greedy text itself, and so to the text of `generate`, in a hundredth of the time. Asserts that the best
    two logits are further apart than float32 rounds, so that the comparison is not left to chance.
    """
    with torch.no_grad():
        given = torch.tensor([[*prompt_ids, *text_ids]])
        logits = model(given, attention_mask=torch.ones_like(given)).logits[0, len(prompt_ids) - 1 : -1]
    best = logits.topk(2, -1)
    margins = (best.values[:, 0] - best.values[:, 1]) / logits.std(-1)
    assert float(margins.min()) > 1e-5, f"a tie of {float(margins.min()):.1e} at {int(margins.argmin())}: another seed"
    return best.indices[:, 0].tolist()
