"""CUDA graphs: whether a model's step can be captured, and the capture.

Owns the rules, the search for operations that wait for the device, and the capture. A capture that would fail is found
out before: by the kinds of modules, and by a forward whose operations are watched. One that fails all the same leaves
other users of the GPU alone.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from langchain_quantllm.compat.accelerate import offloads_weights
from langchain_quantllm.compat.bitsandbytes import is_int8_layer
from langchain_quantllm.compat.transformers_models import is_idle_hook

_KNOWN_PACKAGES = ("torch", "transformers", "transformers_modules", "peft", "langchain_quantllm")
"""Packages whose modules consist of PyTorch's operations, which `WaitFinder` sees."""

_KNOWN_KERNELS = {
    "bitsandbytes": ("Linear4bit", "LinearNF4", "LinearFP4", "Embedding"),
    "gptqmodel": ("Marlin", "Triton"),
}
"""Modules with kernels of their own that work in a graph, by the beginning of their names."""

_WAITS = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
)
"""Operations that make the host wait for the device."""


def hooks_of(module: torch.nn.Module) -> tuple[int, ...]:
    """List the ids of the hooks that a module's forward calls, without the idle ones of transformers."""
    if not (module._forward_hooks or module._forward_pre_hooks):
        return ()
    hooks = {**module._forward_pre_hooks, **module._forward_hooks}
    return tuple(key for key, hook in hooks.items() if not is_idle_hook(hook))


def no_graph_reason(model: torch.nn.Module, whole: Collection[int] = (), *, has_stages: bool = False) -> str | None:
    """Find the reason why steps of a model cannot be CUDA graphs; None if none is known.

    Args:
        model: A loaded model.
        whole: Ids of its modules that fused kernels replace, so that they are not called in a step.
        has_stages: Whether each device's part of a step is a graph of its own.
    """
    for name, module in model.named_modules():
        if hooks_of(module):
            return f"a hook on {name or 'the model'}, which a graph would not call"
    devices = {p.device for p in model.parameters()}
    if any(device.type != "cuda" for device in devices):
        return f"weights on {', '.join(sorted(map(str, devices)))}"
    if len(devices) > 1 and not has_stages:
        return f"weights on {len(devices)} GPUs"
    for module in model.modules():
        if offloads_weights(module):
            return "weights that are copied to the GPU as they are needed"
        if id(module) in whole:
            continue
        package, name = type(module).__module__.partition(".")[0], type(module).__name__
        if package in _KNOWN_PACKAGES or name.startswith(_KNOWN_KERNELS.get(package, ())):
            continue
        if is_int8_layer(module):
            return "bitsandbytes int8, which reads back to the host in every layer"
        return f"modules of kind {package}.{name}, which are untested in CUDA graphs"
    return None


class WaitFinder(TorchDispatchMode):  # type: ignore[misc]  # torch is not followed
    """Watches the operations of this thread for the first one that a graph cannot hold."""

    def __init__(self) -> None:
        """Begin with no operation found."""
        super().__init__()
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note it if it makes the host wait."""
        out = func(*args, **(kwargs or {}))
        if self.found is None:
            name = func.name() if hasattr(func, "name") else str(func)
            if name in _WAITS or _leaves_device(name, args, out):
                self.found = name
        return out


def _leaves_device(name: str, args: Any, out: Any) -> bool:
    """Whether data was copied between device and host, or the size of a result depends on a mask."""
    given = [a for a in args if isinstance(a, torch.Tensor)]
    if name == "aten::lift_fresh":  # torch.tensor(..., device="cuda"), whose copy is not dispatched
        return bool(given) and given[0].device.type != "cpu"
    if name.startswith(("aten::index.", "aten::index_put")):
        indices = [i for i in (args[1] if len(args) > 1 else ()) if isinstance(i, torch.Tensor)]
        return any(i.dtype == torch.bool or i.device != args[0].device for i in indices)
    if not name.startswith(("aten::_to_copy", "aten::copy_")) or not isinstance(out, torch.Tensor) or not given:
        return False
    return any(a.device.type != out.device.type for a in given)


class StepGraph:
    """A captured step: a replay computes from the current values of the same tensors."""

    def __init__(self, body: Callable[[], torch.Tensor], device: torch.device, pool: Any) -> None:
        """Capture a step.

        Args:
            body: Enqueues the step's work and returns its output; was run before, so that every kernel is compiled.
            device: The GPU, which is the current one.
            pool: Memory pool shared with other graphs; they must be replayed one after another.
        """
        with one_capture, captured(device, pool) as graph:
            self.output = body()
        self._graph = graph

    def replay(self) -> torch.Tensor:
        """Run the step, and return the tensor of its output."""
        self._graph.replay()
        return self.output


one_capture = threading.Lock()
"""Held during a capture: all engines capture on one stream."""


@contextlib.contextmanager
def captured(device: torch.device, pool: Any) -> Iterator[torch.cuda.CUDAGraph]:
    """Capture what is enqueued inside the block, under `one_capture`; yields the graph, to be replayed afterwards.

    Args:
        device: The GPU, which is the current one.
        pool: Memory pool shared with other graphs; they must be replayed one after another.
    """
    graph = torch.cuda.CUDAGraph()
    side, current = _side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        # Other threads may use the GPU meanwhile, its random numbers included.
        with _spare_random_numbers(device):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            try:
                yield graph
            finally:
                graph.capture_end()
        except Exception:
            _end_pool(device, pool)
            raise
    current.wait_stream(side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream to capture on: one for each device, as cuBLAS keeps 32 MB for every stream that it has seen."""
    return torch.cuda.Stream(device)


def _end_pool(device: torch.device, pool: Any) -> None:
    """End the capture in PyTorch's allocator, which otherwise frees nothing more after a failed one."""
    with contextlib.suppress(RuntimeError):  # it knows already
        torch._C._cuda_endAllocateToPool(device.index or 0, pool)
        torch._C._cuda_releasePool(device.index or 0, pool)


@contextlib.contextmanager
def _spare_random_numbers(device: torch.device) -> Iterator[None]:
    """Let a capture claim a copy of the device's random number state instead of the real one.

    Up to PyTorch 2.11 a capture claims the default generator's state, needed or not: until it ends, other threads that
    use the generator fail, and after a failed capture all do for good. No captured operation here uses it. While a
    capture begins, for some microseconds, other threads find the copy.
    """
    generator = torch.cuda.default_generators[device.index or 0]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        yield
    finally:
        generator.graphsafe_set_state(state)
