"""What every LangChain class over a quantized local model shares.

Owns the fields, their checks and aliases, loading on first use, the rule for defaults, and
the translation of this package's errors into LangChain's. Knows no prompt or message format:
the classes above bring those.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

from langchain_core.exceptions import ContextOverflowError, ModelTimeoutError
from langchain_core.language_models.base import BaseLanguageModel, LangSmithParams
from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field, PrivateAttr, SecretStr, ValidationError, model_validator
from typing_extensions import Self

from langchain_quantllm._version import __version__
from langchain_quantllm.compat.transformers_pipelines import options_of
from langchain_quantllm.data.counterparts import Kind, written
from langchain_quantllm.engine.request import Engine, EngineInfo, Request, TokenMask, plan_requests
from langchain_quantllm.engine.selection import ENGINES, Engines
from langchain_quantllm.engine.stream import ChunkStream
from langchain_quantllm.engine.worker import UNLOADED
from langchain_quantllm.errors import (
    GenerationError,
    GenerationTimeoutError,
    InvalidOptionError,
    PromptTooLongError,
    QuantLLMError,
    UnsupportedError,
)
from langchain_quantllm.loading.adapter_names import AdapterChoice
from langchain_quantllm.loading.checkpoint import LoadSpec, stored_quantization
from langchain_quantllm.loading.processors import process
from langchain_quantllm.loading.registry import LoadedModel, acquire, adopt, name_of
from langchain_quantllm.memory import MemoryReport, check_cache_budget
from langchain_quantllm.options import (
    BASE_ADAPTER,
    OWN,
    GenerationOptions,
    Place,
    normalize,
    option_names,
    resolve,
)
from langchain_quantllm.schemes import SCHEMES, Scheme, Unquantized, scheme_from, scheme_of_config


class PromptOverflowError(PromptTooLongError, ContextOverflowError):
    """The prompt leaves no room for a new token; LangChain's `ContextOverflowError`."""


class RequestTimeoutError(GenerationTimeoutError, ModelTimeoutError):
    """A call did not end within its `timeout`; LangChain's `ModelTimeoutError`."""


def as_langchain_error(error: QuantLLMError) -> QuantLLMError:
    """Give the error that is LangChain's too where LangChain has one for the case."""
    if isinstance(error, PromptTooLongError):
        return PromptOverflowError(str(error))
    if isinstance(error, GenerationTimeoutError):
        return RequestTimeoutError(str(error))
    return error


@contextlib.contextmanager
def langchain_errors() -> Iterator[None]:
    """Raise this package's errors as LangChain's too where it has such."""
    try:
        yield
    except QuantLLMError as error:
        translated = as_langchain_error(error)
        if translated is error:
            raise
        raise translated from error


