"""AWQ checkpoints for tests, of random codes: every zero point from 0 to 15 occurs, and so does every code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.packed_experts import pack_awq

FILE = "model.safetensors"


def make_awq_checkpoint(folder: Path, *, group_size: int = 32, kept: Sequence[str] = ()) -> Any:
    """Replace the linear layers of an unquantized checkpoint by random ones in AWQ's format "gemm".

    Args:
        folder: The checkpoint, in one file; it is changed.
        group_size: Inputs that share a scale and a zero point, or -1 for all.
        kept: Ends of the names of layers that stay as they are, beside the head.

    Returns:
        The float32 model with the dequantized weights, in evaluation mode.
    """
    from transformers import AutoModelForCausalLM

    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tensors = load_file(folder / FILE)
    generator = torch.Generator().manual_seed(1)
    for name, module in twin.named_modules():
        if not isinstance(module, torch.nn.Linear) or name.endswith(("lm_head", *kept)):
            continue
        outputs, inputs = module.weight.shape
        size = inputs if group_size == -1 else group_size
        groups = inputs // size
        codes = torch.randint(0, 16, (inputs, outputs), generator=generator)
        zeros = torch.randint(0, 16, (groups, outputs), generator=generator)
        zeros[0, :2] = torch.tensor([0, 15])
        scales = ((torch.rand(groups, outputs, generator=generator) + 0.5) * 0.03).half()
        index = torch.arange(inputs) // size
        weight = (codes - zeros[index]).float() * scales.float()[index]
        module.weight.data.copy_(weight.t())
        if module.bias is not None:
            module.bias.data.copy_(torch.randn(outputs, generator=generator).half())
            tensors[f"{name}.bias"] = module.bias.detach().clone()
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.qweight": pack_awq(codes), f"{name}.qzeros": pack_awq(zeros), f"{name}.scales": scales}
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(kept) or None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return twin
