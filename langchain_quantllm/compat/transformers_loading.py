"""transformers' loading: a model that is changed after it was made, and before its weights are read.

`from_pretrained` makes a model by calling its class, on the meta device, and looks for weights for its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["mark_initialized", "model_class_with"]


def model_class_with(
    kind: type, change: Callable[[Any], None], *, ignored: Iterable[str], filled: Iterable[str]
) -> type:
    """Make a class of a model whose instances are changed once they are made.

    Args:
        kind: The class, which stays as it is.
        change: Called with each instance.
        ignored: Names of tensors in the files that are not read, without a warning.
        filled: Names of modules whose tensors are filled later, so that no warning says that they are missing.

    Returns:
        A class of the same name; set an instance's `__class__` to `kind` once it is loaded.

    Source: `from_pretrained` and the attributes `_keys_to_ignore_on_load_...` in transformers/modeling_utils.py.
    """
    base: Any = kind
    unread = {rf"(.*\.)?{re.escape(ending)}$" for ending in {_ending(name) for name in ignored}}
    later = {rf"^{re.escape(name)}\." for name in filled}

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        change(self)
        self._keys_to_ignore_on_load_unexpected = {*(self._keys_to_ignore_on_load_unexpected or ()), *unread}
        self._keys_to_ignore_on_load_missing = {*(self._keys_to_ignore_on_load_missing or ()), *later}

    return type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})


def _ending(name: str) -> str:
    """Return the part of a tensor's name that renamings of its model leave alone, so that few patterns match many."""
    return name.rpartition(".experts.")[2]


def mark_initialized(modules: Iterable[Any]) -> None:
    """Keep transformers from initializing modules whose tensors are not in the files.

    Source: `_initialize_weights` in transformers/modeling_utils.py.
    """
    for module in modules:
        module._is_hf_initialized = True
