"""Tiny mixtures whose experts are packed by hand, and the same models with the dequantized weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from langchain_quantllm.compat.transformers_experts import projections
from tests.support.checkpoints import make_tokenizer
from tests.support.gptq_checkpoints import packed_as, round_linear
from tests.support.mixtures import make_mixture

VOCABULARY = 512
FILE = "model.safetensors"
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
AWQ_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]
"""Outputs in the order of a word's places."""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
NAMES = {
    "qwen3_moe": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    "mixtral": {"gate": "w1", "up": "w3", "down": "w2"},
    "gpt_oss": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}


def make_packed(
    folder: Path,
    kind: str,
    method: str,
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    desc_act: bool = False,
    checkpoint_format: str = "gptq",
    fused: bool = False,
    attention: bool = True,
    own_order: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Write a checkpoint of a mixture, and return the float32 model with its dequantized weights.

    Args:
        folder: The folder to write.
        kind: Kind of the mixture; see `NAMES`.
        method: `"mxfp4"`, `"gptq"` or `"awq"`.
        bits: Bits of a weight of GPTQ.
        group_size: Inputs that share a scale.
        sym: Symmetric codes.
        desc_act: Spread the inputs over the groups.
        checkpoint_format: Format of GPTQ's zero points.
        fused: One tensor for all experts, in place of a layer for each.
        attention: Whether the attention is packed too; never in mxfp4.
        own_order: Whether gates and up-projections have groups of their own.
        dtype: Dtype of the rest.
    """
    twin = make_mixture(kind, vocab_size=VOCABULARY, hidden_size=128, dtype=dtype).float()
    twin.to(dtype).save_pretrained(folder)
    twin.float()
    make_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / FILE)
    form = {"bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act}
    given = {**form, "checkpoint_format": checkpoint_format}
    with torch.no_grad():
        for path, module in list(twin.named_modules()):
            if (found := projections(module)) != {}:
                for name in [name for name in tensors if name.startswith(_stored_path(kind, path) + ".")]:
                    if not name.endswith("_bias") or (method != "mxfp4" and not fused):
                        del tensors[name]
                for name, projection in found.items():
                    parameter = getattr(module, name)
                    weights = parameter.transpose(1, 2) if projection.transposed else parameter
                    own = _pack(_stored_path(kind, path), name, kind, module, weights, method, given, fused, own_order)
                    for key, value in own:
                        tensors[key] = value
            elif isinstance(module, torch.nn.Linear) and path.endswith(LINEARS) and attention and method != "mxfp4":
                rounded, packed = pack_layer(module.weight, method, given)
                module.weight.copy_(rounded)
                del tensors[f"{path}.weight"]
                tensors |= {f"{path}.{key}": value for key, value in packed.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE, metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = _config(method, given, attention)
    (folder / "config.json").write_text(json.dumps(content))
    return twin.eval()


def _stored_path(kind: str, path: str) -> str:
    return path.replace(".mlp.", ".block_sparse_moe.") if kind == "mixtral" else path


def _config(method: str, given: dict[str, Any], attention: bool) -> dict[str, Any]:
    if method == "mxfp4":
        return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    if method == "awq":
        kept = {} if attention else {"modules_to_not_convert": ["self_attn"]}
        return {"quant_method": "awq", "bits": 4, "group_size": given["group_size"], "zero_point": True, **kept}
    return {"quant_method": "gptq", **given}


def _pack(
    path: str,
    name: str,
    kind: str,
    module: Any,
    weights: torch.Tensor,
    method: str,
    given: dict[str, Any],
    fused: bool,
    own_order: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Round the weights of a projection in place, and yield its packed tensors."""
    if method == "mxfp4":
        rounded, blocks, scales = pack_mxfp4(weights)
        weights.copy_(rounded)
        yield f"{path}.{name}_blocks", blocks
        yield f"{path}.{name}_scales", scales
        return
    parts = {name.removesuffix("_proj"): weights}
    if name == "gate_up_proj" and not fused:
        gates, ups = weights.chunk(2, dim=1) if module.is_concatenated else (weights[:, ::2], weights[:, 1::2])
        parts = {"gate": gates, "up": ups}
    bias = getattr(module, f"{name}_bias", None)
    for seed, (part, own) in enumerate(parts.items()):
        layers = []
        for expert, weight in enumerate(own):
            rounded, packed = pack_layer(weight, method, given, seed=expert + 100 * seed * own_order)
            weight.copy_(rounded)
            layers.append(packed)
        if fused:
            yield from ((f"{path}.{name}.{key}", torch.stack([p[key] for p in layers])) for key in layers[0])
            continue
        for expert, packed in enumerate(layers):
            yield from ((f"{path}.{expert}.{NAMES[kind][part]}.{key}", value) for key, value in packed.items())
    if bias is not None and not fused:
        for expert, row in enumerate(bias):
            split = {"gate": row[::2], "up": row[1::2]} if len(parts) == 2 else {"down": row}
            yield from ((f"{path}.{expert}.{NAMES[kind][part]}.bias", values.clone()) for part, values in split.items())


def pack_layer(
    weight: torch.Tensor, method: str, given: dict[str, Any], *, seed: int = 0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Round a weight of shape `(out_features, in_features)`; return it with its packed tensors."""
    options = {name: given[name] for name in ("bits", "group_size", "sym", "desc_act")}
    rounded = round_linear(weight, **options, seed=seed)
    if method == "gptq":
        return rounded.dequantize(), packed_as(rounded, given["checkpoint_format"])
    packed = {
        "qweight": pack_awq(rounded.codes),
        "qzeros": pack_awq(rounded.zeros),
        "scales": rounded.scales,
    }
    return rounded.dequantize(), packed


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes of shape `(rows, columns)` as AWQ does."""
    words = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int64)
    for place, output in enumerate(AWQ_PLACES):
        words |= codes[:, output::8].long() << (4 * place)
    return (words & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def pack_mxfp4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round weights of shape `(..., in_features)` towards zero to mxfp4; return them, blocks and scales."""
    grouped = weights.unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(grouped.abs().amax(-1, keepdim=True))) - 2
    magnitudes = (grouped / 2**exponents).abs()
    codes = (magnitudes.unsqueeze(-1) >= E2M1).sum(-1) - 1
    values = E2M1[codes] * grouped.sign() * 2**exponents
    codes = codes + 8 * (grouped < 0)
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return values.flatten(-2), blocks, (exponents[..., 0] + 127).to(torch.uint8)
