"""What accelerate leaves on a model that it has spread, and how it reads sizes."""

from __future__ import annotations

from typing import Any


def size_in_bytes(size: int | str) -> int:
    """Read a size such as `"10GiB"`, as `max_memory` takes it.

    Raises:
        ValueError: If it is none.
    """
    from accelerate.utils import convert_file_size_to_int

    return int(convert_file_size_to_int(size))


def has_device_map(model: Any) -> bool:
    """Say whether a model was loaded by a map of devices, so that nothing else may move it."""
    return getattr(model, "hf_device_map", None) is not None


def offloads_weights(module: Any) -> bool:
    """Say whether a module's weights are brought to its device as they are needed, and lie elsewhere meanwhile."""
    return _offloads(getattr(module, "_hf_hook", None))


def _offloads(hook: Any) -> bool:
    return any(map(_offloads, getattr(hook, "hooks", ()))) or bool(getattr(hook, "offload", False))
