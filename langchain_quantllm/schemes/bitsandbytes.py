"""The schemes of bitsandbytes, which quantizes while a checkpoint loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.schemes.scheme import Scheme

FLOAT_DTYPES = ("float16", "bfloat16", "float32")
"""Names of the dtypes of unquantized weights and of computations."""

BITSANDBYTES_OPTIONS = (
    "quant_method",
    "load_in_8bit",
    "load_in_4bit",
    "_load_in_8bit",
    "_load_in_4bit",
    "llm_int8_threshold",
    "llm_int8_skip_modules",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_quant_storage",
)
"""Keys of transformers' `BitsAndBytesConfig` in its dict form."""

HEADS = ("lm_head", "embed_out")
"""Names of output heads, which stay unquantized."""


def _with_heads(skip_modules: tuple[str, ...]) -> list[str] | None:
    """Add the output head to the modules that stay unquantized.

    transformers leaves it out by itself only if no list is given.
    Source: HfQuantizer.get_modules_to_not_convert in transformers/quantizers/base.py.
    """
    return list(dict.fromkeys([*skip_modules, *HEADS])) if skip_modules else None


@dataclass(frozen=True, kw_only=True)
class Int8(Scheme):
    """LLM.int8() of bitsandbytes: 8-bit rows, outlier features in 16 bits.

    Args:
        threshold: Activations of at least this magnitude are multiplied in 16 bits; 0 multiplies all in 8 bits.
            Source: https://arxiv.org/abs/2208.07339, section 3.2.
        skip_modules: Names of modules that stay unquantized, as the output head does.
        fp32_cpu_offload: Keep modules that `device_map` puts on the CPU in float32.

    Raises:
        InvalidOptionError: If the threshold is negative, or `skip_modules` is no list of strings.
    """

    name: ClassVar[str] = "int8"
    packages: ClassVar[tuple[str, ...]] = ("bitsandbytes", "accelerate")
    bits: ClassVar[int] = 8
    threshold: float = 6.0
    skip_modules: tuple[str, ...] = ()
    fp32_cpu_offload: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        if not isinstance(self.threshold, int | float) or not self.threshold >= 0:  # False for nan too
            msg = f"threshold={self.threshold!r} must be a number of at least 0; bitsandbytes' own is 6.0."
            raise InvalidOptionError(msg)
        self._check_flags("fp32_cpu_offload")
        self._freeze_names("skip_modules")

    def transformers_config(self, dtype: str) -> Any:
        """Build transformers' `BitsAndBytesConfig(load_in_8bit=True)`."""
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=float(self.threshold),
            llm_int8_skip_modules=_with_heads(self.skip_modules),
            llm_int8_enable_fp32_cpu_offload=self.fp32_cpu_offload,
        )


@dataclass(frozen=True, kw_only=True)
class _BitsAndBytes4bit(Scheme):
    packages: ClassVar[tuple[str, ...]] = ("bitsandbytes", "accelerate")
    bits: ClassVar[int] = 4
    compute_dtype: str | None = None
    double_quantization: bool = False
    storage_dtype: str = "uint8"
    skip_modules: tuple[str, ...] = ()
    fp32_cpu_offload: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        for option in ("compute_dtype", "storage_dtype"):  # torch's dtypes are taken as well, by their names
            value = getattr(self, option)
            if value is not None:
                object.__setattr__(self, option, str(value).removeprefix("torch."))
        self._check_choice("compute_dtype", FLOAT_DTYPES, none="the model's own dtype")
        self._check_choice("storage_dtype", ("uint8", *FLOAT_DTYPES))
        self._check_flags("double_quantization", "fp32_cpu_offload")
        self._freeze_names("skip_modules")

    def transformers_config(self, dtype: str) -> Any:
        """Build transformers' `BitsAndBytesConfig(load_in_4bit=True)`."""
        import torch
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.name,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype or dtype),
            bnb_4bit_use_double_quant=self.double_quantization,
            bnb_4bit_quant_storage=getattr(torch, self.storage_dtype),
            llm_int8_skip_modules=_with_heads(self.skip_modules),
            llm_int8_enable_fp32_cpu_offload=self.fp32_cpu_offload,
        )


@dataclass(frozen=True, kw_only=True)
class NF4(_BitsAndBytes4bit):
    """4-bit NormalFloat of bitsandbytes, with one scale per 64 weights.

    Args:
        compute_dtype: Dtype of the matrix products; None takes the dtype of the model.
        double_quantization: Quantize the scales to 8 bits too, which saves about 0.4 bits a weight.
        storage_dtype: Dtype of the tensor of the packed weights.
        skip_modules: Names of modules that stay unquantized, as the output head does.
        fp32_cpu_offload: Keep modules that `device_map` puts on the CPU in float32.
        least_error: Give each block of weights the scale of the least squared error in place of its largest magnitude:
            the same format, and nearer to the unquantized model. The weights are then not bitsandbytes' and
            transformers' own.

    Raises:
        InvalidOptionError: If an option has a value that is not allowed.

    Source: https://arxiv.org/abs/2305.14314, section 3.
    """

    name: ClassVar[str] = "nf4"
    least_error: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self._check_flags("least_error")

    def transformers_config(self, dtype: str) -> Any:
        """Build transformers' `BitsAndBytesConfig(load_in_4bit=True)`; it names `least_error` where that is set."""
        config = super().transformers_config(dtype)
        if self.least_error:
            config.least_error = True  # bitsandbytes' loaders pass it by
        return config


@dataclass(frozen=True, kw_only=True)
class FP4(_BitsAndBytes4bit):
    """4-bit floating point of bitsandbytes: the options of `NF4`, somewhat less accurate."""

    name: ClassVar[str] = "fp4"
