"""The fields of the class for speech: their checks, the Whisper that is loaded for them, and their serialization."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

from langchain_core.load.serializable import Serializable, SerializedConstructor, SerializedNotImplemented
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, ValidationError, field_validator, model_validator
from typing_extensions import Self

from langchain_quantllm.audio.transcribe import TranscriptionOptions
from langchain_quantllm.base.fields import invalid_field
from langchain_quantllm.engine.process import check_process
from langchain_quantllm.errors import InvalidOptionError, QuantLLMError, nearest
from langchain_quantllm.loading.arguments import LOADING_FIELDS, SPEC_FIELDS, device_name, unify_types
from langchain_quantllm.loading.inputs import require_pipeline
from langchain_quantllm.loading.registry import LoadedModel, get_or_load
from langchain_quantllm.loading.sources import stored_quantization
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory import MemoryReport
from langchain_quantllm.schemes import SCHEMES, Scheme, Unquantized, scheme_from, scheme_of_config


class SpeechFields(Serializable):
    """A quantized Whisper, loaded on first use, and how it writes down speech."""

    model_config = ConfigDict(
        extra="forbid",
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        populate_by_name=True,
        hide_input_in_errors=True,  # the token may be in it
    )

    model_id: str = ""
    """A folder with a Whisper, or the name of a repository on the Hugging Face Hub; `model=` means the same."""
    quantization: Any = None
    """The scheme of the weights: `"int8"`, `"nf4"`, `"fp4"`, a value such as `NF4(double_quantization=True)`, or None
    for the checkpoint as it is."""
    quantization_config: Any = None
    """A transformers quantization config, such as `BitsAndBytesConfig(load_in_8bit=True)`, instead of
    `quantization`."""
    dtype: str = "auto"
    """Dtype of the unquantized weights: `"auto"` (the checkpoint's; 16 bits where the others are quantized, bfloat16
    instead of float16 on a CPU),
    `"float16"`, `"bfloat16"` or `"float32"`."""
    device: int | str | None = None
    """One device for the whole model: `"cpu"`, `"cuda:1"`, or a number, where -1 is the CPU."""
    device_map: Any = None
    """The device of each part of the model, as transformers takes it; None is the first GPU, or the CPU if there is
    none."""
    max_memory: Any = None
    """Maximum memory of each device, such as `{0: "10GiB", "cpu": "30GiB"}`."""
    attn_implementation: str | None = None
    """`"sdpa"` (transformers' default), `"flash_attention_2"` if installed, or `"eager"`."""
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
    """Show the progress of loading, and of sounds of a minute and more."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of transformers' `from_pretrained`."""

    per: Literal["file", "piece", "segment"] = "segment"
    """What becomes a Document: each segment, which is about a sentence; each piece of up to 30 seconds; or the file."""
    language: str | None = None
    """The language that is spoken, by its code or its English name; None detects it in the first piece with sound."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """`"transcribe"` writes down what is said, `"translate"` translates it into English."""
    prompt: str | None = None
    """A text in whose style, and with whose names, the model goes on: `"LangChain, QLoRA, bitsandbytes."`"""
    batch_size: int = Field(default=1, ge=1)
    """Pieces that go through the model together: more of them are faster on a GPU, and the first Documents later."""
    num_beams: int = Field(default=1, ge=1)
    """Beams of the search; 1 takes the most likely tokens."""
    temperature: float | tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """The temperature of the first try, and those of further tries for a piece whose text repeats itself or is
    unlikely. These draw tokens at random: `0.0` alone gives the same text every time."""
    no_speech_threshold: float = Field(default=0.6, ge=0, le=1)
    """Probability of silence above which an unlikely text is left out."""
    logprob_threshold: float = -1.0
    """Mean log probability of a token below which a text is unlikely."""
    compression_ratio_threshold: float = 1.35
    """Ratio by which a text's tokens can be compressed above which it repeats itself."""
    max_duration_s: float | None = Field(default=4 * 3600.0, gt=0)
    """Most seconds of sound in a file; None for any number."""

    _model: LoadedModel | None = PrivateAttr(default=None)

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
            raise (own or invalid_field(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name in ("model", "model_name"):
            if (alias := values.pop(name, None)) is not None and values.setdefault("model_id", alias) != alias:
                msg = f"model_id={values['model_id']!r} and {name}={alias!r} say two things; give one of them."
                raise InvalidOptionError(msg)
        for name in values:
            if name not in cls.model_fields:
                msg = f"{cls.__name__} has no option {name!r}{nearest(name, cls.model_fields)}"
                raise InvalidOptionError(msg)
        unify_types(values)
        return values

    @field_validator("temperature", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model_id:
            msg = "give model_id=, a folder or a repository's name such as 'openai/whisper-small'."
            raise InvalidOptionError(msg)
        if self.quantization is not None:
            scheme = scheme_from(self.quantization)
            names = [name for name, known in SCHEMES.items() if known == scheme]
            self.__dict__["quantization"] = names[0] if names else scheme and scheme.to_dict()
        if self.device is not None and self.device_map is not None:
            msg = (
                f"device={self.device!r} and device_map={self.device_map!r} say the same thing twice; give one of them."
            )
            raise InvalidOptionError(msg)
        self._spec()
        self._options()
        return self

    def _spec(self) -> LoadSpec:
        """Return the specification of what is loaded for the fields."""
        fields = {name: getattr(self, name) for name in SPEC_FIELDS}
        if self.device is not None:
            fields["device_map"] = {"": device_name(self.device)}
        return LoadSpec(
            model_id=self.model_id,
            scheme=scheme_from(self.quantization),
            quantization_config=self.quantization_config,
            token=self.token.get_secret_value() if self.token else None,
            progress=self.progress,
            model_kwargs=self.model_kwargs,
            task="speech",
            **fields,
        )

    def _options(self) -> TranscriptionOptions:
        temperature = self.temperature
        return TranscriptionOptions(
            language=self.language,
            task=self.task,
            prompt=self.prompt,
            num_beams=self.num_beams,
            temperatures=temperature if isinstance(temperature, tuple) else (temperature,),
            compression_ratio=self.compression_ratio_threshold,
            logprob=self.logprob_threshold,
            no_speech=self.no_speech_threshold,
        )

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
        """Free the memory; the next file loads again, and files being parsed end with an error.

        Instances that share the model lose it too, and load it again at their next file.

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

    @property
    def pipeline(self) -> Any:
        """The transformers pipeline that holds the weights; loads them if they are not loaded."""
        return require_pipeline(self._loaded())

    @property
    def scheme(self) -> Scheme:
        """The scheme that the weights have, or will have, in memory."""
        if self._model is not None:
            return self._model.scheme
        config = self.quantization_config or stored_quantization(self.model_id)
        if config is not None:
            return scheme_of_config(config if isinstance(config, Mapping) else config.to_dict())
        return scheme_from(self.quantization) or Unquantized()

    def memory_report(self) -> MemoryReport:
        """Report the memory before, during and after loading, and now; loads the model if it is not loaded.

        Returns:
            A report that prints as a table, shows with bars in Jupyter, draws them by `.plot()`, and makes a dict by
            `to_dict()`.
        """
        return self._loaded().memory_report(self.model_id)

    def _loaded(self) -> LoadedModel:
        check_process()
        model = self._model
        if model is None or model.closed:
            model = self._model = get_or_load(self._spec())
        return model

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; after a field that says what to load, the next file loads that."""
        super().__setattr__(name, value)
        if name in ("model_id", *LOADING_FIELDS):
            self._model = None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the instance; after an update of a field that says what to load, the copy's next file loads that."""
        copied = super().model_copy(update=update, deep=deep)
        if not {"model_id", *LOADING_FIELDS}.isdisjoint(update or ()):
            copied._model = None
        return copied

    # Serialization.

    def __getstate__(self) -> dict[Any, Any]:
        """Return the fields for a pickle, without weights and token: what loads it reads the token from `HF_TOKEN`."""
        state = self._state()
        return {
            **state,
            "__dict__": {**state["__dict__"], "token": None},
            "__pydantic_fields_set__": state["__pydantic_fields_set__"] - {"token"},
        }

    def _state(self) -> dict[Any, Any]:
        state = super().__getstate__()
        return {**state, "__pydantic_private__": {**(state["__pydantic_private__"] or {}), "_model": None}}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the fields; the copy finds the loaded weights through the registry."""
        twin = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self._state(), memo))
        return twin

    @property
    def lc_secrets(self) -> dict[str, str]:
        """The environment variable that each secret field is loaded from."""
        return {"token": "HF_TOKEN"}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Return True: `dumpd` and `load` work on this class."""
        return True

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """Serialize the fields."""
        serialized = super().to_json()
        kwargs = serialized.get("kwargs")
        if isinstance(kwargs, dict):
            config = kwargs.get("quantization_config")
            if config is not None and not isinstance(config, dict):
                kwargs["quantization_config"] = config.to_dict()
        return serialized
