"""The fingerprint of a model: tells whether anything has changed that its keys, values and logits follow from.

Taken whenever requests come, so it looks at identities and counters only, about a microsecond for each module.
docs/engine.md says what it sees, and what it cannot see.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any
from weakref import ref

import torch

from langchain_quantllm.compat.peft import is_peft_layer_class, state_of
from langchain_quantllm.compat.transformers_attention import values_of
from langchain_quantllm.compat.transformers_rotary import is_moving_rotary
from langchain_quantllm.engine.attention_interface import users_attention_name
from langchain_quantllm.engine.cuda_graphs import hooks_of
from langchain_quantllm.engine.forward_patch import ForwardPatch


class Fingerprint:
    """The state of a model at one moment; equal to another one if nothing that is seen has changed in between."""

    def __init__(self, objects: Sequence[Any], numbers: Sequence[Any], versions: Sequence[int]) -> None:
        """Keep what was seen.

        Args:
            objects: Modules and tensors as weak references, and functions: compared by identity. An id alone would be
                that of another object once the first is gone.
            numbers: What is compared by value.
            versions: How often each tensor was changed in place.
        """
        self._objects = objects
        self._numbers = numbers
        self.versions = versions

    def __eq__(self, other: object) -> bool:
        """Compare by identity, values and versions."""
        return (
            isinstance(other, Fingerprint)
            and self.versions == other.versions
            and self._numbers == other._numbers
            and len(self._objects) == len(other._objects)
            and all(map(is_, self._objects, other._objects))
        )

    __hash__ = None  # type: ignore[assignment]


def fingerprint(model: Any, *, names_adapters: bool = False) -> Fingerprint:
    """Look at a model's modules, weights, buffers, adapters, hooks, replaced forwards, and configs.

    Args:
        model: The model.
        names_adapters: Whether every request names its adapter; the active one is then left out.
    """
    objects: list[Any] = []
    numbers: list[Any] = []
    versions: list[int] = []
    is_peft: dict[type, bool] = {}
    configs: dict[int, Any] = {}
    waiting, seen = [model], set()
    while waiting:  # `model.modules()` takes three times as long
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        state, kind = module.__dict__, type(module)
        objects.append(ref(module))
        numbers.append(state["training"])
        if children := state["_modules"]:
            waiting += [child for child in children.values() if child is not None]
        for tensors in (state["_parameters"], state["_buffers"]):
            if tensors:
                if "rope_type" in state and is_moving_rotary(module):
                    tensors = {name: tensor for name, tensor in tensors.items() if name != "inv_freq"}
                for tensor in tensors.values():
                    if tensor is not None:
                        _add_tensor(tensor, objects, numbers, versions)
        if state["_forward_hooks"] or state["_forward_pre_hooks"]:
            numbers += hooks_of(module)
        if "forward" in state and (forward := _own_forward(state["forward"])) is not None:
            objects.append(forward)
        if "config" in state:
            configs[id(state["config"])] = state["config"]
        if kind not in is_peft:
            is_peft[kind] = is_peft_layer_class(kind)
            objects.append(kind.forward)
        if is_peft[kind]:
            numbers += state_of(module, names_adapters=names_adapters)
    for config in configs.values():
        numbers.append(users_attention_name(config))
        numbers += values_of(config)
    return Fingerprint(objects, numbers, versions)


def _add_tensor(tensor: torch.Tensor, objects: list[Any], numbers: list[Any], versions: list[int]) -> None:
    try:
        versions.append(tensor._version)
        numbers.append(tensor.data_ptr())
    except RuntimeError:  # of torch.inference_mode, or without memory of its own
        pass
    if not tensor.is_meta:  # accelerate offloads a weight by a new one without memory, after every forward
        objects.append(ref(tensor))


def _own_forward(forward: Any) -> Any:
    """Return a module's replaced forward, without patches of this package; None if there is none below them."""
    while isinstance(forward, ForwardPatch):
        forward = forward.before
    return forward
