"""A process with a copy of an encoder on another device, kept open between calls.

sentence-transformers' own pool moves the model to the CPU and sends it to each process; quantized weights do not
survive that everywhere. Here the process loads the checkpoint itself, as the first one did.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from langchain_quantllm.encoders.spec import EncoderSpec
from langchain_quantllm.encoders.work import Operation
from langchain_quantllm.errors import EncodingError, QuantLLMError, first_line

_END_S = 5.0


class EncoderProcess:
    """A process that runs operations, a `Runner` of the worker's.

    Args:
        spec: What it loads, its device named.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        self._process: Any = None
        self._pipe: Any = None
        self._closed = False

    @property
    def process_id(self) -> int | None:
        """The id of the process; None before it was started."""
        return None if self._process is None else int(self._process.pid)

    def prepare(self) -> None:
        """Start the process and wait until it has loaded the model, unless it runs already.

        Raises:
            QuantLLMError: What loading raised there.
        """
        with self._lock:
            if self._closed:
                msg = "the process of this device was ended."
                raise EncodingError(msg)
            if self._process is None or not self._process.is_alive():
                self._start()
                self._receive()

    def run(self, encoder: Any, operation: Operation, items: Sequence[Any]) -> Sequence[Any]:
        """Run an operation over prepared items there.

        Raises:
            EncodingError: If the process has ended.
            QuantLLMError: What the operation raised there.
        """
        self.prepare()
        with self._lock:
            return self._receive((operation, list(items)))  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the process."""
        self._closed = True
        process = self._process
        if process is not None:
            _end(process, os.getpid())
            process.join(_END_S)

    def _receive(self, message: Any = None) -> Any:
        """Send a message, if there is one, and return the answer or raise the error that it is."""
        try:
            if message is not None:
                self._pipe.send(message)
            has_failed, result = self._pipe.recv()
        except (EOFError, OSError) as error:
            msg = (
                f"the process on {self._spec.device} ended ({first_line(error)}); a script that uses several devices "
                "needs `if __name__ == '__main__':` around its calls."
            )
            raise EncodingError(msg) from error
        if has_failed:
            raise result
        return result

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._spec, there), daemon=True)
        self._process.start()
        there.close()
        weakref.finalize(self, _end, self._process, os.getpid())


def _end(process: Any, starter_id: int) -> None:
    """End a process, unless this one was forked off the one that started it."""
    if os.getpid() == starter_id:
        process.terminate()


def _serve(spec: EncoderSpec, pipe: Any) -> None:
    """Load the model, and run what comes through the pipe; the body of the process."""
    from langchain_quantllm.encoders.load import load

    try:
        model = load(spec).model
    except Exception as error:
        pipe.send((True, _portable(error)))
        return
    pipe.send((False, None))
    while True:
        try:
            operation, items = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, operation.run(model, items)))
        except Exception as error:
            pipe.send((True, _portable(error)))


def _portable(error: Exception) -> Exception:
    """Return an error that another process can read."""
    if isinstance(error, QuantLLMError):
        return type(error)(str(error))
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    kind: type[Exception] = MemoryError if is_memory else RuntimeError
    return kind(f"{type(error).__name__}: {first_line(error)}")
