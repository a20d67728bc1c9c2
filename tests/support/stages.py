"""Stages on a CPU: models with accelerate's hooks, and graphs of recorded operations in place of CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import dispatch_model
from torch.utils._python_dispatch import TorchDispatchMode


def hooked(model: Any) -> Any:
    """Dispatch a model with accelerate's hooks, all parts of it on the CPU."""
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


class RecordedGraph(TorchDispatchMode):
    """The operations of a block, which `replay` runs again on the same tensors, as a CUDA graph does.

    Results go into the tensors that the first run has made. Python code and operations outside of the block are not
    run again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.name().startswith("aten::empty"):
            given = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
            made = [t for t in tensors_in(out) if t.untyped_storage().data_ptr() not in given]
            if made or func._schema.is_mutable:
                self._calls.append((func, args, kwargs, made))
        return out

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, made in self._calls:
                out = tensors_in(func(*args, **kwargs))
                if made:
                    for target, source in zip(made, out, strict=True):
                        target.copy_(source)


@contextlib.contextmanager
def recorded(device: torch.device, pool: Any) -> Iterator[RecordedGraph]:
    """Record what runs inside the block: `cuda_graphs.captured` for a CPU."""
    assert device.type == "cpu"
    assert pool is None
    with RecordedGraph() as graph:
        yield graph


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for one in value.values() for tensor in tensors_in(one)]
    return [tensor for one in value for tensor in tensors_in(one)] if isinstance(value, list | tuple) else []
