"""Which adapters a model is loaded with, and what they are called.

Owns the names: what the fields `adapters` and `adapter` say together, and the choice of a call. Reads no file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_quantllm.errors import InvalidOptionError, nearest
from langchain_quantllm.options import BASE_ADAPTER

_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class AdapterChoice:
    """The adapters of a model, and the one that counts where a call does not say.

    Args:
        sources: Folder or repository of each, by its name.
        default: A name of `sources`, or `"base"`.
    """

    sources: Mapping[str, str]
    default: str = BASE_ADAPTER

    @classmethod
    def of(cls, adapters: Mapping[str, Any], adapter: Any) -> AdapterChoice:
        """Bring the two fields together.

        Args:
            adapters: Folder or repository of each adapter, by its name.
            adapter: A name of `adapters`, `"base"`, None, or a folder or repository of one more.

        Raises:
            InvalidOptionError: If a name cannot be one or stands for two adapters, or `adapter` is none of these.
        """
        if not isinstance(adapters, Mapping):
            msg = f"adapters={adapters!r} is no dict; give names with folders or repositories, {{'sql': './sql-lora'}}."
            raise InvalidOptionError(msg)
        sources = {}
        for name, source in adapters.items():
            _check_name(name)
            if not isinstance(source, str | os.PathLike) or not os.fspath(source):
                msg = f"adapters[{name!r}]={source!r} must be a folder, or a repository's name on the Hub."
                raise InvalidOptionError(msg)
            sources[name] = os.fspath(source)
        if adapter is None or adapter == BASE_ADAPTER:
            return cls(sources=sources)
        if not isinstance(adapter, str | os.PathLike) or not os.fspath(adapter):
            msg = f"adapter={adapter!r} must be a name of adapters, a folder, or a repository's name on the Hub."
            raise InvalidOptionError(msg)
        given = os.fspath(adapter)
        if given in sources:
            return cls(sources=sources, default=given)
        name = _name_of(given, sources)
        return cls(sources={**sources, name: given}, default=name)

    def choose(self, name: str | None) -> str | None:
        """Give the adapter of a call.

        Args:
            name: What the call says, or None.

        Returns:
            A name of `sources` or `"base"`; None where there are no adapters, and the model runs as it is.

        Raises:
            InvalidOptionError: If there is none of this name.
        """
        if name is not None and name != BASE_ADAPTER and name not in self.sources:
            known = {*self.sources, BASE_ADAPTER}
            if not self.sources:
                msg = f"adapter={name!r} is not known: the model was given none; name it in adapters={{...}}."
            else:
                guess = nearest(name, known)
                listed = "" if guess.startswith("; allowed") else f" Known are {', '.join(sorted(known))}."
                msg = f"adapter={name!r} is not known{guess}{listed}"
            raise InvalidOptionError(msg)
        if not self.sources:
            return None
        return self.default if name is None else name


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        msg = f"{name!r} cannot be the name of an adapter; use letters, digits, '_' and '-'."
        raise InvalidOptionError(msg)
    if name == BASE_ADAPTER:
        msg = f"adapters has the name {BASE_ADAPTER!r}, which stands for the model without any; choose another."
        raise InvalidOptionError(msg)


def _name_of(given: str, sources: Mapping[str, str]) -> str:
    """Name an adapter that was given by its folder or repository."""
    if "/" not in given and os.sep not in given and not Path(given).expanduser().is_dir():
        known = [*sources, BASE_ADAPTER]
        msg = f"adapter={given!r} is neither a folder, nor a repository such as 'owner/name', nor a name of adapters"
        raise InvalidOptionError(msg + nearest(given, known))
    name = re.sub(r"[^A-Za-z0-9_-]", "_", Path(given).expanduser().resolve().name)  # dots are peft's own
    if name in (*sources, BASE_ADAPTER) or not name:
        what = f"adapters[{name!r}]={sources[name]!r}" if name in sources else f"the reserved name {name!r}"
        msg = (
            f"adapter={given!r} would be called {name!r}, as {what} is; give it a name of its own: "
            f"adapters={{'name': {given!r}}}."
        )
        raise InvalidOptionError(msg)
    return name
