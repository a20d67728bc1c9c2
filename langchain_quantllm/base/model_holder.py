"""How an instance of a LangChain class holds a model: loaded at the first use, shared, and left out of copies.

Owns the life of the weights from an instance's side. What is loaded, and from which fields, the classes say.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, PrivateAttr, model_validator
from typing_extensions import Self

from langchain_quantllm.engine.process import check_process
from langchain_quantllm.errors import QuantLLMError


class ModelHolder(BaseModel):
    """An instance that loads its model at the first use and shares it with instances that load the same."""

    _loading_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that say what is loaded."""
    _instances: ClassVar[weakref.WeakValueDictionary[int, Any]]
    """The instances among which a model is shared; each family of classes has its own."""

    _model: Any = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _register(self) -> Self:
        self._instances[id(self)] = self
        return self

    def _open(self) -> Any:
        """Return the model that the fields ask for, loaded if it is not in memory."""
        raise NotImplementedError

    def _key(self) -> Hashable:
        """Return what is equal for instances that share a model; None for one that shares with none."""
        raise NotImplementedError

    def load(self) -> Self:
        """Load the weights now instead of at the first use.

        Returns:
            The same instance.

        Raises:
            QuantLLMError: A subclass of it, which says what to do; see `langchain_quantllm.errors`.
        """
        self._loaded()
        return self

    def unload(self) -> None:
        """Stop running calls and free the memory; the next call loads again.

        Instances that share the model lose it too, and load it again when they are called. The weights of a pipeline
        of your own stay in memory: only the engine over it ends.

        Raises:
            UnsupportedError: If this process was forked off the one that loaded it.
        """
        check_process()
        model, self._model = self._model, None
        if model is not None:
            model.close()

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._model is not None and not self._model.closed

    def _loaded(self) -> Any:
        """Return the model, loaded if it is not."""
        check_process()
        model = self._model
        if model is None or model.closed:
            model = self._open()
            self._share(model)
            self._model = model
        return model

    def _share(self, model: Any) -> None:
        """Let every instance with the same settings hold the model, whether it was called or not.

        `configurable_fields` makes an instance for each call. If only these held the model, each call would load it
        again.
        """
        key = self._key()
        if key is None:
            return
        for other in list(self._instances.values()):
            if other is self or (other._model is not None and not other._model.closed):
                continue
            with contextlib.suppress(QuantLLMError):  # a field was set to what is not allowed: its own call raises it
                if other._key() == key:
                    other._model = model

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; after a field that says what to load, the next call loads that."""
        super().__setattr__(name, value)
        self._forget([name])

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the instance; after an update of a field that says what to load, the copy's next call loads that."""
        copied = super().model_copy(update=update, deep=deep)
        copied._forget(update or ())
        return copied

    def _forget(self, changed: Iterable[str]) -> None:
        """Drop the loaded model if a changed field asks for another one."""
        self.__dict__.pop("_serialized", None)  # the serialized form, which langchain-core keeps
        if not self._loading_fields.isdisjoint(changed):
            self._model = None

    def __getstate__(self) -> dict[Any, Any]:
        """Return the fields for a pickle, without the weights and the token: what loads it reads that from `HF_TOKEN`.

        Raises:
            TypeError: If the instance stands over a pipeline of your own.
        """
        state = self._state()
        return {
            **state,
            "__dict__": {**state["__dict__"], "token": None},
            "__pydantic_fields_set__": state["__pydantic_fields_set__"] - {"token"},
        }

    def _state(self) -> dict[Any, Any]:
        """Return the fields, without the weights."""
        state = super().__getstate__()
        return {**state, "__pydantic_private__": {**(state["__pydantic_private__"] or {}), "_model": None}}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the fields; the copy finds the loaded weights through the registry."""
        state = copy.deepcopy(self._state(), memo)
        twin = type(self).__new__(type(self))
        twin.__setstate__(state)
        return twin
