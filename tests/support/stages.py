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
        self.made: dict[int, torch.Tensor] = {}
        """A tensor over each memory that the block has allocated, by its address."""
        self.read: dict[int, str] = {}
        """The operation that first used other memory, by the memory's address."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {address_of(t) for t in tensors_in((args, kwargs))}
        made = [t for t in tensors_in(out) if address_of(t) not in given]
        self.made |= {address_of(t): t for t in made}
        if not func.name().startswith("aten::empty"):  # which takes only shapes from a tensor
            self.read |= {address: func.name() for address in given - self.made.keys() - self.read.keys()}
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


def address_of(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's memory, which views share."""
    return int(tensor.untyped_storage().data_ptr())


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for one in value.values() for tensor in tensors_in(one)]
    return [tensor for one in value for tensor in tensors_in(one)] if isinstance(value, list | tuple) else []
