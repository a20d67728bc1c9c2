"""A model of this process behind OpenAI's protocol: `create_app` and `run_server`; needs the extra `serve`.

`access` stands before all routes of `app`; `answering` reads a request and sends its answer; `served` plans its call on
the package's own classes; `completions` and `chat` write answers. `deployment` writes the commands and manifests of
other engines' servers, and starts nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from langchain_quantllm.errors import MissingPackageError, pip_install

if TYPE_CHECKING:
    from langchain_quantllm.server.app import create_app
    from langchain_quantllm.server.run import run_server

__all__ = ["create_app", "run_server"]

_PLACES = {"create_app": "app", "run_server": "run"}
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def __getattr__(name: str) -> Any:
    """Import what serves when it is first asked for.

    Raises:
        MissingPackageError: If a package of the extra `serve` is not installed.
    """
    if name not in _PLACES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from langchain_quantllm.compat.packages import is_installed

    if missing := [package for package in _PACKAGES if not is_installed(package)]:
        msg = f"serving needs {' and '.join(missing)}: {pip_install('langchain-quantllm[serve]')}."
        raise MissingPackageError(msg)
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
