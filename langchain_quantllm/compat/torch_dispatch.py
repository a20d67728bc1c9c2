"""PyTorch's dispatch modes: entering one in a single thread, cheaply, and modules that hide their operations.

Entering a mode as a context manager sets flags of the whole process, which stay set where two threads overlap, and its
`__torch_dispatch__` is wrapped for PyTorch's compiler, at a cost as high as that of a small operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ThreadMode(TorchDispatchMode):  # type: ignore[misc]  # torch is not followed
    """A mode that is entered by `push` and left by `pop`, in the current thread only."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave `__torch_dispatch__` as it is: compiled modules are refused, see `is_compiled`."""
        return False

    def push(self) -> None:
        """Make this the innermost mode of the thread.

        Source: `_push_mode` in torch/utils/_python_dispatch.py.
        """
        torch._C._push_on_torch_dispatch_stack(self)

    def pop(self) -> None:
        """Leave this mode, which must be the innermost one.

        Source: `_pop_mode` in torch/utils/_python_dispatch.py.
        """
        torch._C._pop_torch_dispatch_stack(None)


def is_compiled(module: Any) -> bool:
    """Whether a module runs compiled code, whose operations no mode sees.

    Source: `Module.compile` in torch/nn/modules/module.py, `OptimizedModule` in torch/_dynamo/eval_frame.py.
    """
    return getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
