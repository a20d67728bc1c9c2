"""The schemes whose codes are found before a checkpoint is loaded: GPTQ's format, and AWQ's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.schemes.scheme import Scheme

GPTQ_BITS = (2, 3, 4, 8)
"""Bits of a weight that GPTQ checkpoints have."""

AUTO_BITS = "auto:"
"""Beginning of a value of `bits` that lets `quantize` choose them by layer."""


@dataclass(frozen=True, kw_only=True)
class GPTQ(Scheme):
    """A checkpoint quantized by GPTQ (AutoGPTQ, GPTQModel, optimum, `quantize`).

    When a checkpoint is loaded, an option is a requirement, and None accepts the checkpoint's value. For `quantize`, it
    is a setting, and None is the default that stands below.

    Args:
        bits: Bits of a weight: 2, 3, 4 (default) or 8. For `quantize` also `"auto:4.25"`: the bits of each layer are
            chosen by what they cost, so that the mean over quantized weights is at most 4.25; scales and zero points
            come on top. From 4 on, layers have 4 or 8 bits, which vLLM reads as well; below, 2, 3, 4 or 8.
        group_size: Number of inputs that share a scale, or -1 for all; the default is 128, or less if that does not
            divide every layer.
        sym: Whether the zero point is in the middle of the codes; the default is True.
        desc_act: Whether groups follow the size of the activations, which makes some kernels slower; the default is
            False.
        kernel: The kernel of gptqmodel for the matrix products, by its backend name (`"marlin"`, `"exllama_v2"`,
            `"triton"`, `"torch"`, ...). `"auto"` is, on CUDA, the one that keeps the weights as they are stored, for
            the fast engine's own kernels; on other devices the fastest that works.
        other_bits: Of a checkpoint whose layers differ: the bits of layers that do not have `bits`. Nothing to ask
            `quantize` for.

    Raises:
        InvalidOptionError: If `bits` or `group_size` has a value that is not allowed.

    Source: https://arxiv.org/abs/2210.17323
    """

    name: ClassVar[str] = "gptq"
    packages: ClassVar[tuple[str, ...]] = ("gptqmodel", "optimum", "accelerate")
    calibrated: ClassVar[bool] = True
    bits: int | str | None = None
    group_size: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None
    kernel: str = "auto"
    other_bits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check the options."""
        if isinstance(self.bits, str):
            object.__setattr__(self, "bits", _bits_from(self.bits))
        else:
            self._check_choice("bits", GPTQ_BITS, none="what the checkpoint says, and 4 for quantize")
        others = tuple(self.other_bits) if isinstance(self.other_bits, list | tuple) else (self.other_bits,)
        if wrong := [bits for bits in others if type(bits) is not int or bits not in GPTQ_BITS]:
            msg = f"other_bits={self.other_bits!r} has {wrong[0]!r}; layers have {', '.join(map(str, GPTQ_BITS))} bits."
            raise InvalidOptionError(msg)
        object.__setattr__(self, "other_bits", others)
        self._check_flags(*(option for option in ("sym", "desc_act") if getattr(self, option) is not None))
        _check_group_size(self.group_size)

    @property
    def mean_bits(self) -> float | None:
        """Bits of a weight, the mean where `quantize` chooses them by layer; None if they are not known."""
        return float(self.bits.removeprefix(AUTO_BITS)) if isinstance(self.bits, str) else self.bits

    @property
    def layer_bits(self) -> tuple[int, ...]:
        """Bits that layers may have, sorted; empty if they are not known."""
        if isinstance(self.bits, str):
            return tuple(bits for bits in GPTQ_BITS if bits >= 4 or (self.mean_bits or 0) < 4)
        return () if self.bits is None else tuple(sorted({self.bits, *self.other_bits}))

    @property
    def weight_bits(self) -> int | None:
        """Bits of a weight, of most layers where they differ; None if they are not known."""
        return self.bits if isinstance(self.bits, int) else None


@dataclass(frozen=True, kw_only=True)
class AWQ(Scheme):
    """A checkpoint in AWQ's format "gemm" (AutoAWQ, GPTQModel, `quantize`): 4 bits, with a zero point for each group.

    The name is the format's. `quantize` finds the codes as for GPTQ, without order of activations.

    Args:
        group_size: Number of inputs that share a scale and a zero point, or -1 for all. When a checkpoint is loaded,
            None accepts its own; for `quantize`, None is 128, or less if that does not divide every layer.

    Raises:
        InvalidOptionError: If `group_size` has a value that is not allowed.

    Source: https://arxiv.org/abs/2306.00978; awq/modules/linear/gemm.py of AutoAWQ.
    """

    name: ClassVar[str] = "awq"
    packages: ClassVar[tuple[str, ...]] = ("gptqmodel", "accelerate")
    calibrated: ClassVar[bool] = True
    bits: ClassVar[int] = 4
    mean_bits: ClassVar[float] = 4.0
    layer_bits: ClassVar[tuple[int, ...]] = (4,)
    group_size: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        _check_group_size(self.group_size)


def _check_group_size(size: Any) -> None:
    if size is not None and (type(size) is not int or (size != -1 and size < 1)):
        msg = f"group_size={size!r} must be -1 or a positive number of inputs, such as 64 or 128."
        raise InvalidOptionError(msg)


def _bits_from(text: str) -> int | str:
    """Read bits from a text: a number, or a mean to choose them by layer."""
    number = text.removeprefix(AUTO_BITS)
    try:
        value = float(number)
    except ValueError:
        value = float("nan")
    if text != number and GPTQ_BITS[0] <= value <= GPTQ_BITS[-1]:
        return f"{AUTO_BITS}{value:g}"
    if text == number and value in GPTQ_BITS:
        return int(value)
    msg = (
        f"bits={text!r} is not known to quantization 'gptq'; use one of {', '.join(map(str, GPTQ_BITS))}, or "
        f"{AUTO_BITS}4.25 for bits by layer with a mean of 4.25, which may be from {GPTQ_BITS[0]} to {GPTQ_BITS[-1]}."
    )
    raise InvalidOptionError(msg)
