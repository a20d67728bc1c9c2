"""The quantization schemes: frozen values, and the table of their names.

Owns a scheme's name, its options with their checks, the packages it needs, and its transformers config. Imports torch
and transformers only to make such a config, and reads no checkpoint.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from langchain_quantllm.data.counterparts import SCHEME_COUNTERPARTS
from langchain_quantllm.errors import InvalidOptionError, NamedOptions, nearest

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

GPTQ_BITS = (2, 3, 4, 8)
"""Bits of a weight that GPTQ checkpoints have."""


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
        if value not in allowed and (value is not None or none is None):
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


_HEADS = ("lm_head", "embed_out")


def _with_heads(skip_modules: tuple[str, ...]) -> list[str] | None:
    """Add the output head to the modules that stay unquantized.

    transformers leaves it out by itself only if no list is given.
    Source: HfQuantizer.get_modules_to_not_convert in transformers/quantizers/base.py.
    """
    return list(dict.fromkeys([*skip_modules, *_HEADS])) if skip_modules else None


@dataclass(frozen=True, kw_only=True)
class Unquantized(Scheme):
    """Unquantized weights, in the `dtype` of the model."""

    name: ClassVar[str] = "none"


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

    Raises:
        InvalidOptionError: If an option has a value that is not allowed.

    Source: https://arxiv.org/abs/2305.14314, section 3.
    """

    name: ClassVar[str] = "nf4"


@dataclass(frozen=True, kw_only=True)
class FP4(_BitsAndBytes4bit):
    """4-bit floating point of bitsandbytes: the options of `NF4`, somewhat less accurate."""

    name: ClassVar[str] = "fp4"