@contextlib.contextmanager
def noting(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    """Give a context variable a value inside a block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


STREAMS: ContextVar[list[ChunkStream] | None] = ContextVar("quantllm_streams", default=None)
"""Where the streams of a batch are noted, so that whoever breaks it off can close them."""


_SPEC_NAMES = (
    "dtype",
    "device_map",
    "max_memory",
    "attn_implementation",
    "revision",
    "cache_dir",
    "trust_remote_code",
    "use_safetensors",
    "local_files_only",
)
_LOADING = ("quantization", "quantization_config", *_SPEC_NAMES, "token", "device", "model_kwargs")
"""Fields that say how to load, and so mean nothing beside `pipeline=`."""

_OPTION_FIELDS = tuple(
    name for name in OWN if name not in ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "min_length", "adapter")
)
_BITSANDBYTES = ("load_in_4bit", "load_in_8bit", "bnb_4bit_", "llm_int8_")
_MODEL_KWARGS_ALIASES = {"torch_dtype": "dtype", "use_auth_token": "token"}

_TASKS = ("text-generation", "image-text-to-text")
"""Tasks of the pipelines that can be used."""

_instances: weakref.WeakValueDictionary[int, QuantizedModel] = weakref.WeakValueDictionary()


class QuantizedModel(BaseLanguageModel[Any]):
    """Fields and behaviour of a quantized local model, whichever way LangChain calls it."""

    model_config = ConfigDict(
        extra="forbid",
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        populate_by_name=True,
        hide_input_in_errors=True,  # the token may be among it
    )

    model_id: str = ""
    """A folder, or the name of a repository on the Hugging Face Hub."""
    quantization: Any = None
    """A name of `SCHEMES`, a scheme such as `NF4(double_quantization=True)`, or None: the checkpoint as it is."""
    quantization_config: Any = None
    """A transformers quantization config, such as `BitsAndBytesConfig(load_in_8bit=True)`, in place of "
    "`quantization`."""
    dtype: str = "auto"
    """Dtype of what is not quantized: `"auto"` (the checkpoint's), `"float16"`, `"bfloat16"` or `"float32"`."""
    device: int | str | None = None
    """One device for the whole model: `"cpu"`, `"cuda:1"`, or HuggingFacePipeline's number, where -1 is the CPU."""
    device_map: Any = None
    """Where the parts of the model go, as transformers takes it; None is the first GPU, else the CPU."""
    max_memory: Any = None
    """Most memory for each device, such as `{0: "10GiB", "cpu": "30GiB"}`."""
    attn_implementation: str | None = None
    """`"sdpa"` (what transformers chooses), `"flash_attention_2"` where installed, `"eager"`, `"flex_attention"`."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    token: SecretStr | None = None
    """Access token of the Hub; where not given, the Hub's own login and `HF_TOKEN` count."""
    cache_dir: str | None = None
    """Folder in which files of the Hub are kept."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""
    use_safetensors: bool = True
    """Refuse weights in pickle files, which can run code while they load."""
    local_files_only: bool | None = None
    """True never asks the Hub, False always does; None asks it only for files that are not here."""
    progress: bool = True
    """Show how far loading is."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of transformers' `from_pretrained`."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """Adapters of peft that calls can name, each a folder or a repository on the Hub, by its name."""
    adapter: str | None = None
    """The adapter of calls that name none: a name of `adapters`, `"base"` or None for the model without any, or the
    folder or repository of one more."""
    own_pipeline: Any = Field(default=None, alias="pipeline", repr=False)
    """Given as `pipeline=`: a transformers pipeline of your own, for text-generation or image-text-to-text."""
    batch_size: int | None = Field(default=None, ge=1)
    """Most rows that run beside each other; None leaves it to the engine."""
    engine: str = "auto"
    """What runs the model: `"fast"`, one running batch for all callers; `"pipeline"`, transformers' own `generate`;
    or `"auto"`, the first where it can drive the model and the options of the call, else the second."""
    kv_cache_memory: Any = None
    """Memory of the fast engine's KV cache: a fraction of what is free, bytes, or a text such as `"4GiB"`. None takes
    0.3 of it at most. Who calls the model first decides."""
    fuse: bool = True
    """Let the fast engine run quantized products, norms, gates and rotary positions by its own kernels on a CUDA GPU,
    and 4-bit products of one input by one call on a CPU, where that gives what the model's modules give. Who calls the
    model first decides."""
    prefix_caching: bool = True
    """Let prompts that begin like others take over what was computed for these."""

    max_new_tokens: int | None = None
    """Most tokens of a completion; 256 where neither this nor the checkpoint says."""
    max_length: int | None = None
    """Most tokens of prompt and completion together."""
    min_new_tokens: int | None = None
    """No end of text before so many tokens."""
    do_sample: bool | None = None
    """Draw tokens by their probability; None samples where a temperature or another sampling option is given."""
    temperature: float | None = None
    """Above 1 flattens, below 1 sharpens the probabilities; 0 is greedy."""
    top_k: int | None = None
    """Draw from this many likeliest tokens; 0 from all."""
    top_p: float | None = None
    """Draw from the likeliest tokens that have this probability together."""
    min_p: float | None = None
    """Draw from tokens of at least this probability, as a fraction of the likeliest one's."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that were seen less likely."""
    seed: int | None = None
    """Makes sampling repeatable, whatever else runs beside it; None draws a new one for each call."""
    n: int | None = None
    """Completions for each prompt."""
    stop: list[str] | None = None
    """Strings that end the text; they are not part of it."""
    ignore_eos: bool | None = None
    """Never end before `max_new_tokens`; for measuring."""
    logprobs: bool | int | None = None
    """Report the log probability of each token, and of this many alternatives."""
    truncation: bool | str | None = None
    """Cut prompts that are too long: at the tokenizer's side (True), `"left"` or `"right"`; False raises."""
    return_full_text: bool | None = None
    """Put the prompt before the completion."""
    add_special_tokens: bool | None = None
    """Let the tokenizer add its begin token; one that the prompt has already is not doubled."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text (the default)."""
    eos_token_id: int | list[int] | None = None
    """Tokens that end the text, in place of the checkpoint's."""
    timeout: float | None = None
    """Seconds after which a call is given up with `ModelTimeoutError`."""
    generation_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Other fields of transformers' GenerationConfig; they may be given to the class by name as well."""

    _model: LoadedModel | None = PrivateAttr(default=None)
    _kind: ClassVar[Kind] = "llm"
    _call_options: ClassVar[tuple[str, ...]] = ()
    """Options of a call beside those of generating."""

    # Construction.

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check every field; weights are loaded on first use.

        Raises:
            InvalidOptionError: If a field is unknown, has a value that is not allowed, or contradicts another.
            UnsupportedError: If the device is not there.
        """
        try:
            super().__init__(*args, **kwargs)
        except ValidationError as error:
            causes = [e.get("ctx", {}).get("error") for e in error.errors(include_url=False)]
            own = next((cause for cause in causes if isinstance(cause, QuantLLMError)), None)
            raise (own or _invalid_field(error)) from None  # the sentence itself, without pydantic's frame around it

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, values: Any) -> Any:
        """Bring every known spelling to the fields, and name the nearest for an unknown one."""
        if not isinstance(values, dict):
            return values
        aliases = {*cls._names(), "model", "model_name"} - cls.model_fields.keys()
        values = {k: v for k, v in values.items() if v is not None or k not in aliases}
        for name in ("model", "model_name"):
            if name in values:
                alias = values.pop(name)
                if values.setdefault("model_id", alias) != alias:
                    msg = f"model_id={values['model_id']!r} and {name}={alias!r} say two things; give one of them."
                    raise InvalidOptionError(msg)
        for name in ("model_kwargs", "generation_kwargs", "pipeline_kwargs"):
            if not isinstance(given := values.get(name) or {}, Mapping):
                msg = f"{name}={given!r} is no dict; give names with values, such as {{'max_new_tokens': 64}}."
                raise InvalidOptionError(msg)
        options = _lift_model_kwargs(values)
        for name in ("generation_kwargs", "pipeline_kwargs"):
            options.update(values.pop(name, None) or {})
        batch_size = options.pop("batch_size", None)
        if values.get("batch_size") is None:
            values["batch_size"] = batch_size
        if (adapter := options.pop("adapter", None)) is not None and values.get("adapter") is None:
            values["adapter"] = adapter
        known = cls._names()
        options.update({n: values.pop(n) for n in list(values) if n not in known or n in _OPTION_FIELDS})
        checked = normalize(options, place=cls._place(at_call=False))
        values.update({k: list(v) if isinstance(v, tuple) else v for k, v in checked.items() if k in _OPTION_FIELDS})
        values["generation_kwargs"] = {k: v for k, v in checked.items() if k not in _OPTION_FIELDS}
        return values

    @classmethod
    def _names(cls) -> frozenset[str]:
        """List the names that the class takes for its fields."""
        return frozenset({*cls.model_fields, *(f.alias for f in cls.model_fields.values() if f.alias)})

    @classmethod
    def _place(cls, *, at_call: bool) -> Place:
        """Say where options are given, for the words of an error."""
        calls = frozenset({*option_names(), *cls._call_options})
        return Place(kind=cls._kind, owner=cls.__name__, fields=cls._names(), calls=calls, at_call=at_call)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.quantization is not None:
            scheme = scheme_from(self.quantization)
            names = [name for name, known in SCHEMES.items() if known == scheme]
            self.quantization = names[0] if names else scheme and scheme.to_dict()
        if self.own_pipeline is not None:
            self._check_pipeline()
        elif not self.model_id:
            msg = (
                "give model_id=, a folder or a repository's name such as 'HuggingFaceTB/SmolLM2-135M-Instruct', or "
                "pipeline=."
            )
            raise InvalidOptionError(msg)
        if self.device is not None and self.device_map is not None:
            msg = (
                f"device={self.device!r} and device_map={self.device_map!r} say the same thing twice; give one of them."
            )
            raise InvalidOptionError(msg)
        if self.engine not in ENGINES:
            msg = f"engine={self.engine!r} is not allowed; it must be one of {', '.join(map(repr, ENGINES))}."
            raise InvalidOptionError(msg)
        check_cache_budget(self.kv_cache_memory)
        self._spec()
        resolve([self._field_options()], {})
        _instances[id(self)] = self
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; one that says what to load makes the next call load that."""
        super().__setattr__(name, value)
        self._forget([name])

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy; as with setting a field, a copy that is to load something else does so at its next call."""
        copied = super().model_copy(update=update, deep=deep)
        copied._forget(update or ())
        return copied

    def _forget(self, changed: Iterable[str]) -> None:
        """Let go of what was made of fields as they were before some of them changed."""
        self.__dict__.pop("_serialized", None)  # which langchain-core keeps
        if not {"adapters", "adapter"}.isdisjoint(changed) and self._model is not None:
            with contextlib.suppress(InvalidOptionError):  # which the next call raises
                if not self._adapter_choice().sources.items() <= self._model.adapters.items():
                    self._model = None
        if not {"model_id", "own_pipeline", *_LOADING}.isdisjoint(changed):
            self._model = None

    @model_validator(mode="after")
    def _set_langchain_quantllm_version(self) -> Self:
        self._add_version("langchain-quantllm", __version__)
        return self

    def _check_pipeline(self) -> None:
        pipe = self.own_pipeline
        if getattr(pipe, "task", None) not in _TASKS or getattr(pipe, "tokenizer", None) is None:
            msg = (
                f"pipeline={type(pipe).__name__} cannot be used; give transformers.pipeline('text-generation', "
                "model=..., tokenizer=...), or pipeline('image-text-to-text', model=..., processor=...)."
            )
            raise InvalidOptionError(msg)
        # Whoever copies an instance hands every field on, the defaults too, so only other values count.
        given = [
            n for n in _LOADING if getattr(self, n) != type(self).model_fields[n].get_default(call_default_factory=True)
        ]
        if given:
            msg = (
                f"{given[0]}={getattr(self, given[0])!r} has no effect on a pipeline that is already loaded; leave it "
                "out."
            )
            raise InvalidOptionError(msg)
        if self.adapters or self.adapter is not None:
            msg = (
                "adapters are not loaded onto a pipeline of your own, which stays as it is; load them with peft, "
                "pipeline.model.load_adapter(folder, adapter_name=...), and choose with "
                "peft.functional.set_adapter(pipeline.model, name)."
            )
            raise InvalidOptionError(msg)
        self.model_id = self.model_id or pipe.model.name_or_path or name_of(pipe)

    def _adapter_choice(self) -> AdapterChoice:
        return AdapterChoice.of(self.adapters, self.adapter)

    def _spec(self) -> LoadSpec:
        choice = self._adapter_choice()
        return LoadSpec(
            model_id=self.model_id,
            scheme=scheme_from(self.quantization),
            quantization_config=self.quantization_config,
            token=self.token.get_secret_value() if self.token else None,
            progress=self.progress,
            model_kwargs=self.model_kwargs,
            adapters=choice.sources,
            adapter=choice.default,
            **{name: getattr(self, name) for name in _SPEC_NAMES if name != "device_map"},
            device_map=self.device_map if self.device is None else {"": _device_name(self.device)},
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
        """Stop what runs and give the memory back; the next call loads again.

        Instances that share the model lose it too and load it again when they are called. A
        pipeline of your own stays yours: only the engine over it ends.
        """
        model, self._model = self._model, None
        if model is not None:
            model.close()

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._model is not None and not self._model.closed

    def _loaded(self) -> LoadedModel:
        model = self._model
        if model is None or model.closed:
            if self.own_pipeline is not None:
                model = adopt(self.own_pipeline)
            else:
                spec = self._spec()
                model = acquire(spec)
                self._share(spec.key(), model)
            self._model = model
        return model

    async def _aplan(self, plan: Callable[..., Any], *call: Any, is_long: bool = False) -> Any:
        """Make the plan of a call, beside the event loop where that takes long.

        Args:
            plan: Makes it, with the weights and the engine where these are not there yet.
            *call: What it is called with.
            is_long: Whether it takes long anyway.
        """
        if is_long or not self.is_loaded or self._loaded().engines is None:
            return await run_in_executor(None, plan, *call)
        return plan(*call)

    def _share(self, key: str, model: LoadedModel) -> None:
        """Let every instance with the same settings hold the model, called already or not.

        `configurable_fields` makes an instance for each call: were these the only ones to hold the
        weights, each call would read them anew.
        """
        for other in list(_instances.values()):
            waits = other.own_pipeline is None and (other._model is None or other._model.closed)
            if waits and other is not self and other._spec().key() == key:
                other._model = model

    @property
    def pipeline(self) -> Any:
        """The transformers pipeline that holds the weights; loads them if they are not loaded."""
        return self._loaded_pipeline()

    def _loaded_pipeline(self) -> Any:
        return _open(self._loaded())

    def _engine(self, options: GenerationOptions | None = None, *, has_media: bool = False) -> Engine:
        """Give the engine for a call's options; None asks for the one of ordinary calls."""
        model = self._loaded()
        with model.lock:
            if model.engines is None:
                model.engines = Engines(_open(model), list(model.adapters))
            engine: Engine = model.engines.choose(
                self.engine, self.kv_cache_memory, options, has_media=has_media, fuse=self.fuse
            )
        return engine

    @property
    def engine_info(self) -> EngineInfo:
        """Which engine runs calls with the options of this object, and why; loads the model if it is not loaded."""
        return self._engine(self._options(None, {})).info

    def memory_report(self) -> MemoryReport:
        """Report the memory before and after loading, and while generating; loads the model if it is not loaded.

        Returns:
            A report that prints as a table, shows with bars in Jupyter, draws them by `.plot()`, and gives a dict by
            `to_dict()`.
        """
        return self._loaded().memory_report(self.model_id)

    @property
    def scheme(self) -> Scheme:
        """How the weights are, or will be, held in memory."""
        if self._model is not None:
            return self._model.scheme
        if self.own_pipeline is not None:
            return adopt(self.own_pipeline).scheme
        config = self.quantization_config or stored_quantization(self.model_id)
        if config is not None:
            return scheme_of_config(config if isinstance(config, Mapping) else config.to_dict())
        return scheme_from(self.quantization) or Unquantized()

    # Requests.

    def _field_options(self) -> dict[str, Any]:
        return normalize({**{name: getattr(self, name) for name in _OPTION_FIELDS}, **self.generation_kwargs})

    def _options(self, stop: Sequence[str] | None, call: Mapping[str, Any]) -> GenerationOptions:
        """Resolve a call's options: the call's value, the field's, the checkpoint's, the default."""
        given = normalize({**call, "stop": stop} if stop is not None else call, place=self._place(at_call=True))
        asked = given.pop("adapter", None)
        adapter = self._adapter_choice().choose(asked)  # before any weight is read
        model = self._loaded()
        if adapter is None and model.adapters:  # those of fields that were set anew since
            adapter = BASE_ADAPTER
        elif adapter is None and asked is not None and getattr(_open(model).model, "peft_config", None):
            msg = (
                f"adapter={asked!r} chooses among the adapters that this object has loaded, and those of this model "
                "were put there by hand; switch them with peft: llm.pipeline.model.disable_adapters()."
            )
            raise InvalidOptionError(msg)
        options = resolve([given, self._field_options()], _checkpoint_options(_open(model)))
        return dataclasses.replace(options, adapter=adapter)

    def _requests(
        self,
        prompt: str,
        options: GenerationOptions,
        mask: Callable[[], TokenMask] | None = None,
        images: Sequence[Any] = (),
    ) -> list[Request]:
        """Make the requests of one prompt, with the images for its placeholders: one for each of the `n` samples."""
        tokenizer = self._loaded_pipeline().tokenizer
        ids, media = self._process(prompt, images, add_special_tokens=options.add_special_tokens)
        return plan_requests(
            ids,
            options,
            self._engine(options, has_media=media is not None).limits,
            truncation_side=tokenizer.truncation_side,
            stop_token_ids=_special_ids(tokenizer, options.stop),
            max_rows=self.batch_size,
            shares_prefix=self.prefix_caching,
            mask=mask,
            media=media,
        )

    def _submit(
        self, requests: Sequence[Request], options: GenerationOptions, *, in_pieces: bool = True
    ) -> ChunkStream:
        has_media = any(request.media is not None for request in requests)
        stream = self._engine(options, has_media=has_media).submit(requests, options.timeout, in_pieces=in_pieces)
        if (noted := STREAMS.get()) is not None:
            noted.append(stream)
        return stream

    def _encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        model = self._loaded()
        tokenizer = _open(model).tokenizer
        with model.lock:  # a tokenizer is not safe to use from two threads while its settings change
            ids = list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
        bos = tokenizer.bos_token_id
        if add_special_tokens and bos is not None and ids[:2] == [bos, bos]:
            del ids[0]  # the prompt, made by a chat template perhaps, has its begin token already
        return ids

    def _process(
        self, prompt: str, images: Sequence[Any], *, add_special_tokens: bool
    ) -> tuple[list[int], dict[str, Any] | None]:
        """Turn a prompt into token ids, and its images into what else the model is given; None without any."""
        if not images:
            return self._encode(prompt, add_special_tokens=add_special_tokens), None
        model = self._loaded()
        with model.lock:  # as in _encode: the processor uses the same tokenizer
            return process(_open(model).processor, prompt, images, add_special_tokens=add_special_tokens)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the model's own token ids of a text, without special tokens; loads the model if needed."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._encode(text, add_special_tokens=False)

    # LangChain's conventions.

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """All that changes the output, for the cache and for traces."""
        config = self.quantization_config
        params = {
            "model_id": self.model_id,
            "quantization": self.quantization,
            "quantization_config": config if config is None or isinstance(config, dict) else config.to_dict(),
            **{name: getattr(self, name) for name in _SPEC_NAMES if name not in ("local_files_only", "cache_dir")},
            "model_kwargs": self.model_kwargs or None,
            **{name: getattr(self, name) for name in _OPTION_FIELDS if name != "timeout"},
            **self.generation_kwargs,
            "adapters": self.adapters or None,
            "adapter": self.adapter,
        }
        if self.own_pipeline is not None:  # whose weights and options this class knows nothing of
            params |= {"pipeline": name_of(self.own_pipeline), "of_pipeline": _checkpoint_options(self.own_pipeline)}
        return {name: value for name, value in params.items() if value is not None}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        """Give the standard parameters for tracing."""
        params = LangSmithParams(ls_provider="quantllm", ls_model_name=str(kwargs.get("model") or self.model_id))
        given = normalize(kwargs, lenient=True)
        temperature = given.get("temperature", self.temperature)
        if temperature is not None:
            params["ls_temperature"] = temperature
        max_tokens = given.get("max_new_tokens", self.max_new_tokens)
        if max_tokens is not None:
            params["ls_max_tokens"] = max_tokens
        if stops := stop or given.get("stop") or self.stop:
            params["ls_stop"] = list(stops)
        if self._model is not None:  # a line in the metadata of every run
            params["memory"] = self._model.summary  # type: ignore[typeddict-unknown-key]
        return params

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Name the environment variable that a secret field is loaded from."""
        return {"token": "HF_TOKEN"}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Say that `dumpd` and `load` work on this class."""
        return True

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """Serialize the settings; an instance over a pipeline of your own has none that would do."""
        if self.own_pipeline is not None:
            return self.to_json_not_implemented()
        serialized = super().to_json()
        kwargs = serialized.get("kwargs")
        if isinstance(kwargs, dict):
            config = kwargs.get("quantization_config")
            if config is not None and not isinstance(config, dict):
                kwargs["quantization_config"] = config.to_dict()
        return serialized

    def __getstate__(self) -> dict[Any, Any]:
        """Give the settings, without the weights.

        Raises:
            TypeError: If the instance stands over a pipeline of your own.
        """
        if self.own_pipeline is not None:
            msg = (
                "an LLM over a pipeline= of your own cannot be pickled: its weights are not this object's to copy; "
                "use model_id=."
            )
            raise TypeError(msg)
        state = super().__getstate__()
        private = {**(state["__pydantic_private__"] or {}), "_model": None}
        return {**state, "__pydantic_private__": private}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the settings; the copy finds the loaded weights through the registry."""
        import copy

        state = copy.deepcopy(self.__getstate__(), memo)
        twin = type(self).__new__(type(self))
        twin.__setstate__(state)
        return twin


def _open(model: LoadedModel) -> Any:
    """Give the pipeline of a loaded model, which another thread may have unloaded meanwhile."""
    pipeline = model.pipeline
    if pipeline is None:
        raise GenerationError(UNLOADED)
    return pipeline


def _lift_model_kwargs(values: dict[str, Any]) -> dict[str, Any]:
    """Move what `model_kwargs` says about fields of ours to these fields.

    Returns:
        The generation options that were among them, as many a tutorial puts them there.
    """
    rest: dict[str, Any] = {}
    options: dict[str, Any] = {}
    model_kwargs = dict(values.get("model_kwargs") or {})
    if (scheme := _bitsandbytes_of(model_kwargs)) is not None:
        if scheme_from(other := model_kwargs.get("quantization")) not in (None, scheme):
            msg = (
                f"model_kwargs asks for quantization={other!r} and, by names of bitsandbytes, for {scheme!r}; give one."
            )
            raise InvalidOptionError(msg)
        if scheme_from(values.get("quantization")) == scheme:
            values["quantization"] = scheme
        model_kwargs["quantization"] = scheme
    for name, value in model_kwargs.items():
        field = _MODEL_KWARGS_ALIASES.get(name, name)
        if field in (*_SPEC_NAMES, "token", "quantization", "quantization_config"):
            if value is not None and values.get(field) not in (None, value):
                both = "" if field == "token" else f", as {values[field]!r} and as {value!r}"
                msg = f"{name} is given twice, as a field and in model_kwargs{both}; give it once."
                raise InvalidOptionError(msg)
            if value is not None:
                values[field] = value
        elif name in option_names() and name != "use_cache":  # which is a config's field too
            options[name] = value
        elif name != "low_cpu_mem_usage":  # what transformers 5 always does
            rest[name] = value
    values["model_kwargs"] = rest
    if isinstance(limits := values.get("max_memory"), Mapping):  # JSON turns device numbers into texts
        values["max_memory"] = {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in limits.items()}
    for name in ("dtype", "cache_dir"):
        if values.get(name) is not None:
            value = values[name]
            values[name] = os.fspath(value) if isinstance(value, os.PathLike) else str(value).removeprefix("torch.")
        else:
            values.pop(name, None)
    for name in ("model_id", "adapter"):
        if isinstance(values.get(name), os.PathLike):
            values[name] = os.fspath(values[name])
    if isinstance(given := values.get("adapters"), Mapping):
        values["adapters"] = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in given.items()}
    elif given is None:
        values.pop("adapters", None)
    return options


def _bitsandbytes_of(model_kwargs: dict[str, Any]) -> Scheme | None:
    """Take the options of bitsandbytes out of `model_kwargs`, as older transformers took them there.

    Returns:
        The scheme that `BitsAndBytesConfig` means by them; None where there are none, or they ask for none.
    """
    given = {name: model_kwargs.pop(name) for name in list(model_kwargs) if name.startswith(_BITSANDBYTES)}
    if given.get("load_in_4bit") or given.get("load_in_8bit"):
        return scheme_of_config(given)
    if name := next((name for name in given if not name.startswith("load_in_")), None):
        normalize({name: given[name]}, place=Place(at_call=False))  # raises, with what to write
    return None


def _invalid_field(error: ValidationError) -> InvalidOptionError:
    """Say in one sentence what pydantic found."""
    found = error.errors(include_url=False)[0]
    words = str(found["msg"]).replace("Input should", "it must")
    # Of the fields together, the input is all that was given, secrets too.
    what = written(str(found["loc"][0]), found["input"]) if found["loc"] else "what was given"
    return InvalidOptionError(f"{what} is not allowed; {words[:1].lower()}{words[1:]}.")


def _device_name(device: int | str) -> str:
    """Turn HuggingFacePipeline's device numbers into names."""
    if isinstance(device, str):
        return device
    if device < 0:
        return "cpu"
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        msg = f"device={device} asks for an accelerator and this machine has none; use device=-1 or 'cpu'."
        raise UnsupportedError(msg)
    count = torch.accelerator.device_count()
    if device >= count:
        msg = f"device={device} does not exist; this machine has {count}, numbered from 0."
        raise UnsupportedError(msg)
    return f"{accelerator.type}:{device}"


def _checkpoint_options(pipeline: Any) -> dict[str, Any]:
    """Read the options that came with the checkpoint or were given to the pipeline when it was made.

    The pipeline's own defaults (sampling at 0.7) are none of them.
    """
    given = options_of(pipeline)
    stored = pipeline.model.generation_config.to_diff_dict()
    stored.pop("eos_token_id", None)  # the engine reads it itself
    stored.pop("use_cache", None)  # often False, left over from training
    options = normalize({**stored, **given}, lenient=True)
    options.pop("adapter", None)  # no option of transformers
    return options


def _special_ids(tokenizer: Any, stop: Sequence[str]) -> tuple[int, ...]:
    """Find the stop strings that are one special token each: these never appear as text."""
    added: Callable[[], dict[str, int]] = tokenizer.get_added_vocab
    vocabulary = added() if stop else {}
    return tuple(vocabulary[s] for s in stop if s in vocabulary)
