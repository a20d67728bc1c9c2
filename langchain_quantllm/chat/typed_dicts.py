"""`TypedDict` classes with `Required` and `NotRequired`, which LangChain's conversion does not read."""

from __future__ import annotations

import typing
from typing import Any, get_args, get_origin

import typing_extensions
from typing_extensions import NotRequired, ReadOnly, Required, TypedDict, get_type_hints, is_typeddict

from langchain_quantllm.errors import InvalidOptionError

_REQUIRED = (Required, getattr(typing, "Required", Required))  # typing has them since Python 3.11
_NOT_REQUIRED = (NotRequired, getattr(typing, "NotRequired", NotRequired))


def required_names(kind: Any) -> set[str]:
    """Return the names of a `TypedDict` that are required, with annotations that are texts, too."""
    marks = {name: get_origin(hint) for name, hint in _hints(kind).items()}
    names = set(kind.__required_keys__) | {name for name, mark in marks.items() if mark in _REQUIRED}
    return names - {name for name, mark in marks.items() if mark in _NOT_REQUIRED}


def _hints(kind: Any) -> dict[str, Any]:
    try:
        return get_type_hints(kind, include_extras=True)
    except (NameError, TypeError) as error:
        msg = f"schema={kind.__name__} has hints that cannot be read ({error}); define their types beside it."
        raise InvalidOptionError(msg) from error


def without_requirements(kind: Any, within: tuple[Any, ...] = ()) -> Any:
    """Return a type in which no `TypedDict` has marks of requirement.

    Args:
        kind: The type.
        within: Those in which it stands.

    Raises:
        InvalidOptionError: If a `TypedDict` refers to itself.
    """
    if is_typeddict(kind):
        if kind in within:
            msg = f"schema={within[0].__name__} refers to itself, which a TypedDict may not; give a pydantic class."
            raise InvalidOptionError(msg)
        fields = {name: without_requirements(hint, (*within, kind)) for name, hint in _hints(kind).items()}
        make: Any = TypedDict
        plain = make(kind.__name__, fields)
        plain.__doc__ = kind.__doc__
        return plain
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is not None and origin in (*_REQUIRED, *_NOT_REQUIRED, ReadOnly):
        return without_requirements(arguments[0], within)
    if origin is typing_extensions.Annotated:
        annotated: Any = typing_extensions.Annotated
        parts = (without_requirements(arguments[0], within), *kind.__metadata__)
        return annotated[parts]
    if origin in (list, tuple, set, frozenset, dict) and arguments:
        return origin[tuple(without_requirements(one, within) for one in arguments)]
    return kind
