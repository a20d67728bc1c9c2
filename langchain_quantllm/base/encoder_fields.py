"""The fields that LangChain's classes over an encoder share, and how they load, unload and are serialized."""

from __future__ import annotations

import contextlib
import copy
import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from langchain_core.load.serializable import Serializable
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, ValidationError, model_validator
from typing_extensions import Self

from langchain_quantllm.encoders.registry import LoadedEncoder, get_or_load
from langchain_quantllm.encoders.spec import EncoderSpec
from langchain_quantllm.engine.process import check_process
from langchain_quantllm.errors import InvalidOptionError, QuantLLMError, nearest
from langchain_quantllm.loading.arguments import device_name
from langchain_quantllm.memory import MemoryReport
from langchain_quantllm.schemes import SCHEMES, scheme_from

_SPEC_FIELDS = (
    "model_id",
    "dtype",
    "attn_implementation",
    "revision",
    "cache_dir",
    "trust_remote_code",
    "use_safetensors",
    "local_files_only",
    "model_kwargs",
    "progress",
)
"""Fields that `EncoderSpec` has by the same name."""

LOADING_FIELDS = frozenset({*_SPEC_FIELDS, "quantization", "token", "device", "pooling"} - {"progress"})
"""Fields that say what is loaded."""

_instances: weakref.WeakValueDictionary[int, EncoderFields] = weakref.WeakValueDictionary()


class EncoderFields(Serializable):
    """The fields of an encoder, which is loaded at the first use and shared by instances that load the same."""

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
    `NF4(double_quantization=True)`, or None for the checkpoint as it is. What is not quantized is held in 16 bits then;
    pooling and normalization are computed in float32."""
    dtype: str = "auto"
    """Dtype of what is not quantized: `"auto"` (the checkpoint's, or bfloat16 for a float32 checkpoint that is
    quantized), `"float16"`, `"bfloat16"` or `"float32"`."""
    device: int | str | list[int | str] | None = None
    """Such as `"cpu"`, `"cuda:1"`, or a number as in HuggingFacePipeline; None is the first accelerator, else the
    CPU."""
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
    """Show the progress of loading, and of calls that take long."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of transformers' `from_pretrained`."""

    _kind: ClassVar[str] = "embedding"
    """The kind of model, one of `encoders.spec.KINDS`."""
    _several_devices: ClassVar[bool] = False
    """Whether `device` may be a list."""

    _encoder: LoadedEncoder | None = PrivateAttr(default=None)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check every field; weights are loaded on first use.

        Raises:
            InvalidOptionError: If a field is unknown, has a value that is not allowed, or contradicts another.
            UnsupportedError: If the device does not exist.
        """
        try:
            super().__init__(*args, **kwargs)
        except ValidationError as error:
            causes = [e.get("ctx", {}).get("error") for e in error.errors(include_url=False)]
            own = next((cause for cause in causes if isinstance(cause, QuantLLMError)), None)
            raise (own or _invalid_field(error)) from None

    @classmethod
    def _translate(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Translate other spellings of fields; classes extend it for the classes that they replace."""
        for alias in ("model", "model_name"):
            name = values.pop(alias, None)
            if name is not None and values.setdefault("model_id", name) != name:
                msg = f"model_id={values['model_id']!r} and {alias}={name!r} say two things; give one of them."
                raise InvalidOptionError(msg)
        if (folder := values.pop("cache_folder", None)) is not None:
            values.setdefault("cache_dir", folder)
        for name in ("model_id", "cache_dir"):
            if isinstance(values.get(name), os.PathLike):
                values[name] = os.fspath(values[name])
        if values.get("dtype") is not None:
            values["dtype"] = str(values["dtype"]).removeprefix("torch.")
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
        if isinstance(self.device, list) and (not self._several_devices or not self.device):
            msg = f"device={self.device!r} is not possible for {type(self).__name__}; give one, such as 'cuda:0'."
            raise InvalidOptionError(msg)
        self._spec()
        _instances[id(self)] = self
        return self

    def _spec(self) -> EncoderSpec:
        """Return the specification of what is loaded for the fields."""
        return EncoderSpec(
            kind=self._kind,
            scheme=scheme_from(self.quantization),
            device=self._devices()[0] if self.device is not None else None,
            token=self.token.get_secret_value() if self.token else None,
            pooling=getattr(self, "pooling", None),
            **{name: getattr(self, name) for name in _SPEC_FIELDS},
        )

    def _devices(self) -> list[str]:
        """List the names of the devices that are asked for; empty if none is."""
        given = self.device if isinstance(self.device, list) else [self.device]
        return [device_name(device) for device in given if device is not None]

    # Loading.

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
        """End calls under way and free the memory; the next call loads again.

        Instances that share the model lose it too, and load it again when they are called.

        Raises:
            UnsupportedError: If this process was forked off the one that loaded it.
        """
        check_process()
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            encoder.close()

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._encoder is not None and not self._encoder.closed

    def memory_report(self) -> MemoryReport:
        """Report the memory of the model: before, during and after loading. Loads the model if needed."""
        return self._loaded().memory_report(self.model_id)

    def _loaded(self) -> LoadedEncoder:
        """Return the encoder, loaded if it is not."""
        check_process()
        encoder = self._encoder
        if encoder is None or encoder.closed:
            spec = self._spec()
            encoder = get_or_load(spec)
            self._encoder = encoder
            for other in list(_instances.values()):  # copies that LangChain makes for a call may hold it alone
                waits = other._encoder is None or other._encoder.closed
                with contextlib.suppress(QuantLLMError):  # of a field that was set to a wrong value
                    if waits and other is not self and other._spec().key() == spec.key():
                        other._encoder = encoder
        return encoder

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
        if not LOADING_FIELDS.isdisjoint(changed):
            self._encoder = None

    # Serialization.

    def __getstate__(self) -> dict[Any, Any]:
        """Return the fields for a pickle, without weights and token: what loads it reads that from `HF_TOKEN`."""
        state = self._state()
        return {
            **state,
            "__dict__": {**state["__dict__"], "token": None},
            "__pydantic_fields_set__": state["__pydantic_fields_set__"] - {"token"},
        }

    def _state(self) -> dict[Any, Any]:
        """Return the fields, without the weights."""
        state = super().__getstate__()
        return {**state, "__pydantic_private__": {**(state["__pydantic_private__"] or {}), "_encoder": None}}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the fields; the copy finds the loaded weights through the registry."""
        state = copy.deepcopy(self._state(), memo)
        twin = type(self).__new__(type(self))
        twin.__setstate__(state)
        return twin

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


def _invalid_field(error: ValidationError) -> InvalidOptionError:
    """Turn pydantic's first error into one sentence."""
    found = error.errors(include_url=False)[0]
    words = str(found["msg"]).replace("Input should", "it must")
    name = str(found["loc"][0]) if found["loc"] else "a field"
    value = "" if "token" in name or not found["loc"] else f"={found['input']!r}"
    return InvalidOptionError(f"{name}{value[:80]} is not allowed; {words[:1].lower()}{words[1:]}.")
