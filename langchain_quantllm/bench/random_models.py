"""Checkpoints of random weights in place of real ones, unquantized, as GPTQ or with experts in mxfp4.

Memory and speed do not depend on the values of the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from langchain_quantllm.bench.random_experts import is_experts_weight, packed_gptq_experts, packed_mxfp4_experts
from langchain_quantllm.compat.library_logging import progress_bars, without_torchao
from langchain_quantllm.errors import InvalidOptionError, nearest
from langchain_quantllm.loading.devices import release_memory

SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "max_position_embeddings": 8192,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "qwen3.5-4b": {
        "model_type": "qwen3_5_text",
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "lfm2-1.2b": {
        "model_type": "lfm2",
        "hidden_size": 2048,
        "intermediate_size": 12288,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        "vocab_size": 65536,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
    },
    "tiny-mixture": {
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
    },
}
"""Configs by name, for random weights; of Llama where they name no other type."""

GPTQ_GROUP_SIZE = 128

_NEVER_PACKED = ("embed_tokens", "lm_head", "gate", "router")
"""Names of matrices that stay as they are: embeddings, outputs, and the routers of mixtures."""


def check_shape(shape: str) -> None:
    """Check that a shape is known.

    Raises:
        InvalidOptionError: If it is not.
    """
    if shape not in SHAPES:
        msg = f"shape={shape!r} is not known{nearest(shape, SHAPES)}"
        raise InvalidOptionError(msg)


def random_checkpoint(
    shape: str, folder: Path, *, gptq: bool = False, bits: int = 4, mxfp4: bool = False, layers: int | None = None
) -> Path:
    """Write a model of random weights, as an ordinary bfloat16 checkpoint or packed; the same with each call.

    Args:
        shape: A name of `SHAPES`.
        folder: Where to write it.
        gptq: Pack the linear layers, in groups of 128, as AutoGPTQ does; no calibration, no use but measuring.
        bits: Bits of GPTQ: 2, 3, 4 or 8.
        mxfp4: Pack the experts of a gpt-oss in mxfp4.
        layers: Layers of the model; None for those of the shape.

    Returns:
        The folder.

    Raises:
        InvalidOptionError: If the shape is unknown, or has no experts as those of gpt-oss for mxfp4.
    """
    check_shape(shape)
    options = {"model_type": "llama", **SHAPES[shape]}
    if mxfp4 and options["model_type"] != "gpt_oss":
        msg = f"shape={shape!r} cannot be packed with mxfp4=True, which is for those of gpt-oss: use 'gpt-oss-20b'."
        raise InvalidOptionError(msg)
    import torch

    with without_torchao():
        from transformers import AutoConfig, AutoModelForCausalLM

    if layers is not None:
        options["num_hidden_layers"] = layers
    config = AutoConfig.for_model(**options, bos_token_id=0, eos_token_id=1, dtype="bfloat16")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = range(torch.cuda.device_count())
    with torch.random.fork_rng(gpus), torch.device(device), progress_bars(shown=False):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(torch.float16 if gptq else torch.bfloat16)
        if gptq:
            _save_random_gptq(model, folder, bits)
        elif mxfp4:
            _save_random_mxfp4(model, folder)
        else:
            model.save_pretrained(folder)
    _tokenizer(SHAPES[shape]["vocab_size"]).save_pretrained(folder)
    del model
    release_memory()
    return folder


def _save_random_gptq(model: Any, folder: Path, bits: int) -> None:
    import torch

    from langchain_quantllm.kernels.linear.bit_packing import pack_bits

    middle, step = 1 << bits - 1, 0.032 / (1 << bits)

    def pack(layer: str, rows: int, columns: int) -> dict[str, Any]:
        """Make the tensors of a layer of `rows` outputs and `columns` inputs."""
        groups = columns // GPTQ_GROUP_SIZE
        words = {"dtype": torch.int32, "device": device}
        packed = torch.randint(-(2**31), 2**31 - 1, (columns * bits // 32, rows), **words)
        zeros = pack_bits(torch.full((groups, rows), middle - 1, dtype=torch.uint8), bits)  # stored less 1
        # Of either sign: the mean of all codes is half a step off zero, which would grow from layer to layer.
        signs = 2 * torch.randint(2, (groups, rows), device=device) - 1
        return {
            f"{layer}.qweight": packed.cpu(),
            f"{layer}.qzeros": zeros,
            f"{layer}.scales": (step * signs).to(torch.float16).cpu(),
            f"{layer}.g_idx": torch.arange(columns, **words).div(GPTQ_GROUP_SIZE, rounding_mode="floor").cpu(),
        }

    tensors: dict[str, Any] = {}
    device = model.device
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer == "lm_head" and model.config.tie_word_embeddings:
            continue
        if is_experts_weight(name, tensor):
            tensors |= dict(packed_gptq_experts(name, tensor, pack))
        elif tensor.dim() == 2 and layer.split(".")[-1] not in _NEVER_PACKED:
            tensors |= pack(layer, *tensor.shape)  # out_features, in_features
        else:
            tensors[name] = tensor.contiguous().cpu()
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GPTQ_GROUP_SIZE,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    }
    _save(model, folder, tensors, quantization, "float16")


def _save_random_mxfp4(model: Any, folder: Path) -> None:
    tensors: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        if is_experts_weight(name, tensor):
            tensors |= dict(packed_mxfp4_experts(name, tensor))
        else:
            tensors[name] = tensor.contiguous().cpu()
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _save(model, folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": kept}, "bfloat16")


def _save(model: Any, folder: Path, tensors: dict[str, Any], quantization: dict[str, Any], dtype: str) -> None:
    """Write the tensors and the config of a quantized checkpoint."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": dtype,
        "quantization_config": quantization,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str), encoding="utf-8")


def _tokenizer(vocab_size: int) -> Any:
    """Build a tokenizer of bytes with a vocabulary of any size, for random models."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"Ġw{i}" for i in range(vocab_size - len(words))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")  # noqa: S106