@dataclass(frozen=True, kw_only=True)
class GPTQ(Scheme):
    """A checkpoint quantized by GPTQ (AutoGPTQ, GPTQModel, optimum, `quantize`).

    When a checkpoint is loaded, an option is a requirement, and None accepts the checkpoint's value. For `quantize`, it
    is a setting, and None is the default that stands below.

    Args:
        bits: Bits of a weight: 2, 3, 4 (default) or 8.
        group_size: Number of inputs that share a scale, or -1 for all; the default is 128, or less if that does not
            divide every layer.
        sym: Whether the zero point is in the middle of the codes; the default is True.
        desc_act: Whether groups follow the size of the activations, which makes some kernels slower; the default is
            False.
        kernel: The kernel of gptqmodel for the matrix products, by its backend name (`"marlin"`, `"exllama_v2"`,
            `"triton"`, `"torch"`, ...). `"auto"` is, on CUDA, the one that keeps the weights as they are stored, for
            the fast engine's own kernels; on other devices the fastest that works.

    Raises:
        InvalidOptionError: If `bits` or `group_size` has a value that is not allowed.

    Source: https://arxiv.org/abs/2210.17323
    """

    name: ClassVar[str] = "gptq"
    packages: ClassVar[tuple[str, ...]] = ("gptqmodel", "optimum", "accelerate")
    calibrated: ClassVar[bool] = True
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None
    kernel: str = "auto"

    def __post_init__(self) -> None:
        """Check the options."""
        self._check_choice("bits", GPTQ_BITS, none="what the checkpoint says, and 4 for quantize")
        self._check_flags(*(option for option in ("sym", "desc_act") if getattr(self, option) is not None))
        size = self.group_size
        if size is not None and (type(size) is not int or (size != -1 and size < 1)):
            msg = f"group_size={size!r} must be -1 or a positive number of inputs, such as 64 or 128."
            raise InvalidOptionError(msg)


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
        method: transformers' `quant_method`, such as `"awq"`, `"torchao"` or `"compressed-tensors"`.
        bits: Bits of a weight, if the config says so.
    """

    name: ClassVar[str] = "prequantized"
    calibrated: ClassVar[bool] = True
    method: str = ""
    bits: int | None = None


SCHEMES: Mapping[str, Scheme] = {
    "none": Unquantized(),
    "int8": Int8(),
    "nf4": NF4(),
    "nf4-double": NF4(double_quantization=True),
    "fp4": FP4(),
    "fp4-double": FP4(double_quantization=True),
    "gptq": GPTQ(),
    "mxfp4": MXFP4(),
}
"""Every name that `quantization=` takes, with its scheme."""

_CLASSES = {cls.name: cls for cls in (Unquantized, Int8, NF4, FP4, GPTQ, MXFP4, Prequantized)}


def scheme_from(value: str | Mapping[str, Any] | Scheme | None) -> Scheme | None:
    """Turn a value of `quantization` into a scheme.

    Args:
        value: A name of `SCHEMES`, a scheme, its `to_dict()`, or None.

    Returns:
        The scheme; None for None, which takes the checkpoint as it is.

    Raises:
        InvalidOptionError: If the name, an option or its value is unknown.
    """
    if value is None or isinstance(value, Scheme):
        return value
    if isinstance(value, str) and value in SCHEMES:
        return SCHEMES[value]
    if isinstance(value, Mapping):
        options = dict(value)
        name = options.pop("name", None)
        if name is None and {"load_in_4bit", "load_in_8bit", "quant_method"} & options.keys():
            msg = f"quantization={dict(value)!r} is a transformers config; pass it as quantization_config=."
            raise InvalidOptionError(msg)
        if not options and isinstance(name, str) and name in SCHEMES:
            return SCHEMES[name]
        if not isinstance(name, str) or name not in _CLASSES:
            hint = f", as {{'name': 'nf4'}} does{nearest('', _CLASSES)}" if name is None else scheme_hint(name)
            msg = f"quantization={dict(value)!r} names no known scheme{hint}"
            raise InvalidOptionError(msg)
        scheme: Scheme = _CLASSES[name](**options)
        return scheme
    if type(value).__module__.startswith("transformers."):
        msg = f"quantization={type(value).__name__}(...) is a transformers config; pass it as quantization_config=."
        raise InvalidOptionError(msg)
    if isinstance(value, type) and issubclass(value, Scheme):
        msg = f"quantization={value.__name__} is a class; make a scheme of it: quantization={value.__name__}()."
        raise InvalidOptionError(msg)
    msg = f"quantization={value!r} is not a known scheme{scheme_hint(value)}"
    raise InvalidOptionError(msg)


def scheme_hint(value: Any) -> str:
    """Return the end of an error sentence: the scheme that is probably meant by a value that names none."""
    text = str(value).lower().removeprefix("torch.").removesuffix(".0")
    text = re.sub(r"[\s()_-]|(?<!\d)\.|\.(?!\d)", "", text)
    if (name := {name.replace("-", ""): name for name in SCHEMES}.get(text)) is not None:
        return f"; did you mean {name!r}?"
    told = next((told for pattern, told in SCHEME_COUNTERPARTS.items() if re.fullmatch(pattern, text)), None)
    return nearest(str(value), SCHEMES) if told is None else f"; {told}"


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
    skipped = tuple(name for name in config.get("llm_int8_skip_modules") or () if name not in _HEADS)
    offload = bool(config.get("llm_int8_enable_fp32_cpu_offload", False))
    if method.startswith("bitsandbytes"):
        if config.get("load_in_8bit") or config.get("_load_in_8bit"):
            threshold = config.get("llm_int8_threshold", 6.0)
            return Int8(threshold=threshold, skip_modules=skipped, fp32_cpu_offload=offload)
        cls = NF4 if config.get("bnb_4bit_quant_type", "fp4") == "nf4" else FP4
        return cls(
            compute_dtype=config.get("bnb_4bit_compute_dtype"),
            double_quantization=bool(config.get("bnb_4bit_use_double_quant", False)),
            storage_dtype=config.get("bnb_4bit_quant_storage") or "uint8",
            skip_modules=skipped,
            fp32_cpu_offload=offload,
        )
    if method == "mxfp4":
        return MXFP4()
    bits = config.get("bits", config.get("w_bit"))
    if method == "gptq":
        known = {name: config[name] for name in ("group_size", "sym", "desc_act") if config.get(name) is not None}
        return GPTQ(bits=bits, kernel=config.get("backend") or "auto", **known)
    return Prequantized(method=method, bits=bits if isinstance(bits, int) else None)
