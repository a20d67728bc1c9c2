"""What transformers' quantizers know and leave on a model: formats, which layers they replace, and their traces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

BITSANDBYTES_LOGGER = "transformers.integrations.bitsandbytes"
"""Logger of what is said when a model of bitsandbytes is dequantized."""

PEFT_LOGGER = "transformers.integrations.peft"
"""Logger of the report that follows the loading of an adapter."""


def quantization_config_from(settings: dict[str, Any]) -> Any:
    """Make the quantization config that a dictionary describes."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(settings)


def knows_format(method: str) -> bool:
    """Say whether transformers knows a format of quantized checkpoints, by its `quant_method`."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return method in AUTO_QUANTIZATION_CONFIG_MAPPING or method.startswith("bitsandbytes")


def dequantizing_gguf() -> dict[str, Any]:
    """Return the options of `from_pretrained` that make plain weights of a GGUF file's.

    Releases before 5.17 have no config for that, as they do nothing else.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


# Layers.


def float32_patterns(model: Any, *, strict: bool) -> set[str]:
    """Return the patterns of names that a model keeps in float32: if `strict` those in bfloat16 too, else in float16.

    Source: `_get_dtype_plan` in transformers/modeling_utils.py.
    """
    return set(model._keep_in_fp32_modules_strict or ()) if strict else set(model._keep_in_fp32_modules or ())


def replaced_by_bitsandbytes(model: Any, paths: Iterable[str], skipped: list[str] | None) -> set[str]:
    """Find the layers that are replaced when a model is quantized by bitsandbytes.

    Args:
        model: A model of transformers, on any device.
        paths: Where its linear layers are.
        skipped: `llm_int8_skip_modules` of the config.

    Source: `get_modules_to_not_convert` in transformers/quantizers/base.py, and `replace_with_bnb_linear` in
    transformers/integrations/bitsandbytes.py.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, skipped, list(model._keep_in_fp32_modules or ()))
    return {path for path in paths if should_convert_module(path, kept)}


# Traces on a loaded model.


def was_quantized(model: Any) -> bool:
    """Say whether a model was loaded in, or into, a quantized format."""
    return any(getattr(model, name, None) is not None for name in ("quantization_method", "hf_quantizer"))


def forget_quantization(model: Any) -> None:
    """Let a model whose weights are plain now be saved as what it is.

    What was done to packed weights of bitsandbytes while loading is not undone while saving.
    """
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer, model.is_quantized = None, False
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [conversion for conversion in conversions if not _unpacks(conversion)]


def _unpacks(conversion: Any) -> bool:
    """Whether a conversion is about bitsandbytes' packed weights."""
    return any("bitsandbytes" in type(op).__module__ for op in getattr(conversion, "operations", None) or ())
