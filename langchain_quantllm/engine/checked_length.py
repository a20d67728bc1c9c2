"""The length of the text that a model is checked with: beyond the lengths at which its layers change.

A window, a chunk or a factor shows in no shorter text. Knows the cost of a check, and not how it is made.
"""

from __future__ import annotations

from collections import abc
from typing import Any

import torch

from langchain_quantllm.compat.transformers_models import forward_parameters

_CHANGING_ROPES = ("dynamic", "longrope")
_BEYOND = 16  # least tokens of a text after the length at which a layer changes
_CPU_TOKENS, _CPU_PRODUCTS = 2048, 2**33
_GPU_LIMITS = 8192, 2**45
"""Most tokens of a text, and most products of tokens and weights, on a CPU for each thread: some second for the three
forwards of a check, with 50 billion operations per second of a thread and 200 trillion of a GPU."""
_MOST_LOGITS = 2**28  # of a model that computes all of them


def checked_length(model: Any, windows: abc.Iterable[int], most_tokens: int) -> int:
    """Choose the tokens of a text that goes beyond the lengths at which layers change, and is computed within a second.

    Args:
        model: The model.
        windows: Windows or chunks of its layers; 0 for none.
        most_tokens: The most tokens that there is room for.

    Returns:
        The number of tokens; 0 if no change is within reach.
    """
    for length in sorted(turning_points(model.config.get_text_config(), windows), reverse=True):
        count = length + max(length // 8, _BEYOND)
        if count <= most_tokens and _is_affordable(model, count):
            return count
    return 0


def turning_points(config: Any, windows: abc.Iterable[int]) -> set[int]:
    """List the lengths beyond which a layer of a text model does something else than for shorter texts."""
    points = {*windows}
    if getattr(config, "attn_temperature_tuning", False):
        points.add(int(config.floor_scale))
    # Distances without a bias and positions with another scale of scores, in Inkling.
    points |= {int(getattr(config, name, None) or 0) for name in ("rel_extent", "log_scaling_n_floor")}
    ropes = getattr(config, "rope_parameters", None)
    ropes = ropes if isinstance(ropes, abc.Mapping) else {}
    for rope in (ropes, *(p for p in ropes.values() if isinstance(p, abc.Mapping))):
        if rope.get("rope_type") in _CHANGING_ROPES or "llama_4_scaling_beta" in rope:
            own = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            points.add(int(own))
    return points - {0}


def _is_affordable(model: Any, count: int) -> bool:
    """Whether three forwards of so many tokens take some second at most, by the products in them."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {id(getattr(module, "weight", None)) for module in (embedding, head)}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in ends)
    on_cpu = embedding.weight.device.type == "cpu"
    most_tokens, most_products = (_CPU_TOKENS, _CPU_PRODUCTS * torch.get_num_threads()) if on_cpu else _GPU_LIMITS
    keeps_all = "logits_to_keep" not in forward_parameters(model)
    if keeps_all and count * embedding.weight.shape[0] > _MOST_LOGITS:
        return False
    return count <= most_tokens and count * weights <= most_products
