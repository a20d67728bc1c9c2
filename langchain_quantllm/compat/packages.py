"""The packages that each scheme needs, and the commands that install them. Imports none of them."""

from __future__ import annotations

import importlib.util

from langchain_quantllm.errors import MissingPackageError, pip_install
from langchain_quantllm.schemes import Prequantized, Scheme

_PACKAGES_OF_METHOD = {
    "awq": ("gptqmodel",),
    "torchao": ("torchao",),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("gptqmodel", "optimum"),
}
_PIP_NAMES = {
    "gptqmodel": "langchain-quantllm[gptq]",
    "optimum": "langchain-quantllm[gptq]",
    "compressed_tensors": "compressed-tensors",
}


def label_of(scheme: Scheme) -> str:
    """Name a scheme, or the format of a checkpoint that was quantized by other means."""
    return scheme.method if isinstance(scheme, Prequantized) else scheme.name


def check_packages(scheme: Scheme | None) -> None:
    """Check that the packages of a scheme are installed.

    Raises:
        MissingPackageError: If a package is missing, with the command that installs it.
    """
    if scheme is None:
        return
    packages = _PACKAGES_OF_METHOD.get(scheme.method, ()) if isinstance(scheme, Prequantized) else scheme.packages
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        command = pip_install(*dict.fromkeys(_PIP_NAMES.get(p, p) for p in missing))
        old = (
            " auto-gptq is there, but it cannot run with transformers 5."
            if "gptqmodel" in missing and is_installed("auto_gptq")
            else ""
        )
        msg = f"quantization {label_of(scheme)!r} needs {' and '.join(missing)}: {command}.{old}"
        raise MissingPackageError(msg)


def is_installed(package: str) -> bool:
    """Say whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None
