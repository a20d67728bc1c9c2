"""Errors of this package that are LangChain's as well."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from langchain_core.exceptions import ContextOverflowError, ModelTimeoutError

from langchain_quantllm.errors import GenerationTimeoutError, PromptTooLongError


class PromptOverflowError(PromptTooLongError, ContextOverflowError):
    """The prompt leaves no room for a new token; LangChain's `ContextOverflowError`."""


class RequestTimeoutError(GenerationTimeoutError, ModelTimeoutError):
    """A call did not end within its `timeout`; LangChain's `ModelTimeoutError`."""


@contextlib.contextmanager
def langchain_errors() -> Iterator[None]:
    """Raise an error of this package as LangChain's too, if LangChain has one for the case."""
    try:
        yield
    except PromptTooLongError as error:
        raise PromptOverflowError(str(error)) from error
    except GenerationTimeoutError as error:
        raise RequestTimeoutError(str(error)) from error
