"""The fields of the class for speech, and the Whisper that is loaded for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented
from pydantic import Field, field_validator

from langchain_quantllm.audio.transcribe import TranscriptionOptions
from langchain_quantllm.base.local_model import LocalModel
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.loading.arguments import LOADING_FIELDS, SPEC_FIELDS, device_name, unify_types
from langchain_quantllm.loading.inputs import require_pipeline
from langchain_quantllm.loading.registry import LoadedModel, get_or_load
from langchain_quantllm.loading.sources import stored_quantization
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.schemes import Scheme, Unquantized, scheme_from, scheme_of_config


class SpeechFields(LocalModel):
    """A quantized Whisper, loaded on first use, and how it writes down speech.

    `dtype="auto"` takes bfloat16 instead of a checkpoint's float16 on a CPU.
    """

    quantization_config: Any = None
    """A transformers quantization config, such as `BitsAndBytesConfig(load_in_8bit=True)`, instead of
    `quantization`."""
    device: int | str | None = None
    """One device for the whole model: `"cpu"`, `"cuda:1"`, or a number, where -1 is the CPU."""
    device_map: Any = None
    """The device of each part of the model, as transformers takes it; None is the first GPU, or the CPU if there is
    none."""
    max_memory: Any = None
    """Maximum memory of each device, such as `{0: "10GiB", "cpu": "30GiB"}`."""
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

    _loading_fields: ClassVar[frozenset[str]] = frozenset({"model_id", *LOADING_FIELDS})

    @classmethod
    def _translate(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = super()._translate(values)
        unify_types(values)
        return values

    @field_validator("temperature", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def _check_fields(self) -> None:
        if not self.model_id:
            msg = "give model_id=, a folder or a repository's name such as 'openai/whisper-small'."
            raise InvalidOptionError(msg)
        if self.device is not None and self.device_map is not None:
            msg = (
                f"device={self.device!r} and device_map={self.device_map!r} say the same thing twice; give one of them."
            )
            raise InvalidOptionError(msg)
        self._options()

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

    def _get_or_load(self, spec: LoadSpec) -> LoadedModel:
        return get_or_load(spec)

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

    # The loaded model.

    @property
    def pipeline(self) -> Any:
        """The transformers pipeline that holds the weights; loads them if they are not loaded."""
        return require_pipeline(self._loaded())

    @property
    def scheme(self) -> Scheme:
        """The scheme that the weights have, or will have, in memory."""
        if self._model is not None:
            loaded: Scheme = self._model.scheme
            return loaded
        config = self.quantization_config or stored_quantization(self.model_id)
        if config is not None:
            return scheme_of_config(config if isinstance(config, Mapping) else config.to_dict())
        return scheme_from(self.quantization) or Unquantized()

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """Serialize the fields."""
        serialized = super().to_json()
        kwargs = serialized.get("kwargs")
        if isinstance(kwargs, dict):
            config = kwargs.get("quantization_config")
            if config is not None and not isinstance(config, dict):
                kwargs["quantization_config"] = config.to_dict()
        return serialized
