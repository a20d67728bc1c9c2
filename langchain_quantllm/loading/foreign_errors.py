"""Errors that other libraries raise over a stranger's files, turned into this package's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from langchain_quantllm.errors import CheckpointError, NotEnoughMemoryError, QuantLLMError, first_line

_PANIC = "PanicException"
"""Raised by libraries in Rust (tokenizers, safetensors) where they have a fault; it is no Exception."""


_OUT_OF_MEMORY = "OutOfMemoryError"
"""Raised by torch where a device has no more memory."""


@contextlib.contextmanager
def as_checkpoint_error(describe: Callable[[Exception], str]) -> Iterator[None]:
    """Turn whatever is raised inside into a CheckpointError, but this package's own errors and a lack of memory.

    What these libraries raise for a wrong value in a file has any type: KeyError, AttributeError, RecursionError.

    Args:
        describe: Writes the message for an error.

    Raises:
        CheckpointError: For an error that is no QuantLLMError.
        NotEnoughMemoryError: If the memory ran out.
    """
    try:
        yield
    except QuantLLMError:
        raise
    except MemoryError as error:
        msg = f"{describe(error)}; the memory ran out, as the files say sizes that do not fit here."
        raise NotEnoughMemoryError(msg) from error
    except Exception as error:
        if type(error).__name__ == _OUT_OF_MEMORY:
            msg = f"{describe(error)}; use a scheme of fewer bits, or free what other programs hold."
            raise NotEnoughMemoryError(msg) from error
        raise CheckpointError(describe(error)) from error
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        raise CheckpointError(describe(RuntimeError(first_line(error)))) from error


def reason_of(error: BaseException) -> str:
    """Return the line of an error that says why, with the error's type where the line alone says little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # a heading
        return f"{lines[0]} {lines[1]}".rstrip(". ")
    if isinstance(error, KeyError | IndexError | AttributeError | TypeError | AssertionError | ZeroDivisionError):
        return f"{type(error).__name__}: {first_line(error)}"
    return first_line(error)
