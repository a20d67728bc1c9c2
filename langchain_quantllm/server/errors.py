"""The errors of the server, as OpenAI's clients read them.

Owns the status, the body and the words of each. Strangers read them: what the package says about a request goes out,
what went wrong inside goes to the log.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from langchain_quantllm.errors import (
    GenerationTimeoutError,
    InvalidOptionError,
    MissingPackageError,
    PromptTooLongError,
    QueueFullError,
    UnsupportedError,
)

_log = logging.getLogger(__name__)

_PARAMS = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "constraint": "response_format"}
"""Names of options that requests have under another name."""

_RETRY_AFTER = {"Retry-After": "1"}


class APIError(Exception):
    """An error that a client is told.

    Args:
        status: The HTTP status.
        message: A sentence.
        param: The field of the request that it is about.
        code: A word for programs.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response, as OpenAI's API has it."""
        kind = {429: "rate_limit_error", 503: "service_unavailable_error", 504: "timeout_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, *, code: str | None = None) -> APIError:
    """Make the error of a value that is not allowed."""
    return APIError(400, message, param=param, code=code)


def unavailable(message: str) -> APIError:
    """Make the error of a server that takes no requests now."""
    return APIError(503, message, code="unavailable", headers=_RETRY_AFTER)


def busy(message: str, code: str) -> APIError:
    """Make the error of a server that has too much to do now."""
    return APIError(429, message, code=code, headers=_RETRY_AFTER)


def api_error(error: BaseException) -> APIError:
    """Turn an error of a call into what the client is told; one of the server's own goes to the log as well."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, PromptTooLongError):
        return invalid("prompt", str(error), code="context_length_exceeded")
    if isinstance(error, InvalidOptionError):
        return invalid(_param_of(str(error)), str(error))
    if isinstance(error, UnsupportedError):
        return invalid(None, str(error), code="unsupported")
    if isinstance(error, QueueFullError):
        return busy("too many requests wait for the model already; send it again later.", "queue_full")
    if isinstance(error, GenerationTimeoutError):
        return APIError(504, str(error), code="timeout")
    if isinstance(error, MissingPackageError):
        _log.error("a request needs a package that is not installed: %s", error)
        return APIError(501, "this server has not installed what the request needs.", code="not_installed")
    _log.error("a request failed", exc_info=error)
    return APIError(500, "the model failed; the server's log has the reason.", code="internal_error")


def _param_of(message: str) -> str | None:
    """Find the field that a sentence of the package is about: it begins with it, such as `top_p=3 is not allowed`."""
    found = re.match(r"([a-z][a-z_]*)[= ]", message)
    name = found[1] if found else None
    if name == "the":
        return None
    return _PARAMS.get(name or "", name) if found and message[found.end(1)] == "=" else None
