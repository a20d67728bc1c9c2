"""accelerate: its marks and hooks on models that it has spread over devices, and its parser of sizes."""

from __future__ import annotations

from typing import Any

HOOKED_ATTRIBUTES = ("forward", "_old_forward", "_hf_hook", "to", "cuda")
"""Attributes that a module has of its own because of a hook."""


def size_in_bytes(size: int | str) -> int:
    """Parse a size as `max_memory` takes it, such as `"10GiB"`.

    Raises:
        ValueError: If it is not a size.
    """
    from accelerate.utils import convert_file_size_to_int

    return int(convert_file_size_to_int(size))


def has_device_map(model: Any) -> bool:
    """Say whether a model was loaded with a device map, so that nothing else may move it."""
    return getattr(model, "hf_device_map", None) is not None


def offloads_weights(module: Any) -> bool:
    """Say whether a module's weights are offloaded: brought to its device for each forward, and kept elsewhere."""
    return _offloads(getattr(module, "_hf_hook", None))


def _offloads(hook: Any) -> bool:
    return any(map(_offloads, getattr(hook, "hooks", ()))) or bool(getattr(hook, "offload", False))


def move_hook(module: Any, successor: Any) -> None:
    """Give a module's hook, if it has one, to the module that takes its place."""
    if (hook := getattr(module, "_hf_hook", None)) is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(module)
        add_hook_to_module(successor, hook)


def beneath_hook(module: Any, forward: Any) -> Any:
    """Return the forward of a module beneath the hook that moves its inputs to the module's device.

    Args:
        module: A module.
        forward: Its forward, as accelerate may have replaced it.

    Returns:
        The module's own forward; None if accelerate has not replaced it, or its hook does more than move inputs and
        outputs between devices.
    """
    own = getattr(module, "_old_forward", None)
    if own is None or getattr(forward, "__wrapped__", None) is not own or not _only_moves(module._hf_hook):
        return None
    return own


def _only_moves(hook: Any) -> bool:
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    if type(hook) is SequentialHook:
        return all(map(_only_moves, hook.hooks))
    return type(hook) is AlignDevicesHook and not hook.offload
