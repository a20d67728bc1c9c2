"""transformers' quantizers: the formats they know, the layers they replace, and their marks on a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

BITSANDBYTES_LOGGER = "transformers.integrations.bitsandbytes"
"""Logger of the messages while a model of bitsandbytes is dequantized."""


def quantization_config_from(settings: dict[str, Any]) -> Any:
    """Make a quantization config from its dict form."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(settings)


def knows_format(method: str) -> bool:
    """Say whether transformers knows a format of quantized checkpoints, by its `quant_method`."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return method in AUTO_QUANTIZATION_CONFIG_MAPPING or method.startswith("bitsandbytes")


def dequantizing_gguf() -> dict[str, Any]:
    """Return the options of `from_pretrained` that dequantize the weights of a GGUF file.

    Releases before 5.17 always do that, and need no option.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


# Layers.


def float32_patterns(model: Any, *, strict: bool) -> set[str]:
    """Return the patterns of names that a model keeps in float32: in float16, or if `strict` in both 16-bit dtypes.

    Source: `_get_dtype_plan` in transformers/modeling_utils.py.
    """
    return set(model._keep_in_fp32_modules_strict or ()) if strict else set(model._keep_in_fp32_modules or ())


def replaced_by_bitsandbytes(model: Any, paths: Iterable[str], skipped: list[str] | None) -> set[str]:
    """Find the layers that bitsandbytes' quantizer replaces in a model.

    Args:
        model: A model of transformers, on any device.
        paths: Names of its linear layers.
        skipped: `llm_int8_skip_modules` of the config.

    Source: `get_modules_to_not_convert` in transformers/quantizers/base.py, and `replace_with_bnb_linear` in
    transformers/integrations/bitsandbytes.py.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, skipped, list(model._keep_in_fp32_modules or ()))
    return {path for path in paths if should_convert_module(path, kept)}


def replaced_by_awq(model: Any, paths: Iterable[str], skipped: list[str] | None) -> set[str]:
    """Find the layers that AWQ's quantizer replaces in a model.

    Args:
        model: A model of transformers, on any device.
        paths: Names of its linear layers.
        skipped: `modules_to_not_convert` of the config.

    Source: `AwqQuantizer` in transformers/quantizers/quantizer_awq.py.
    """
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(
        model, skipped, list(model._keep_in_fp32_modules or ()), add_default_skips=True
    )
    return {path for path in paths if should_convert_module(path, kept)}


# Marks on a loaded model.


def was_quantized(model: Any) -> bool:
    """Say whether a model is, or was, quantized while it was loaded."""
    return any(getattr(model, name, None) is not None for name in ("quantization_method", "hf_quantizer"))


def forget_quantization(model: Any) -> None:
    """Remove the marks of quantization from a dequantized model, so that it is saved as a plain one.

    Saving would otherwise revert the conversions of packed weights that loading made.
    """
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer, model.is_quantized = None, False
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        model._weight_conversions = [conversion for conversion in conversions if not _unpacks(conversion)]


def _unpacks(conversion: Any) -> bool:
    """Say whether a conversion unpacks weights of bitsandbytes."""
    return any("bitsandbytes" in type(op).__module__ for op in getattr(conversion, "operations", None) or ())
