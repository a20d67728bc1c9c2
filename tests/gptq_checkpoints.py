"""GPTQ checkpoints for tests, made by rounding to nearest: no calibration, seconds instead of minutes.

Owns the packed format of AutoGPTQ (v1): `qweight` packed along the inputs, `qzeros` along the
outputs and one too small, `scales`, `g_idx`. The float twin of a checkpoint holds the same
*dequantized* weights, so that comparing the two tests the loading and the kernel, not the rounding.

Source: AutoGPTQ 0.7.1, auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py, `pack`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Layout = Literal["config", "quantize_config", "old_name"]

SMALL_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
BLOCK_PREFIX = "model.layers."
SMALL_VOCABULARY = 2048


@dataclass(frozen=True, kw_only=True)
class RoundedLinear:
    """A linear layer rounded to nearest.

    Args:
        codes: uint8 [in_features, out_features], values below 2**bits.
        zeros: uint8 [groups, out_features], the code that stands for 0.
        scales: float16 [groups, out_features], exact in bfloat16 too: CPU kernels cast them to it.
        g_idx: int32 [in_features], the group of each input.
        bits: Bits of a code.
    """

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bits: int

    def dequantize(self) -> torch.Tensor:
        """Give the float32 weight [out_features, in_features] that the codes stand for."""
        index = self.g_idx.long()
        return ((self.codes.float() - self.zeros.float()[index]) * self.scales.float()[index]).t().contiguous()

    def pack(self, *, checkpoint_format: str) -> dict[str, torch.Tensor]:
        """Give the four tensors of the layer as a checkpoint of that format holds them."""
        # v1 stores each zero point one too small; the first kernels added the one back.
        stored = self.zeros - 1 if checkpoint_format == "gptq" else self.zeros
        return {
            "qweight": pack_bits(self.codes.t(), self.bits).t().contiguous(),
            "qzeros": pack_bits(stored, self.bits),
            "scales": self.scales.contiguous(),
            "g_idx": self.g_idx.contiguous(),
        }


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes along their last axis into int32 words, as one little-endian stream of bits.

    For 3 bits that puts 32 codes into 3 words, with codes 10 and 21 across a border.

    Args:
        codes: uint8 [rows, n], n * bits a multiple of 32.
        bits: Bits of a code.

    Returns:
        int32 [rows, n * bits / 32].
    """
    rows, n = codes.shape
    single = (codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8)) & 1  # [rows, n, bits]
    octets = single.reshape(rows, n * bits // 8, 8) << torch.arange(8, dtype=torch.uint8)
    return octets.sum(-1).to(torch.uint8).contiguous().view(torch.int32)


def round_linear(
    weight: torch.Tensor, *, bits: int, group_size: int, desc_act: bool, sym: bool, seed: int = 0
) -> RoundedLinear:
    """Round one weight to nearest, group by group.

    Args:
        weight: [out_features, in_features].
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; -1 takes all of them.
        desc_act: Spread the inputs over the groups in a random order, as sorting by activation does.
        sym: Put the zero point in the middle of the codes.
        seed: Of that order.

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
    # A zero point of 0 cannot be stored by v1, which takes one off.
    zeros = torch.full_like(low, 2 ** (bits - 1)) if sym else (-low / scales.float()).round().clamp(1, top)
    codes = (grouped / scales.float().unsqueeze(1) + zeros.unsqueeze(1)).round().clamp(0, top)
    unordered = torch.empty(in_features, out_features, dtype=torch.uint8)
    unordered[order] = codes.view(groups * size, out_features)[:in_features].to(torch.uint8)
    return RoundedLinear(codes=unordered, zeros=zeros.to(torch.uint8), scales=scales, g_idx=g_idx, bits=bits)


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
        dest: Folder to write; created where missing.
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale, or -1. 32 and 64 divide all layers of SmolLM2 (hidden size 576).
        desc_act: Spread the inputs over the groups.
        sym: Symmetric codes.
        layout: Where a reader finds out that it is GPTQ: `quantization_config` in config.json;
            only quantize_config.json; or that, with AutoGPTQ's old name of the weight file.
        checkpoint_format: Whether the zero points are stored one too small (v1) or as they are.
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
            packed = rounded.pack(checkpoint_format=checkpoint_format)
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
    """Build the float32 model that holds the dequantized weights of such a checkpoint.

    Args:
        source: As for `make_gptq_checkpoint`, like the options.
        bits: As there.
        group_size: As there.
        desc_act: As there.
        sym: As there.
        small: As there.

    Returns:
        The transformers model, on the CPU, in evaluation mode.
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
