"""gpt-oss in mxfp4: the experts of an unquantized model, rounded to nearest, in the layout of its checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from langchain_quantllm.compat.transformers_experts import projections
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.experts.module import replace_weights
from langchain_quantllm.experts.mxfp4 import mxfp4_stack, round_to_mxfp4
from langchain_quantllm.experts.stacked import StackedLinear
from langchain_quantllm.kernels.experts.weights import MXFP4_BLOCK
from langchain_quantllm.loading.expert_stacks import SavedNames
from langchain_quantllm.loading.expert_tensors import StoredProjection, format_of
from langchain_quantllm.schemes import MXFP4

__all__ = ["check_mxfp4", "pack_mxfp4"]

_CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""As in the checkpoints of the model's maker."""


def check_mxfp4(config: Any, model_id: str) -> None:
    """Check that a model's checkpoints can be in mxfp4, before it is loaded.

    Raises:
        UnsupportedError: If other programs would not read it, or its sizes do not fit.
    """
    if config.model_type not in (MXFP4.model_types or ()):
        msg = f"{model_id} is a {config.model_type!r} model, and mxfp4 is gpt-oss's format; use 'gptq' or 'nf4'."
        raise UnsupportedError(msg)
    sizes = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
    uneven = next((name for name, size in sizes.items() if size % MXFP4_BLOCK), None)
    if uneven is not None:
        msg = f"{uneven}={sizes[uneven]} of {model_id} is no multiple of {MXFP4_BLOCK}, the block of mxfp4; use 'nf4'."
        raise UnsupportedError(msg)


def pack_mxfp4(model: Any) -> int:
    """Round the experts of a loaded model, in place, so that `save_pretrained` writes them in mxfp4.

    Returns:
        How many weights are packed.
    """
    form, packed = format_of(_CONFIG), 0
    assert form is not None
    for path, module in list(model.named_modules()):
        found = projections(module)
        if not found:
            continue
        weights, places = {}, []
        for name, projection in found.items():
            parameter = getattr(module, name).detach()
            rounded = [round_to_mxfp4(own.t() if projection.transposed else own) for own in parameter]
            blocks, scales = (torch.stack(tensors) for tensors in zip(*rounded, strict=True))
            bias = None if projection.bias is None else getattr(module, projection.bias).detach()
            weights[name] = StackedLinear(mxfp4_stack(blocks, scales, bias))
            biases = () if projection.bias is None else ((f"{path}.{projection.bias}",),)
            layers = ((f"{path}.{name}",),)
            places.append(
                StoredProjection(
                    module=path, name=name, projection=projection, format=form, layers=layers, biases=biases
                )
            )
            packed += projection.elements
        replace_weights(module, weights)
        module.register_state_dict_post_hook(SavedNames(places))
    model.config.quantization_config = dict(_CONFIG)
    return packed
