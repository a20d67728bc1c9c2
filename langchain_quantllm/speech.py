"""Speech as Documents: a LangChain parser of sound files over a quantized Whisper in this process."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from langchain_core.document_loaders import BaseBlobParser
from langchain_core.documents import Document
from langchain_core.documents.base import Blob
from langchain_core.load.serializable import Serializable, SerializedConstructor, SerializedNotImplemented
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, ValidationError, field_validator, model_validator
from typing_extensions import Self

from langchain_quantllm.audio.decode import SPEECH_RATE, Sound, open_sound
from langchain_quantllm.audio.pieces import Piece, cut
from langchain_quantllm.audio.transcribe import WINDOW_S, Segment, Transcriber, TranscriptionOptions
from langchain_quantllm.base.aside import run_aside
from langchain_quantllm.base.fields import invalid_field
from langchain_quantllm.engine.clean_thread import in_clean_thread
from langchain_quantllm.engine.process import check_process
from langchain_quantllm.errors import InvalidOptionError, QuantLLMError, nearest
from langchain_quantllm.loading.arguments import LOADING_FIELDS, SPEC_FIELDS, device_name, unify_types
from langchain_quantllm.loading.inputs import require_pipeline
from langchain_quantllm.loading.registry import LoadedModel, get_or_load
from langchain_quantllm.loading.sources import stored_quantization
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory import MemoryReport
from langchain_quantllm.schemes import SCHEMES, Scheme, Unquantized, scheme_from, scheme_of_config

logger = logging.getLogger(__name__)

_LONG_S = 60.0
"""Seconds of sound from which on the progress is shown."""


class QuantizedWhisperParser(BaseBlobParser, Serializable):
    """Parser of sound files into Documents, by a Whisper in int8, nf4, fp4 or 16 bits.

    Takes blobs of WAV, MP3, FLAC, M4A, OGG, WebM, and of videos, whose pictures it does not look at. `av` decodes them:
    `pip install "langchain-quantllm[audio]"`. A file is read, decoded and written down piece by piece, each of up to 30
    seconds and cut where the speaker pauses, so that its first Documents come while the rest is not even decoded, and
    an hour takes the memory of a minute. The weights are loaded at the first use and shared by all instances of
    the same settings.

    Parse:
        ```python
        from langchain_core.documents.base import Blob
        from langchain_quantllm import QuantizedWhisperParser

        parser = QuantizedWhisperParser(model="openai/whisper-large-v3-turbo", quantization="int8")
        for document in parser.lazy_parse(Blob.from_path("interview.mp3")):
            print(document.metadata["start_s"], document.page_content)
        ```

    With a loader:
        ```python
        loader = GenericLoader(FileSystemBlobLoader("talks", glob="*.mp3"), parser)
        ```

    Metadata of a Document:
        `source`, `start_s` and `end_s` in seconds, `duration_s` of the file where its header says it, `language` by its
        code, `model`, and what the blob's own metadata says. `damaged_at_s` is there where a part of the file could not
        be decoded.

    Silence gives no Document. A file that is no sound, empty, too long or wholly damaged raises an
    `InvalidOptionError`.
    """

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

    # Parsing.

    def lazy_parse(self, blob: Blob) -> Iterator[Document]:
        """Parse a sound, Document by Document as they are found.

        Args:
            blob: A file by its path, or its bytes.

        Raises:
            InvalidOptionError: If it is no sound, empty, too long or wholly damaged.
            QuantLLMError: If the model cannot be loaded.
        """
        name = f"the file {blob.source}" if blob.source else "the blob"
        with _opened(blob, name) as file, open_sound(file, name, max_duration_s=self.max_duration_s) as sound:
            transcriber = self._new_transcriber()
            texts: list[Segment] = []
            with _Progress(sound, shown=self.progress) as progress:
                for piece, segments in self._transcribed(transcriber, cut(sound, SPEECH_RATE, WINDOW_S)):
                    texts += segments
                    if self.per == "segment":
                        groups = [[segment] for segment in texts]
                    else:
                        groups = [texts] if texts and self.per == "piece" else []
                    for group in groups:
                        yield self._document(group, blob, sound, transcriber.language)
                    if self.per != "file":
                        texts = []
                    progress.advance(piece.end_s)
            if texts:
                yield self._document(texts, blob, sound, transcriber.language)

    async def alazy_parse(self, blob: Blob) -> AsyncIterator[Document]:
        """Parse a sound as `lazy_parse` does, in a thread beside the event loop."""
        found = self.lazy_parse(blob)
        try:
            while (document := await run_aside(next, found, None)) is not None:
                yield document
        finally:
            await run_aside(_close, found)

    async def aparse(self, blob: Blob) -> list[Document]:
        """Parse a sound as `parse` does, in a thread beside the event loop."""
        return [document async for document in self.alazy_parse(blob)]

    def _new_transcriber(self) -> Transcriber:
        return Transcriber(require_pipeline(self._loaded()), self._options())

    def _transcribed(self, transcriber: Transcriber, pieces: Iterator[Piece]) -> Iterator[tuple[Piece, list[Segment]]]:
        """Write down pieces in batches; files that are parsed at the same time take turns."""
        model = self._loaded()
        lock: threading.Lock = model.remember(("speech", "lock"), threading.Lock)
        transcribe = in_clean_thread(transcriber.transcribe)
        while batch := list(islice(pieces, self.batch_size)):
            require_pipeline(model)  # it may have been unloaded meanwhile
            with lock:
                found = transcribe(batch)
            yield from zip(batch, found, strict=True)

    def _document(self, segments: Sequence[Segment], blob: Blob, sound: Sound, language: str | None) -> Document:
        metadata: dict[str, Any] = {
            **blob.metadata,
            "source": blob.source,
            "start_s": segments[0].start_s,
            "end_s": segments[-1].end_s,
            "duration_s": None if sound.duration_s is None else round(sound.duration_s, 2),
            "language": language,
            "model": self.model_id,
            "damaged_at_s": None if sound.damaged_at_s is None else round(sound.damaged_at_s, 2),
        }
        return Document(
            page_content="".join(segment.text for segment in segments).strip(),
            metadata={name: value for name, value in metadata.items() if value is not None},
        )

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

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Return the path by which `load` finds the class."""
        return ["langchain_quantllm", "speech"]

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """Serialize the fields."""
        serialized = super().to_json()
        kwargs = serialized.get("kwargs")
        if isinstance(kwargs, dict):
            config = kwargs.get("quantization_config")
            if config is not None and not isinstance(config, dict):
                kwargs["quantization_config"] = config.to_dict()
        return serialized


