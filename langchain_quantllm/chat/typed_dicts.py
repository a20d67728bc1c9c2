"""`TypedDict` classes with `Required` and `NotRequired`, which LangChain's conversion does not read."""

from __future__ import annotations

from typing import Any, get_args, get_origin

import typing_extensions
from typing_extensions import NotRequired, ReadOnly, Required, TypedDict, get_type_hints, is_typeddict

from langchain_quantllm.errors import InvalidOptionError

_MARKS = (
    Required,
    NotRequired,
    ReadOnly,
    *(getattr(__import__("typing"), n, None) for n in ("Required", "NotRequired")),
)


def required_names(kind: Any) -> set[str]:
    """Return the names of a `TypedDict` that are required, with annotations that are texts, too."""
    names = set(kind.__required_keys__)
    for name, hint in _hints(kind).items():
        mark = get_origin(hint)
        if mark is not None and mark in (Required, getattr(__import__("typing"), "Required", Required)):
            names.add(name)
        elif mark is not None and mark in (NotRequired, getattr(__import__("typing"), "NotRequired", NotRequired)):
            names.discard(name)
    return names


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
        plain = TypedDict(kind.__name__, fields)  # type: ignore[operator]
        plain.__doc__ = kind.__doc__
        return plain
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is not None and origin in _MARKS:
        return without_requirements(arguments[0], within)
    if origin is typing_extensions.Annotated:
        return typing_extensions.Annotated[(without_requirements(arguments[0], within), *kind.__metadata__)]
    if origin in (list, tuple, set, frozenset, dict) and arguments:
        return origin[tuple(without_requirements(one, within) for one in arguments)]
    return kind
