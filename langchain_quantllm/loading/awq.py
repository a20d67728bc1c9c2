"""AWQ checkpoints: their dense layers become layers of GPTQ while they are read, without a change to a weight."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from langchain_quantllm.compat.gptqmodel_awq import AWQLayers, awq_reading_config
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.loading.checkpoint import Checkpoint
from langchain_quantllm.loading.gptq import choose_kernel
from langchain_quantllm.schemes import AWQ, GPTQ

if TYPE_CHECKING:
    import torch

_WORD = 32
"""Inputs and outputs of which the kernels but `torch` take multiples."""


def read_awq_as_gptq(checkpoint: Checkpoint, scheme: AWQ, device_kind: str) -> None:
    """Let the dense layers of a checkpoint be loaded as GPTQ's; those that fit no kernel of GPTQ stay as they are.

    Args:
        checkpoint: The checkpoint; its config is changed.
        scheme: Its scheme.
        device_kind: Kind of the device of most layers, such as `"cuda"`.
    """
    chosen = functools.partial(_kernel_of, scheme.group_size, device_kind)
    names = set() if checkpoint.stored is None else set(checkpoint.stored.tensors)
    scales = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    is_scaled = checkpoint.stored is None or any(f"{name}.qweight" not in names for name in scales)
    layers = AWQLayers(choose_kernel=chosen, repack=_as_gptq, restore=_as_awq, scaled_activations=is_scaled)
    checkpoint.config.quantization_config = awq_reading_config(checkpoint.quantization or {}, layers)


@functools.cache
def _kernel_of(group_size: int, device_kind: str, inputs: int, outputs: int) -> str | None:
    """Choose the kernel of a layer; None if GPTQ's layout cannot hold it, or no kernel takes groups of its size."""
    config = {"bits": 4, "group_size": group_size, "sym": False, "desc_act": False, "checkpoint_format": "gptq_v2"}
    kernel = GPTQ(kernel="torch" if inputs % _WORD or outputs % _WORD else "auto")
    if inputs % 8 or outputs % 8:
        return None
    try:
        return choose_kernel(config, kernel, device_kind, {"": (inputs, outputs)})
    except UnsupportedError:
        return None


def _as_gptq(layer: Mapping[str, torch.Tensor], group_size: int) -> dict[str, torch.Tensor]:
    from langchain_quantllm.experts.gptq import from_awq

    found = from_awq({name: tensor[None] for name, tensor in layer.items()}, group_size)
    return {name: tensor[0] for name, tensor in found.items()}


def _as_awq(layer: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from langchain_quantllm.experts.gptq import to_awq

    found = to_awq({name: tensor[None] for name, tensor in layer.items()})
    return {name: tensor[0] for name, tensor in found.items()}