@contextlib.contextmanager
def _opened(blob: Blob, name: str) -> Iterator[BinaryIO]:
    """Open a blob's bytes: those in it, else those of its file."""
    if blob.data is None and blob.path is not None and not Path(blob.path).is_file():
        what = "is a folder" if Path(blob.path).is_dir() else "does not exist"
        msg = f"{name} {what}; give the path of a sound file on this machine, or its bytes with Blob.from_data."
        raise InvalidOptionError(msg)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(blob.as_bytes_io())
        except (OSError, NotImplementedError, ValueError) as error:
            msg = f"{name} cannot be read: {error}; give a file that may be read, or its bytes with Blob.from_data."
            raise InvalidOptionError(msg) from error
        yield file


def _close(found: Iterator[Document]) -> None:
    found.close()  # type: ignore[attr-defined]


class _Progress:
    """The progress bar of one sound, in seconds; none for a short one."""

    def __init__(self, sound: Sound, *, shown: bool) -> None:
        self._total_s = sound.duration_s
        self._is_shown = shown and (self._total_s is None or self._total_s >= _LONG_S)
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self._is_shown:
            from tqdm.auto import tqdm  # type: ignore[import-untyped]

            total = None if self._total_s is None else math.ceil(self._total_s)
            self._bar = tqdm(total=total, unit="s", desc="Transcribing")
        return self

    def advance(self, to_s: float) -> None:
        """Show that the sound is written down up to a second."""
        if self._bar is not None:
            self._bar.update(round(to_s) - self._bar.n)

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
