"""Settings of torch that a program may have made before it calls this package: of its thread, and of the process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the default dtype, which holds in the whole process."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    """Set the default device, as programs do once at their beginning."""
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Ask for deterministic algorithms, in the whole process."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of threads of a product."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class DoubleFunctions(TorchFunctionMode):
    """A mode that makes float64 of all results: no model runs under it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_float = isinstance(result, torch.Tensor) and result.dtype == torch.float32
        return result.double() if is_float else result


class HalfOperations(TorchDispatchMode):
    """A mode that makes float16 of all results."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        is_float = isinstance(result, torch.Tensor) and result.dtype == torch.float32
        return result.to(torch.float16) if is_float else result


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "with a device": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "deterministic": deterministic,
    "two threads": lambda: threads(2),
    "function mode": DoubleFunctions,
    "dispatch mode": HalfOperations,
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: None),
}

OF_THE_PROCESS = [name for name in STATES if "dtype" in name or name == "deterministic"]


FEW = ["inference mode", "default device", "default dtype float16"]
"""States under which different parts failed; the others are tried in `make test-all`, where a test is slow."""
