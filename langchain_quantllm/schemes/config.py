"""The scheme of a checkpoint, by the quantization config that it was stored with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.schemes.bitsandbytes import FP4, HEADS, NF4, Int8
from langchain_quantllm.schemes.gptq import AWQ, GPTQ, GPTQ_BITS
from langchain_quantllm.schemes.scheme import MXFP4, Prequantized, Scheme


def scheme_of_config(config: Mapping[str, Any]) -> Scheme:
    """Return the scheme of a transformers `quantization_config` in its dict form.

    Args:
        config: `quantization_config.to_dict()`, or the same key of a checkpoint's `config.json`.

    Returns:
        Its scheme; `Prequantized` for methods without a class of their own.
    """
    method = config.get("quant_method", "")
    method = str(getattr(method, "value", method)).lower()
    if not method and (config.get("load_in_8bit") or config.get("load_in_4bit")):
        method = "bitsandbytes"
    if method.startswith("bitsandbytes"):
        return _of_bitsandbytes(config)
    if method == "mxfp4":
        return MXFP4()
    if method == "gptq":
        return _of_gptq(config)
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", 128)
    form = config.get("version", config.get("format")) or "gemm"
    is_gemm = str(form).lower() == "gemm" and config.get("zero_point", True) is True
    if method == "awq" and bits in (None, 4) and is_gemm and type(size) is int and (size == -1 or size > 0):
        return AWQ(group_size=size)
    return Prequantized(method=method, bits=bits if isinstance(bits, int) else None)


def _of_bitsandbytes(config: Mapping[str, Any]) -> Scheme:
    skipped = tuple(name for name in config.get("llm_int8_skip_modules") or () if name not in HEADS)
    offload = bool(config.get("llm_int8_enable_fp32_cpu_offload", False))
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        threshold = config.get("llm_int8_threshold", 6.0)
        return Int8(threshold=threshold, skip_modules=skipped, fp32_cpu_offload=offload)
    options: dict[str, Any] = {
        "compute_dtype": config.get("bnb_4bit_compute_dtype"),
        "double_quantization": bool(config.get("bnb_4bit_use_double_quant", False)),
        "storage_dtype": config.get("bnb_4bit_quant_storage") or "uint8",
        "skip_modules": skipped,
        "fp32_cpu_offload": offload,
    }
    if config.get("bnb_4bit_quant_type", "fp4") != "nf4":
        return FP4(**options)
    return NF4(**options, least_error=config.get("least_error") is True)


def _of_gptq(config: Mapping[str, Any]) -> GPTQ:
    bits = config.get("bits", config.get("w_bit"))
    if isinstance(bits, str):  # a text names bits to quantize with
        msg = f"bits={bits!r} of a checkpoint must be a number: one of {', '.join(map(str, GPTQ_BITS))}."
        raise InvalidOptionError(msg)
    known = {name: config[name] for name in ("group_size", "sym", "desc_act") if config.get(name) is not None}
    other_bits = tuple(sorted(_bits_of_rules(config.get("dynamic")) - {bits}))
    return GPTQ(bits=bits, kernel=config.get("backend") or "auto", other_bits=other_bits, **known)


def _bits_of_rules(dynamic: Any) -> set[int]:
    """Return the bits in a checkpoint's rules for single layers.

    Raises:
        InvalidOptionError: If they are no rules, or have other bits than a layer may have.
    """
    rules = list(dynamic.values()) if isinstance(dynamic, Mapping) else [dynamic]
    if not all(isinstance(own or {}, Mapping) for own in rules):
        msg = f"dynamic={dynamic!r} of a checkpoint must be an object of rules, each with an object of settings."
        raise InvalidOptionError(msg)
    found = [own["bits"] for own in rules if own and own.get("bits") is not None]
    if wrong := [bits for bits in found if type(bits) is not int or bits not in GPTQ_BITS]:
        msg = f"bits={wrong[0]!r} of a checkpoint's rule must be one of {', '.join(map(str, GPTQ_BITS))}."
        raise InvalidOptionError(msg)
    return set(found)
