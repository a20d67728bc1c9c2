"""Calls in a thread of their own, which the caller's settings of torch do not reach.

Inference mode, autocast, gradients, the default device and CUDA stream, and function modes belong to a thread: tensors
made under them would stay as these made them for the model's whole life. A new thread begins without any; only the
current CUDA device is the caller's, as it says where to put a model. Knows no model and no tensor.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
import math
import sys
import threading
import time
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

from langchain_quantllm.errors import UnsupportedError

_WAIT_S = 0.5
"""Longest wait at a time, so that Ctrl-C gets through on every platform."""

_END_S = 10.0
"""Longest wait for the end of an interrupted call: it may wait itself, for a lock or a download."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def in_clean_thread(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Make a function run in a new thread, while its caller waits; in one already, it runs at once.

    The caller gets the result, or the exception with its traceback. Ctrl-C, or any other exception in the caller, is
    raised as KeyboardInterrupt in the function, whose end the caller waits for, up to ten seconds; a second one no
    longer waits.

    Args:
        function: The function.

    Returns:
        A function of the same arguments; it raises UnsupportedError if the system starts no more threads.
    """

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if isinstance(threading.current_thread(), _CleanThread):
            return function(*args, **kwargs)
        return _CleanThread(functools.partial(function, *args, **kwargs)).result()

    return run


def start_thread(thread: threading.Thread, purpose: str) -> None:
    """Start a thread.

    Args:
        thread: The thread.
        purpose: What it is for, in the error's words: `"loading a model"`.

    Raises:
        UnsupportedError: If the system starts no more.
    """
    try:
        thread.start()
    except RuntimeError as error:  # can't start new thread
        msg = (
            f"the system starts no more threads ({error}), and {purpose} needs one; end some of the "
            f"{threading.active_count()} of this process, or raise the limit of your user's (ulimit -u)."
        )
        raise UnsupportedError(msg) from error


def _cuda_device() -> int | None:
    """Return the current CUDA device of this thread; None before the first use of CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    device: int = torch.cuda.current_device()
    return device


class _CleanThread(threading.Thread, Generic[_Result]):
    """The thread of one call."""

    def __init__(self, call: Callable[[], _Result]) -> None:
        super().__init__(name="quantllm-call", daemon=True)
        self._call: Callable[[], _Result] | None = call
        self._context = contextvars.copy_context()
        self._cuda_device = _cuda_device()
        self._results: list[_Result] = []
        self._error: BaseException | None = None
        self._is_running = self._is_cancelled = False  # changed under `_changing`
        self._changing = threading.Lock()
        self._ended = threading.Event()  # in place of `join`, which takes the thread for ended after Ctrl-C

    def run(self) -> None:
        call, self._call = self._call, None
        try:
            with self._changing:
                self._is_running = not self._is_cancelled
            if self._is_running and call is not None:
                if self._cuda_device is not None:
                    sys.modules["torch"].cuda.set_device(self._cuda_device)
                self._results.append(self._context.run(call))
        except BaseException as error:
            self._error = error
        finally:
            try:
                with self._changing:
                    self._is_running = False
            finally:  # KeyboardInterrupt may still come, once
                self._ended.set()

    def result(self) -> _Result:
        """Start the thread, wait for its call, and return the result or raise the exception."""
        try:
            start_thread(self, "this call")
            self._wait()
        except BaseException:
            if self._interrupt():
                self._wait(_END_S)
            raise
        error, self._error = self._error, None
        if error is None:
            return self._results.pop()
        try:
            raise error
        finally:
            del error  # it refers to this frame

    def _wait(self, longest_s: float = math.inf) -> None:
        until = time.monotonic() + longest_s
        while not self._ended.wait(_WAIT_S) and time.monotonic() < until:
            pass

    def _interrupt(self) -> bool:
        """Raise KeyboardInterrupt in the call, as soon as it runs Python code again; False if it does not run."""
        with self._changing:
            self._is_cancelled = True
            if self._is_running:
                identifier = ctypes.c_ulong(self.ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(identifier, ctypes.py_object(KeyboardInterrupt))
            return self._is_running
