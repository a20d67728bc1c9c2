"""bitsandbytes' schemes: the config with which transformers reads weights into nf4, and the experts of mixtures."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from langchain_quantllm.compat.transformers_expert_loading import (
    NoExperts,
    missing_loading_api,
    reading_config,
    stored_reading_config,
)
from langchain_quantllm.compat.transformers_quantizers import quantization_config_from
from langchain_quantllm.loading.checkpoint import Checkpoint
from langchain_quantllm.loading.stored_tensors import StoredTensors
from langchain_quantllm.schemes import FP4, NF4, Int8, scheme_of_config

if TYPE_CHECKING:
    from langchain_quantllm.experts.reader import BitsAndBytesExperts

__all__ = ["EXPERT_STATE", "has_packed_experts", "is_mixture", "read_experts"]

logger = logging.getLogger(__name__)

EXPERT_STATE = re.compile(r"(.*\.experts)\.\d+\..+\.(SCB|absmax|quant_map|quant_state\..*)")
"""Names of the quantization state of one expert's layer, as transformers 4, bitsandbytes and this package save it."""

_PACKED_EXPERT = re.compile(r"\.experts\.(.+\.qweight|\w+_blocks)$")
"""Names of the words of experts in GPTQ, AWQ and mxfp4."""


def read_experts(checkpoint: Checkpoint, quantization_config: Any) -> Any:
    """Let our reader take part in loading: of experts in a scheme of bitsandbytes, and of weights put into nf4.

    Args:
        checkpoint: The checkpoint; if it is quantized, its config is changed.
        quantization_config: For `from_pretrained`; None to use the checkpoint's own.

    Returns:
        The `quantization_config` for `from_pretrained`.
    """
    given = quantization_config if checkpoint.quantization is None else checkpoint.quantization
    settings = {} if given is None else dict(given if isinstance(given, Mapping) else given.to_dict())
    scheme = scheme_of_config(settings) if settings else None
    mixture, while_loading = is_mixture(checkpoint.config), checkpoint.quantization is None
    refined = while_loading and isinstance(scheme, NF4) and scheme.least_error
    if not isinstance(scheme, Int8 | NF4 | FP4) or not (mixture or refined):
        return quantization_config
    if (lacking := missing_loading_api()) is not None:
        left = "The scales of nf4 are bitsandbytes' own" if refined else "The experts are not quantized"
        logger.warning("%s, because of transformers' version: %s.", left, lacking)
        return quantization_config
    if not while_loading:
        reader = _reader(scheme, stored=has_packed_experts(checkpoint.quantization, checkpoint.stored))
        checkpoint.config.quantization_config = stored_reading_config(settings, reader)
        return None
    config = quantization_config_from(settings) if isinstance(given, Mapping) else given
    return reading_config(config, _reader(scheme, stored=None) if mixture else NoExperts())


def _reader(scheme: Int8 | NF4 | FP4, *, stored: bool | None) -> BitsAndBytesExperts:
    import torch

    from langchain_quantllm.experts.reader import BitsAndBytesExperts

    if isinstance(scheme, Int8):
        return BitsAndBytesExperts(bits=8, stored=stored)
    storage = getattr(torch, scheme.storage_dtype)
    nested = scheme.double_quantization
    refined = isinstance(scheme, NF4) and scheme.least_error
    options: dict[str, Any] = {"nested": nested, "stored": stored, "storage": storage, "least_error": refined}
    return BitsAndBytesExperts(bits=4, kind=scheme.name, **options)


def has_packed_experts(quantization: Mapping[str, Any] | None, stored: StoredTensors | None) -> bool:
    """Say whether the experts of a mixture are quantized once it is loaded in a scheme.

    Args:
        quantization: The checkpoint's quantization; None for a checkpoint that loading quantizes.
        stored: The tensors in its files; where they are not known, its experts are taken to be quantized.
    """
    if quantization is None or stored is None:
        return True
    return any(EXPERT_STATE.fullmatch(name) or _PACKED_EXPERT.search(name) for name in stored.tensors)


def is_mixture(config: Any) -> bool:
    """Say whether a config is that of a mixture of experts, as far as the names in it tell."""
    configs = [config, config.get_text_config(decoder=True)]
    return any("expert" in name for one in configs for name in vars(one))
