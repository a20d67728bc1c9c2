"""The options of an OpenAI-compatible server as the engine of a model, and their checks. Connects to nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import urlsplit, urlunsplit

from langchain_quantllm.engine.external.spec import ExternalEngine
from langchain_quantllm.errors import InvalidOptionError, first_line

API_KEY_VARIABLE = "QUANTLLM_API_KEY"
"""Environment variable of a key that was not given."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions(ExternalEngine):
    """The options of `Server`, which documents them."""

    name: ClassVar[str] = "server"
    _MEANT: ClassVar[Mapping[str, str]] = {
        "base_url": "url",
        "openai_api_base": "url",
        "openai_api_key": "api_key",
        "model_id": "model",
        "model_name": "model",
        "timeout": "read_timeout_s",
        "request_timeout": "read_timeout_s",
        "max_concurrency": "max_connections",
    }
    REFUSED: ClassVar[Mapping[str, str]] = {
        **ExternalEngine.REFUSED,
        "dtype": "as the server has loaded the weights",
        "model_kwargs": "as the server has loaded the model",
        "use_safetensors": "as the server has loaded the weights",
    }

    url: str = field(default="", kw_only=False)
    api_key: str | None = field(default=None, repr=False)
    model: str | None = None
    max_retries: int = 2
    max_connections: int = 128
    connect_timeout_s: float = 5.0
    read_timeout_s: float | None = 300.0

    def __post_init__(self) -> None:
        """Check the options, and write the URL in one way."""
        object.__setattr__(self, "url", _checked_url(self.url))
        key = self.api_key
        reveal = getattr(key, "get_secret_value", None)  # pydantic's SecretStr
        object.__setattr__(self, "api_key", reveal() if reveal is not None else key)
        if self.api_key is not None and (not isinstance(self.api_key, str) or not _is_header(self.api_key)):
            msg = "Server(api_key=...) must be a text without blanks and line breaks at its ends, in ASCII."
            raise InvalidOptionError(msg)
        if self.model is not None and (not isinstance(self.model, str) or not self.model):
            msg = f"Server(model={self.model!r}) is not allowed; it must be the name of a model at the server."
            raise InvalidOptionError(msg)
        for option, least in (("max_retries", 0), ("max_connections", 1)):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                msg = f"Server({option}={value!r}) is not allowed; it must be a whole number of at least {least}."
                raise InvalidOptionError(msg)
        for option in ("connect_timeout_s", "read_timeout_s"):
            value = getattr(self, option)
            if value is None and option == "read_timeout_s":
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                msg = f"Server({option}={value!r}) is not allowed; it must be a number of seconds above 0."
                raise InvalidOptionError(msg)

    @property
    def place(self) -> str:
        """Where the weights are, in words."""
        return f"at the server {self.url}"

    @property
    def key_in_use(self) -> str | None:
        """The key that is sent: the given one, or that of the environment; None for no key."""
        return self.api_key or os.environ.get(API_KEY_VARIABLE) or None

    def identity(self) -> dict[str, Any]:
        """Return what of the server changes texts, as far as it is known before it is asked: the model's name."""
        return {"name": self.name, **({} if self.model is None else {"model": self.model})}


def _checked_url(url: Any) -> str:
    """Check the base of a server's addresses, and add `/v1` where it has no path."""
    import httpx

    example = "Server('http://localhost:8000/v1')"
    if not isinstance(url, str) or not url:
        msg = f"Server(url={url!r}) is not allowed; give the base of the server's addresses, such as {example}."
        raise InvalidOptionError(msg)
    try:
        parts = urlsplit(url.strip())
        _ = parts.port  # raises for one that is no number
        httpx.URL(url.strip())
    except (ValueError, httpx.InvalidURL) as error:
        msg = f"Server(url=...) is no URL: {first_line(error)}; write it as in {example}."
        raise InvalidOptionError(msg) from error
    if parts.username is not None or parts.password is not None:
        msg = "Server(url=...) has a name or a password in it; give a key as api_key= instead."
        raise InvalidOptionError(msg)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        msg = f"Server(url={url!r}) is not allowed; it must begin with http:// or https:// and a host, as in {example}."
        raise InvalidOptionError(msg)
    if parts.query or parts.fragment:
        msg = f"Server(url={url!r}) is not allowed; leave out what stands behind ? and #."
        raise InvalidOptionError(msg)
    path = parts.path.rstrip("/")
    for ending in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(ending)
    return urlunsplit((parts.scheme, parts.netloc, path or "/v1", "", ""))


def _is_header(key: str) -> bool:
    return bool(key) and key == key.strip() and key.isascii() and key.isprintable()
