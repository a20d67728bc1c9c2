"""A quantized model that is no language model as LangChain's classes hold it: loading, sharing, serialization.

Owns the fields that the classes for encoders and for speech have in common. `fields` and `model` are those of language
models, which LangChain gives a base of their own.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, ClassVar

from langchain_core.load.serializable import Serializable
from pydantic import ConfigDict, Field, SecretStr, ValidationError, model_validator
from typing_extensions import Self

from langchain_quantllm.base.fields import own_error
from langchain_quantllm.base.model_holder import ModelHolder
from langchain_quantllm.errors import InvalidOptionError, nearest
from langchain_quantllm.memory import MemoryReport
from langchain_quantllm.schemes import SCHEMES, scheme_from


class LocalModel(ModelHolder, Serializable):
    """The fields of a model that is loaded at the first use and shared by instances that load the same."""

    model_config = ConfigDict(
        extra="forbid",
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        populate_by_name=True,
        hide_input_in_errors=True,  # the token may be in it
    )

    model_id: str = ""
    """A folder, or the name of a repository on the Hugging Face Hub; `model` and `model_name` are the same."""
    quantization: Any = None
    """The scheme of the linear layers: `"int8"`, `"nf4"`, `"nf4-double"`, `"fp4"`, `"none"`, a value such as
    `NF4(double_quantization=True)`, or None for the checkpoint as it is."""
    dtype: str = "auto"
    """Dtype of what is not quantized: `"auto"` (the checkpoint's, or 16 bits for a float32 checkpoint that is
    quantized), `"float16"`, `"bfloat16"` or `"float32"`."""
    attn_implementation: str | None = None
    """`"sdpa"` (transformers' default), `"flash_attention_2"` if installed, `"eager"` or `"flex_attention"`."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    token: SecretStr | None = None
    """Access token of the Hub; None uses the Hub's own login or `HF_TOKEN`."""
    cache_dir: str | None = None
    """Folder for files of the Hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""
    use_safetensors: bool = True
    """Refuse weights in pickle files, which can run code while they load."""
    local_files_only: bool | None = None
    """True never asks the Hub, False always does; None asks it only for files that are not in the cache."""
    progress: bool = True
    """Show the progress of loading, and of what takes long."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of transformers' `from_pretrained`."""

    _instances: ClassVar[weakref.WeakValueDictionary[int, Any]] = weakref.WeakValueDictionary()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check every field; weights are loaded on first use.

        Raises:
            InvalidOptionError: If a field is unknown, has a value that is not allowed, or contradicts another.
            UnsupportedError: If the device does not exist.
        """
        try:
            super().__init__(*args, **kwargs)
        except ValidationError as error:
            raise own_error(error) from None

    @classmethod
    def _translate(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Translate other spellings of fields; classes extend it for the classes that they replace."""
        for alias in ("model", "model_name"):
            name = values.pop(alias, None)
            if name is not None and values.setdefault("model_id", name) != name:
                msg = f"model_id={values['model_id']!r} and {alias}={name!r} say two things; give one of them."
                raise InvalidOptionError(msg)
        for name in ("model_id", "cache_dir"):
            if isinstance(values.get(name), os.PathLike):
                values[name] = os.fspath(values[name])
        return values

    @model_validator(mode="before")
    @classmethod
    def _translate_all(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        translated = cls._translate(dict(values))
        for name, value in translated.items():
            if name not in cls.model_fields:
                shown = "" if "token" in name else f"={value!r}"
                msg = f"{cls.__name__} has no field {name!r} ({name}{shown[:60]}){nearest(name, cls.model_fields)}"
                raise InvalidOptionError(msg)
        return translated

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.quantization is not None:
            scheme = scheme_from(self.quantization)
            names = [name for name, known in SCHEMES.items() if known == scheme]
            self.__dict__["quantization"] = names[0] if names else scheme and scheme.to_dict()
        self._check_fields()
        self._spec()
        return self

    def _check_fields(self) -> None:
        """Check what a class asks of its own fields."""

    def _spec(self) -> Any:
        """Return the specification of what is loaded for the fields; its `key()` is equal for what is loaded once."""
        raise NotImplementedError

    def _get_or_load(self, spec: Any) -> Any:
        """Return the model of a specification, loaded if it is not in memory."""
        raise NotImplementedError

    # Loading.

    def _open(self) -> Any:
        return self._get_or_load(self._spec())

    def _key(self) -> tuple[type, str]:
        return type(self), self._spec().key()

    def memory_report(self) -> MemoryReport:
        """Report the memory before, during and after loading, and now; loads the model if it is not loaded.

        Returns:
            A report that prints as a table, shows with bars in Jupyter, draws them by `.plot()`, and makes a dict by
            `to_dict()`.
        """
        report: MemoryReport = self._loaded().memory_report(self.model_id)
        return report

    # Serialization.

    @property
    def lc_secrets(self) -> dict[str, str]:
        """The environment variable that each secret field is loaded from."""
        return {"token": "HF_TOKEN"}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Return True: `dumpd` and `load` work on this class."""
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Return the module where `load` finds the class."""
        return cls.__module__.split(".")
