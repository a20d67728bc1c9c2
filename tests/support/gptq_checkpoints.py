"""GPTQ checkpoints for tests, made by rounding to nearest: no calibration, seconds instead of minutes.

Packed as the package packs them. The float twin of a checkpoint holds the same
*dequantized* weights, so that comparing the two tests the loading and the kernel, not the rounding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from langchain_quantllm.kernels.linear.bit_packing import pack_bits
from langchain_quantllm.quantization.packing import RoundedLinear

Layout = Literal["config", "quantize_config", "old_name"]

SMALL_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
BLOCK_PREFIX = "model.layers."
SMALL_VOCABULARY = 2048


def round_linear(
    weight: torch.Tensor, *, bits: int, group_size: int, desc_act: bool, sym: bool, seed: int = 0
) -> RoundedLinear:
    """Round one weight to nearest, group by group.

    Args:
        weight: [out_features, in_features].
        bits: 2, 3, 4 or 8.
        group_size: Number of inputs that share a scale; -1 for all.
        desc_act: Spread the inputs over the groups in a random order, as sorting by activation does.
        sym: Put the zero point in the middle of the codes.
        seed: Seed of the random order.

    Returns:
        The rounded layer.
    """
    weight = weight.float().t()  # [in, out]
    in_features, out_features = weight.shape
    size = in_features if group_size == -1 else group_size
    order = torch.arange(in_features)
    if desc_act:
        order = torch.randperm(in_features, generator=torch.Generator().manual_seed(seed))
    g_idx = torch.empty(in_features, dtype=torch.int32)
    g_idx[order] = torch.arange(in_features, dtype=torch.int32) // size
    padding = -in_features % size  # the last group may be smaller; zeros change neither its range nor its codes
    groups = (in_features + padding) // size
    grouped = torch.nn.functional.pad(weight[order], (0, 0, 0, padding)).view(groups, size, out_features)
    top = 2**bits - 1
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / top).clamp(min=1e-5).bfloat16().half()
    # v1 stores the zero point minus one, so that it cannot store 0.
    zeros = torch.full_like(low, 2 ** (bits - 1)) if sym else (-low / scales.float()).round().clamp(1, top)
    codes = (grouped / scales.float().unsqueeze(1) + zeros.unsqueeze(1)).round().clamp(0, top)
    unordered = torch.empty(in_features, out_features, dtype=torch.uint8)
    unordered[order] = codes.view(groups * size, out_features)[:in_features].to(torch.uint8)
    return RoundedLinear(codes=unordered, zeros=zeros.to(torch.uint8), scales=scales, g_idx=g_idx, bits=bits)


def packed_as(rounded: RoundedLinear, checkpoint_format: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer in format `"gptq"`, with zero points minus one, or `"gptq_v2"`."""
    own = {"qzeros": pack_bits(rounded.zeros, rounded.bits)} if checkpoint_format == "gptq_v2" else {}
    return {**rounded.pack(), **own}


def _tensors(source: Path, small: bool) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(source / "model.safetensors", framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            if small and "embed_tokens" in name:
                yield name, tensor[:SMALL_VOCABULARY].contiguous()
            elif not small or not name.startswith(BLOCK_PREFIX) or name.startswith(f"{BLOCK_PREFIX}0."):
                yield name, tensor


def _is_linear(name: str, tensor: torch.Tensor) -> bool:
    return name.startswith(BLOCK_PREFIX) and name.endswith("_proj.weight") and tensor.dim() == 2


def _read_config(source: Path, small: bool) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    if small:
        config |= {"num_hidden_layers": 1, "vocab_size": SMALL_VOCABULARY}
    return config


def make_gptq_checkpoint(
    source: Path,
    dest: Path,
    *,
    bits: int = 4,
    group_size: int = 64,
    desc_act: bool = False,
    sym: bool = True,
    layout: Layout = "config",
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq",
    small: bool = False,
) -> Path:
    """Write a GPTQ checkpoint of a Llama-like model, rounded to nearest.

    Args:
        source: Folder of an unquantized checkpoint in one safetensors file.
        dest: Folder to write; created if missing.
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale, or -1 for all. 32 and 64 divide all layers of SmolLM2 (hidden size 576).
        desc_act: Spread the inputs over the groups.
        sym: Symmetric codes.
        layout: Place of the settings: `quantization_config` in config.json; quantize_config.json; or the latter with
            AutoGPTQ's old name of the weight file.
        checkpoint_format: Whether the zero points are stored minus one (v1) or exactly.
        small: Keep only the first block and `SMALL_VOCABULARY` tokens, for tests of numbers instead of text.

    Returns:
        The folder.
    """
    dest.mkdir(parents=True, exist_ok=True)
    for name in SMALL_FILES:
        if (source / name).exists():
            shutil.copy(source / name, dest / name)
    options: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": sym,
        "damp_percent": 0.01,
        "true_sequential": True,
    }
    config = {**_read_config(source, small), "dtype": "float16"}
    weights = "model.safetensors"
    if layout == "config":
        config["quantization_config"] = {**options, "quant_method": "gptq", "checkpoint_format": checkpoint_format}
    else:
        if checkpoint_format != "gptq":
            options["checkpoint_format"] = checkpoint_format
        if layout == "old_name":
            weights = f"gptq_model-{bits}bit-{group_size}g.safetensors"
            options |= {"model_name_or_path": None, "model_file_base_name": None}
        (dest / "quantize_config.json").write_text(json.dumps(options, indent=2))
    (dest / "config.json").write_text(json.dumps(config, indent=2))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(source, small):
        if _is_linear(name, tensor):
            rounded = round_linear(tensor, bits=bits, group_size=group_size, desc_act=desc_act, sym=sym)
            packed = packed_as(rounded, checkpoint_format)
            tensors |= {f"{name.removesuffix('weight')}{key}": value for key, value in packed.items()}
        else:
            tensors[name] = tensor.half()
    save_file(tensors, dest / weights, metadata={"format": "pt"})
    return dest


def load_float_twin(
    source: Path,
    *,
    bits: int = 4,
    group_size: int = 64,
    desc_act: bool = False,
    sym: bool = True,
    small: bool = False,
) -> Any:
    """Build the float32 model with the dequantized weights of a checkpoint of `make_gptq_checkpoint`.

    The arguments are the same. The transformers model is on the CPU, in evaluation mode.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**_read_config(source, small))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(source, small):
        state[name] = tensor.float()
        if _is_linear(name, tensor):
            rounded = round_linear(tensor, bits=bits, group_size=group_size, desc_act=desc_act, sym=sym)
            state[name] = rounded.dequantize()
        else:
            state[name] = tensor.half().float()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied to the embeddings
    model.tie_weights()
    return model.eval()
