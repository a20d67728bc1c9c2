"""The errors that requests end with when something is raised in the engine's thread."""

from __future__ import annotations

from typing import cast

from langchain_quantllm.errors import GenerationError, NotEnoughMemoryError


def request_failure(error: BaseException) -> GenerationError:
    """Return the error of the one request whose own mask or tokenizer has raised."""
    if isinstance(error, GenerationError):
        return error
    failure = GenerationError(f"this request failed while generating: {error!r}")
    failure.__cause__ = error
    return failure


def run_failure(error: BaseException) -> Exception:
    """Return the error of all requests that a failed run of an engine held: itself, if it is for users already."""
    if type(error) in (GenerationError, NotEnoughMemoryError):
        return cast("Exception", error)
    return GenerationError(f"the model failed while generating: {error!r}")
