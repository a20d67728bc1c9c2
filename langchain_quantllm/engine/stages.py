"""Stages: a model whose layers lie on several devices, run by the engine without waiting for the host in between.

A stage is a run of consecutive modules on one device. The forward stays the model's own. At the first module of a
stage the engine's forward goes on on the stage's device: that becomes the current one, what the module is called with
is copied there, and later modules of the stage get the same copies. accelerate's hooks, which do this in every module
and by the host, are passed by; they stay in place for all other calls of the model. Owns the places of modules and the
copies. `stage_graphs` captures the stages; the runner says what else of a step is needed on each device.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from langchain_quantllm.compat.accelerate import HOOKED_ATTRIBUTES, beneath_hook, offloads_weights
from langchain_quantllm.engine.cuda_graphs import WaitFinder
from langchain_quantllm.engine.device_links import DeviceLinks
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.forward_patch import ForwardPatch
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError

_FLOATING_BYTES = 2**20
"""Largest module without weights that is copied to every device, such as the frequencies of rotary positions."""


@dataclass(frozen=True)
class Place:
    """Where a stage runs.

    Args:
        device: The device.
        part: Number of the stage among those that were divided by hand; see `Stages`.
    """

    device: torch.device
    part: int = 0


def find_stages(model: Any) -> Stages | None:
    """Find the stages of a model that lies on several GPUs; None for all others.

    Models with modules on the CPU or on a disk run by accelerate's hooks.

    Raises:
        UnsupportedError: If it cannot be divided; the message is the reason.
    """
    large = (buffer for buffer in model.buffers() if buffer.nbytes > _FLOATING_BYTES)
    devices = {tensor.device for tensor in (*model.parameters(), *large)}
    if len(devices) < 2 or any(device.type != "cuda" for device in devices):
        return None
    if any(map(offloads_weights, model.modules())):
        return None
    return Stages(model)


class Stages:
    """The places of a model's modules, and patches that lead the engine's forwards from one to the next.

    Attributes:
        first: Where a forward begins: the place of the input embeddings.
        last: Where it ends: the place of the output layer.
        links: Copies between the devices.
    """

    def __init__(self, model: Any, *, first_layers: Sequence[int] = ()) -> None:
        """Find the places, and patch the modules until `close`.

        Args:
            model: A causal language model of transformers.
            first_layers: Numbers of the layers that begin the second stage and later ones, for a model on one device;
                empty to divide it by its devices.

        Raises:
            InvalidOptionError: If a model on one device cannot be divided at these layers.
            UnsupportedError: If a module has weights of its own beside modules on other devices.
        """
        self._model = model
        self._first_layers = tuple(first_layers)
        self._patches: list[ForwardPatch] = []
        self.links = DeviceLinks()
        self._clear()
        self.build()

    def _clear(self) -> None:
        self._places: dict[int, Place] = {}
        self._floating: dict[int, torch.device] = {}
        self._own_forwards: dict[int, tuple[Any, Any]] = {}  # of each module, with and without accelerate's hook
        self._replicas: dict[tuple[int, torch.device], Any] = {}

    def build(self) -> None:
        """Find the places anew, as after a change of the model's modules."""
        self.close()
        model = self._model
        if self._first_layers:
            self._divide(model)
        else:
            for module in _points(model):
                tensors = _tensors_of(module)
                if _floats(module):
                    self._floating[id(module)] = tensors[0].device
                else:
                    self._places[id(module)] = Place(tensors[0].device)
        modules = list(model.modules())
        floating = [module for module in modules if id(module) in self._floating]
        self.first = self._place_of(model.get_input_embeddings())
        order = [self._places[id(module)] for module in modules if id(module) in self._places]
        head = model.get_output_embeddings()
        self.last = order[-1] if head is None else self._place_of(head)
        for device in dict.fromkeys(place.device for place in (self.first, *order)):
            for module in floating:
                if self._floating[id(module)] != device:
                    self._replicas[id(module), device] = _replica_of(module, device)
        for module in modules:
            forward = _beneath_patches(module)
            own = beneath_hook(module, forward)
            if own is not None:
                self._own_forwards[id(module)] = forward, own
            if own is not None or id(module) in self._places or id(module) in self._floating:
                self._patches.append(ForwardPatch(module, _run))

    def close(self) -> None:
        """Restore every module's `forward`."""
        for patch in self._patches:
            patch.close()
        self._patches = []
        self._clear()

    @property
    def places(self) -> tuple[Place, ...]:
        """The places, in the order of the model's modules."""
        return tuple(dict.fromkeys([self.first, *self._places.values()]))

    @property
    def layout(self) -> dict[str, Place]:
        """The place of each module that a stage may begin with, by its name; the first and the last one as well."""
        named = self._model.named_modules()
        found = {name: self._places[id(module)] for name, module in named if id(module) in self._places}
        return found | {"first stage": self.first, "last stage": self.last}

    @property
    def replicas(self) -> list[Any]:
        """Copies of small modules on other devices than their own, which the engine's forwards call in their place."""
        return list(self._replicas.values())

    @property
    def note(self) -> str:
        """The stages in words."""
        devices = list(dict.fromkeys(str(place.device) for place in self.places))
        return f"its layers run in {len(self.places)} stages on {', '.join(devices)}"

    def begin(self) -> StageRun:
        """Begin a forward."""
        return StageRun(self)

    def place_of(self, module_id: int) -> Place | None:
        """Return the place of a module that a stage may begin with; None for all others."""
        return self._places.get(module_id)

    def floats(self, module_id: int) -> bool:
        """Whether a module runs wherever it is called."""
        return module_id in self._floating

    def call(self, module: Any, forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        """Return what runs a module on a device: its own forward beneath accelerate's hook, or a replica."""
        key = id(module)
        if key in self._floating:
            replica = self._replicas.get((key, device))
            if replica is not None:
                return replica  # type: ignore[no-any-return]
        hooked, own = self._own_forwards.get(key, (None, None))
        return own if own is not None and forward is hooked else forward

    # Finding the places.

    def _place_of(self, module: Any) -> Place:
        """Return the place of a module, or the one of the module that it belongs to."""
        if id(module) in self._places:
            return self._places[id(module)]
        for outer in self._model.modules():
            if id(outer) in self._places and any(inner is module for inner in outer.modules()):
                return self._places[id(outer)]
        return Place(_tensors_of(module)[0].device)

    def _divide(self, model: Any) -> None:
        """Divide a model on one device at its layers: what comes before them is in the first stage."""
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
        layers = max(lists, key=len, default=torch.nn.ModuleList())
        firsts = self._first_layers
        if len(devices) != 1 or list(firsts) != sorted(set(firsts)) or not 0 < firsts[0] <= firsts[-1] < len(layers):
            msg = (
                f"first_layers={firsts!r} divides no model of {len(layers)} layers on {len(devices)} devices; give "
                f"increasing numbers from 1 to {len(layers) - 1}, for a model on one device."
            )
            raise InvalidOptionError(msg)
        [device] = devices
        for number, layer in enumerate(layers):
            self._places[id(layer)] = Place(device, bisect.bisect_right(firsts, number))
        last = Place(device, len(firsts))
        outer = next(module for module in model.modules() if layers in list(module.children()))
        children = list(outer.children())
        for module in children[children.index(layers) + 1 :]:
            if any(True for _ in module.parameters()):
                self._places[id(module)] = last
        if (head := model.get_output_embeddings()) is not None:
            self._places[id(head)] = last


class StageRun:
    """One forward on its way through the stages; changes the thread's current device."""

    def __init__(self, stages: Stages) -> None:
        """Begin in the first stage, whose device is the current one."""
        self.stages = stages
        self.place = stages.first
        self.on_stage: Callable[[], None] | None = None
        """Called at the beginning of each stage but the first."""
        self.is_moving = False
        """Whether a tensor is being copied to another stage."""
        self._is_first = True
        # Tensors of earlier stages, by their ids, with the copies of this stage and of the one before.
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._copies_before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def enter(
        self, module_id: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Go on in the stage of a module; returns the module's arguments, brought to its device."""
        place = self.stages.place_of(module_id)
        crosses = place is not None and place != self.place
        if crosses:
            assert place is not None
            self._leave()
            self._go_on(place)
        if self._is_first or not (crosses or place is not None or self.stages.floats(module_id)):
            return args, kwargs
        bring = self.bring if crosses else self._bring_known
        return _mapped(args, bring), _mapped(kwargs, bring)

    def call(self, module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a patched module."""
        return self.stages.call(module, forward, self.place.device)(*args, **kwargs)

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the copy of an earlier stage's tensor in this stage; the same tensor is copied once."""
        known = self._copies.get(id(tensor))
        if known is not None:
            return known[1]
        # What an earlier stage has copied is copied on from there: its own may be in use for the next step already.
        _, source = self._copies_before.get(id(tensor), (tensor, tensor))
        self.is_moving = True
        try:
            copied = self._copy(source)
        finally:
            self.is_moving = False
        self._copies[id(tensor)] = tensor, copied
        self._copies[id(copied)] = copied, copied
        return copied

    def finish(self) -> None:
        """End the forward: the first stage's device is the current one again."""
        self._leave()
        self._make_current(self.stages.first.device)

    def _bring_known(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the copy of a tensor of an earlier stage; one of this stage is returned itself."""
        is_known = id(tensor) in self._copies or id(tensor) in self._copies_before
        return self.bring(tensor) if is_known or tensor.device != self.place.device else tensor

    def _go_on(self, place: Place) -> None:
        self.place, self._is_first = place, False
        self._copies_before, self._copies = self._copies, {}
        self._make_current(place.device)
        self._arrive()
        if self.on_stage is not None:
            self.on_stage()

    def _leave(self) -> None:
        """End the work of a stage."""

    def _arrive(self) -> None:
        """Begin the work of a stage."""

    def _copy(self, source: torch.Tensor) -> torch.Tensor:
        copied = torch.empty_like(source, device=self.place.device)
        self.stages.links.copy(source, copied)
        return copied

    @staticmethod
    def _make_current(device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)


class TriedRun(StageRun):
    """A forward before it is captured.

    Attributes:
        targets: The copies of tensors in other stages, in the order in which they were made. Graphs read them: memory
            that is allocated in a capture may be where an earlier operation of the same graph has kept something.
    """

    def __init__(self, stages: Stages) -> None:
        """Begin in the first stage."""
        super().__init__(stages)
        self.targets: list[torch.Tensor] = []

    def _copy(self, source: torch.Tensor) -> torch.Tensor:
        self.targets.append(super()._copy(source))
        return self.targets[-1]


class StrayFinder(WaitFinder):
    """Watches the operations of a forward for one that a graph cannot hold, in the stages of a model.

    Operations on tensors of another stage's device would not belong to the graph that is captured meanwhile.
    """

    def __init__(self, run: StageRun) -> None:
        """Watch a forward."""
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note it if it cannot be captured."""
        if self.run.is_moving:
            return func(*args, **(kwargs or {}))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.found is None:
            tensors = [one for one in (*args, out) if isinstance(one, torch.Tensor)]
            here = self.run.place.device
            if any(one.device.type == here.type and one.device != here for one in tensors):
                self.found = f"{func} on the device of another stage"
        return out


def at_stage(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a GPU the current one, on which Triton launches; other devices need not be."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def is_stage_patch(forward: Any) -> bool:
    """Whether a module's replaced `forward` only leads the engine's forwards through the stages."""
    return isinstance(forward, ForwardPatch) and forward.replacement is _run


def is_only_moved(module: Any, forward: Any) -> bool:
    """Whether a module's replaced `forward` does no more than move its inputs, which a stage does otherwise."""
    while is_stage_patch(forward):
        forward = forward.before
    return forward is None or beneath_hook(module, forward) is not None


def _run(
    context: ForwardContext, module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    run: Any = context.stages
    return forward(*args, **kwargs) if run is None else run.call(module, forward, args, kwargs)


def _points(module: Any) -> Iterator[Any]:
    """Yield the topmost modules that lie on one device each, and have a forward."""
    tensors = _tensors_of(module)
    if not tensors:
        return
    has_forward = type(module).forward is not torch.nn.Module.forward
    if has_forward and len({tensor.device for tensor in tensors}) == 1:
        yield module
        return
    if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        msg = f"{type(module).__name__} has weights of its own beside modules on other devices"
        raise UnsupportedError(msg)
    for child in module.children():
        yield from _points(child)


def _tensors_of(module: Any) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _floats(module: Any) -> bool:
    size = sum(tensor.nbytes for tensor in module.buffers())
    return next(module.parameters(), None) is None and size <= _FLOATING_BYTES


def _replica_of(module: Any, device: torch.device) -> Any:
    """Copy a small module to another device, without hooks and patches."""
    made = copy.copy(module)
    state = {name: value for name, value in module.__dict__.items() if name not in HOOKED_ATTRIBUTES}
    state["_buffers"] = {name: None if one is None else one.to(device) for name, one in module._buffers.items()}
    state["_modules"] = {name: _replica_of(child, device) for name, child in module._modules.items()}
    made.__dict__ = state
    return made


def _beneath_patches(module: Any) -> Any:
    forward = module.__dict__.get("forward")
    while isinstance(forward, ForwardPatch):
        forward = forward.before
    return forward


def _mapped(value: Any, bring: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Replace the tensors in arguments, in tuples, lists and dictionaries too."""
    if isinstance(value, torch.Tensor):
        return bring(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(one, bring) for one in value)
    return {key: _mapped(one, bring) for key, one in value.items()} if type(value) is dict else value
