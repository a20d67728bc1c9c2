"""The base of the quantization schemes, and the ones without options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from langchain_quantllm.errors import InvalidOptionError, NamedOptions


@dataclass(frozen=True, kw_only=True)
class Scheme(NamedOptions):
    """The form of a model's weights in memory. Base of the schemes below."""

    _MEANT: ClassVar[Mapping[str, str]] = {
        "llm_int8_threshold": "threshold",
        "llm_int8_skip_modules": "skip_modules",
        "modules_to_not_convert": "skip_modules",
        "llm_int8_enable_fp32_cpu_offload": "fp32_cpu_offload",
        "bnb_4bit_compute_dtype": "compute_dtype",
        "bnb_4bit_use_double_quant": "double_quantization",
        "bnb_4bit_quant_storage": "storage_dtype",
        "backend": "kernel",
        "w_bit": "bits",
        "wbits": "bits",
        "q_group_size": "group_size",
        "symmetric": "sym",
        "act_order": "desc_act",
    }
    name: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    """Import names of the packages that loading needs."""
    calibrated: ClassVar[bool] = False
    """Whether a checkpoint is not quantized while it loads: quantizing takes calibration data, or is done before."""
    model_types: ClassVar[tuple[str, ...] | None] = None
    """transformers' names of the models that can be quantized so; None for any."""

    @property
    def weight_bits(self) -> int | None:
        """Bits of one quantized weight, without its scales; None if it is unquantized or they are not known."""
        bits: int | None = getattr(self, "bits", None)
        return bits

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the options that differ from their defaults, ready for JSON."""
        options = {
            f.name: list(value) if isinstance(value := getattr(self, f.name), tuple) else value
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }
        return {"name": self.name, **options}

    def transformers_config(self, dtype: str) -> Any | None:
        """Build the `quantization_config` that transformers' `from_pretrained` takes.

        Args:
            dtype: Name of the dtype that the rest of the model is loaded in, such as `"bfloat16"`.

        Returns:
            The config; None if transformers needs none.
        """
        return None

    def _check_choice(self, option: str, allowed: tuple[Any, ...], none: str | None = None) -> None:
        """Check an option's value; `none` is the meaning of None, if None is allowed."""
        value = getattr(self, option)
        is_allowed = any(isinstance(value, type(a)) and value == a for a in allowed)
        if not is_allowed and (value is not None or none is None):
            listed = ", ".join(repr(a) for a in allowed) + (f", or None for {none}" if none else "")
            msg = f"{option}={value!r} is not known to quantization {self.name!r}; use one of {listed}."
            raise InvalidOptionError(msg)

    def _check_flags(self, *options: str) -> None:
        for option in options:
            if not isinstance(value := getattr(self, option), bool):
                msg = f"{option}={value!r} must be True or False."
                raise InvalidOptionError(msg)

    def _freeze_names(self, option: str) -> None:
        value = getattr(self, option)
        if not isinstance(value, list | tuple | set) or not all(isinstance(v, str) for v in value):
            msg = f"{option}={value!r} must be a list of module names, such as ['lm_head']."
            raise InvalidOptionError(msg)
        object.__setattr__(self, option, tuple(value))


@dataclass(frozen=True, kw_only=True)
class Unquantized(Scheme):
    """Unquantized weights, in the `dtype` of the model."""

    name: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class MXFP4(Scheme):
    """Experts in mxfp4, as gpt-oss has them: 4-bit floats in blocks of 32 inputs with a scale that is a power of two.

    A checkpoint in it is loaded as it is, and `quantize` makes one. Everything but the experts is unquantized.

    Source: OCP Microscaling Formats (MX) Specification v1.0.
    """

    name: ClassVar[str] = "mxfp4"
    calibrated: ClassVar[bool] = True
    model_types: ClassVar[tuple[str, ...] | None] = ("gpt_oss",)
    bits: ClassVar[int] = 4


@dataclass(frozen=True, kw_only=True)
class Prequantized(Scheme):
    """A checkpoint in another format, which transformers loads by the checkpoint's own config.

    Args:
        method: transformers' `quant_method`, such as `"torchao"`, `"compressed-tensors"`, or `"awq"` for its other
            formats.
        bits: Bits of a weight, if the config says so.
    """

    name: ClassVar[str] = "prequantized"
    calibrated: ClassVar[bool] = True
    method: str = ""
    bits: int | None = None
