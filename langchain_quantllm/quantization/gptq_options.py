"""The options of `quantize` that are for GPTQ and AWQ alone: their values together, and the checks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_quantllm.compat.packages import label_of
from langchain_quantllm.errors import InvalidOptionError, nearest
from langchain_quantllm.quantization.calibration import NONE, Calibration, calibration_from, named
from langchain_quantllm.quantization.distill import Distillation, distillation_from
from langchain_quantllm.schemes import AWQ, GPTQ, Scheme

METHODS = ("gptq", "autoround", "rtn")
"""Ways to round to the codes of GPTQ's format."""

DAMPING = 0.01
"""Number added to the diagonal of GPTQ's statistics, as a share of its mean. Source: section 3.3 of the paper."""


@dataclass(frozen=True, kw_only=True)
class GPTQOptions:
    """How the layers of a model get the codes of GPTQ's or AWQ's format.

    Args:
        scheme: The scheme, with its bits.
        calibration: What the layers are calibrated with; its source is `NONE` where weights are rounded to nearest.
        method: One of `METHODS`.
        distill: How scales and codes are trained afterwards; None leaves them.
        for_texts: A sample of what the model will be asked; None if there is none.
        skip_modules: Endings of the names of layers that stay unquantized.
        damping: Added to the diagonal of the statistics, as a share of its mean.
    """

    scheme: GPTQ | AWQ
    calibration: Calibration
    method: str
    distill: Distillation | None
    for_texts: Calibration | None
    skip_modules: Sequence[str]
    damping: float


def gptq_options(
    scheme: Scheme,
    *,
    calibration: Any,
    method: str,
    distill: Distillation | bool | None,
    for_texts: Any,
    skip_modules: Sequence[str],
    damping: float,
) -> GPTQOptions | None:
    """Check the options as `quantize` takes them, as far as they need no checkpoint.

    Returns:
        The options; None for other schemes than GPTQ and AWQ.

    Raises:
        InvalidOptionError: If a value is not allowed, two contradict each other, or one is given with another scheme.
    """
    distill = distillation_from(distill)
    if method not in METHODS:
        msg = f"method={method!r} is not allowed{nearest(method, METHODS)}"
        raise InvalidOptionError(msg)
    if not isinstance(damping, float | int) or not 0 < damping < 1:
        msg = f"damping={damping!r} is not allowed; it must lie between 0 and 1, and 0.01 is usual."
        raise InvalidOptionError(msg)
    if not isinstance(scheme, GPTQ | AWQ):
        given = {"calibration": calibration is not None, "skip_modules": skip_modules, "damping": damping != DAMPING}
        given |= {"method": method != "gptq", "distill": distill is not None, "for_texts": for_texts is not None}
        _check_none_given(scheme, [name for name, is_given in given.items() if is_given])
        return None
    if method == "rtn":
        if calibration is not None:
            msg = "method='rtn' rounds to nearest and takes no calibration; leave it out, or use method='gptq'."
            raise InvalidOptionError(msg)
        calibration = NONE
    with named("for_texts"):
        use = None if for_texts is None else calibration_from(for_texts)
    options = GPTQOptions(
        scheme=scheme,
        calibration=calibration_from(calibration),
        method=method,
        distill=distill,
        for_texts=use,
        skip_modules=skip_modules,
        damping=damping,
    )
    _check_texts(options)
    return options


def _check_none_given(scheme: Scheme, given: Sequence[str]) -> None:
    if given:
        hint = f" {label_of(scheme)}(skip_modules=...) takes names." if "skip_modules" in given else ""
        msg = f"{given[0]} is for GPTQ and AWQ, and quantization {label_of(scheme)!r} needs none; leave it out.{hint}"
        raise InvalidOptionError(msg)


def _check_texts(options: GPTQOptions) -> None:
    """Check that there are texts where an option uses them."""
    uses = {
        "distill trains on": options.distill is not None,
        "method='autoround' trains on": options.method == "autoround",
        "bits by layer are chosen on": isinstance(options.scheme.bits, str),
        "for_texts is compared with": options.for_texts is not None,
    }
    needed = next((use for use, is_given in uses.items() if is_given), None)
    if needed and options.calibration.source == NONE:
        msg = f"{needed} the text of the calibration, and rounding to nearest has none; leave it out."
        raise InvalidOptionError(msg)
    if options.for_texts is not None and options.for_texts.source == NONE:
        msg = "for_texts='none' is no sample of what the model will be asked; give texts, a file or a data set."
        raise InvalidOptionError(msg)
