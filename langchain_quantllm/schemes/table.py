"""The names of the schemes, and what a value of `quantization` means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from langchain_quantllm.data.counterparts import SCHEME_COUNTERPARTS
from langchain_quantllm.errors import InvalidOptionError, nearest
from langchain_quantllm.schemes.bitsandbytes import FP4, NF4, Int8
from langchain_quantllm.schemes.gptq import AWQ, GPTQ
from langchain_quantllm.schemes.scheme import MXFP4, Prequantized, Scheme, Unquantized

SCHEMES: Mapping[str, Scheme] = {
    "none": Unquantized(),
    "int8": Int8(),
    "nf4": NF4(),
    "nf4-double": NF4(double_quantization=True),
    "fp4": FP4(),
    "fp4-double": FP4(double_quantization=True),
    "gptq": GPTQ(),
    "awq": AWQ(),
    "mxfp4": MXFP4(),
}
"""Every name that `quantization=` takes, with its scheme."""

_CLASSES = {cls.name: cls for cls in (Unquantized, Int8, NF4, FP4, GPTQ, AWQ, MXFP4, Prequantized)}


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
