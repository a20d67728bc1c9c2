"""The fields of the LangChain classes: their checks, the model that is loaded for them, and their serialization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from langchain_core.language_models.base import BaseLanguageModel
from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented
from pydantic import ConfigDict, Field, SecretStr, ValidationError, model_validator
from typing_extensions import Self

from langchain_quantllm._version import __version__
from langchain_quantllm.base.draft import check_draft
from langchain_quantllm.data.counterparts import Kind, written
from langchain_quantllm.engine.external.spec import KINDS, ExternalEngine, external_engine
from langchain_quantllm.engine.selection import ENGINES
from langchain_quantllm.errors import InvalidOptionError, QuantLLMError
from langchain_quantllm.loading.arguments import (
    ENGINE_FIELDS,
    LOADING_FIELDS,
    SPEC_FIELDS,
    check_pipeline,
    device_name,
    translate,
)
from langchain_quantllm.loading.inputs import stored_options
from langchain_quantllm.loading.parts import ModelParts
from langchain_quantllm.loading.registry import pipeline_name
from langchain_quantllm.loading.spec import AdapterChoice, LoadSpec
from langchain_quantllm.memory import check_cache_budget, check_cache_dtype
from langchain_quantllm.options import OPTION_NAMES, OPTIONS, Place, normalize, resolve
from langchain_quantllm.schemes import SCHEMES, scheme_from


class ModelFields(BaseLanguageModel[Any]):
    """The fields of a quantized local model."""

    model_config = ConfigDict(
        extra="forbid",
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        populate_by_name=True,
        hide_input_in_errors=True,  # the token may be in it
    )

    model_id: str = ""
    """A folder, or the name of a repository on the Hugging Face Hub."""
    quantization: Any = None
    """The scheme of the weights: a name of `SCHEMES` such as `"nf4"`, a value such as `NF4(double_quantization=True)`,
    or None for the checkpoint as it is."""
    quantization_config: Any = None
    """A transformers quantization config, such as `BitsAndBytesConfig(load_in_8bit=True)`, instead of
    `quantization`."""
    dtype: str = "auto"
    """Dtype of the unquantized weights: `"auto"` (the checkpoint's), `"float16"`, `"bfloat16"` or `"float32"`."""
    device: int | str | None = None
    """One device for the whole model: `"cpu"`, `"cuda:1"`, or a number as in HuggingFacePipeline, where -1 is the
    CPU."""
    device_map: Any = None
    """The device of each part of the model, as transformers takes it; None is the first GPU, or the CPU if there is
    none."""
    max_memory: Any = None
    """Maximum memory of each device, such as `{0: "10GiB", "cpu": "30GiB"}`."""
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
    """Show the progress of loading."""
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of transformers' `from_pretrained`."""
    lm_head_dtype: Any = "auto"
    """Dtype of the output head, which the schemes leave alone: `"auto"` is that of the model, `"int8"` has 8 bits and a
    scale for each row. In a small model with a large vocabulary, the head is much of what each token reads."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """LoRA adapters of peft that calls can choose: names, each with a folder or a repository on the Hub."""
    adapter: str | None = None
    """The adapter of calls that name none: a name of `adapters`, the folder or repository of one more, or `"base"` or
    None for the model without any."""
    own_pipeline: Any = Field(default=None, alias="pipeline", repr=False)
    """A transformers pipeline of your own, for text-generation or image-text-to-text; its argument is `pipeline=`."""
    batch_size: int | None = Field(default=None, ge=1)
    """Maximum number of this object's sequences that run at once; None leaves it to the engine."""
    max_waiting: int | None = Field(default=None, ge=1)
    """Refuse a call with a `QueueFullError` if so many requests, of any object, wait for the model; None never does."""
    engine: Any = "auto"
    """The engine: `"fast"` runs the calls of all threads in one batch, `"pipeline"` uses transformers' `generate`, and
    `"auto"` takes the first if it supports the model and the options of the call, else the second. `Server(...)` and
    `VLLM(...)` are engines of others: no weights are loaded here."""
    kv_cache_memory: Any = None
    """Memory of the fast engine's KV cache: a fraction of the free memory, a number of bytes, or a text such as
    `"4GiB"`. None takes at most 0.3 of the free memory. The first call of a loaded model sets it."""
    kv_cache_dtype: Any = "auto"
    """Dtype of the fast engine's KV cache: `"auto"` is that of the model; `"fp8"` and `"int8"` hold twice the tokens in
    the same memory, in 8 bits with a scale for each token and head. Objects of another dtype over the same weights have
    a KV cache of their own."""
    fuse: bool = True
    """Let the fast engine use kernels of this package: on a CUDA GPU for quantized linear layers, norms, gated
    activations and rotary embeddings, on a CPU for 4-bit linear layers of one input. They are used only if they give
    the results of the model's own modules. The first call of a loaded model sets it."""
    prefix_caching: bool = True
    """Reuse the KV cache of prompts that begin alike."""
    draft_model: Any = None
    """A small model of the same vocabulary that proposes tokens, which the fast engine verifies several at once, with
    the same text as without: a folder or repository, or a `QuantizedHuggingFaceLLM`."""
    draft_quantization: Any = None
    """The scheme of a draft model that is given as a folder or repository; see `quantization`."""
    batch_invariant: bool = False
    """Give a call the same text, bit for bit, whatever runs beside it. It takes a fast engine of its own over the same
    weights, with a KV cache of its own, which is slower."""

    max_new_tokens: int | None = None
    """Maximum number of new tokens; 256 if neither this nor the checkpoint sets it."""
    max_length: int | None = None
    """Maximum number of tokens of prompt and completion together."""
    min_new_tokens: int | None = None
    """Minimum number of new tokens before the text may end."""
    do_sample: bool | None = None
    """Sample tokens by their probability; None samples if a temperature or another sampling option is set."""
    temperature: float | None = None
    """Above 1 flattens the probabilities, below 1 sharpens them; 0 is greedy decoding."""
    top_k: int | None = None
    """Sample from this many of the most likely tokens; 0 keeps all."""
    top_p: float | None = None
    """Sample from the most likely tokens whose probabilities sum up to this."""
    min_p: float | None = None
    """Sample from tokens of at least this fraction of the most likely token's probability."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens less likely that are in the prompt or the text already."""
    priority: int | None = None
    """Calls of a lower number go first, before those of other objects over the same weights too; 0 if not set."""
    cache_salt: str | None = None
    """Calls share the KV cache of a common beginning only with calls of the same salt, such as the id of a tenant."""
    speculation: str | None = None
    """Let the fast engine write several tokens a step where it can guess them, with the same text: `"draft"` guesses by
    the draft model as well, which is what it does if one is given, `"ngram"` from the prompt and the text so far,
    `"forced"`, if not set, only what a constraint leaves no choice in, and `"off"` nothing."""
    seed: int | None = None
    """Makes sampling repeatable, whatever else is in the batch; None takes a new seed for each call."""
    n: int | None = None
    """Number of completions for each prompt."""
    stop: list[str] | None = None
    """Strings that end the text; they are not part of it."""
    ignore_eos: bool | None = None
    """Continue to `max_new_tokens` even after an end-of-text token; for measurements."""
    logprobs: bool | int | None = None
    """Report the log probability of each token; a number reports as many alternatives too."""
    truncation: bool | str | None = None
    """Cut prompts that are too long, on the `"left"`, the `"right"` or the tokenizer's own side (True); False raises
    an error."""
    return_full_text: bool | None = None
    """Put the prompt before the completion."""
    add_special_tokens: bool | None = None
    """Let the tokenizer add its begin token, unless the prompt has it already."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text (the default)."""
    eos_token_id: int | list[int] | None = None
    """Tokens that end the text, instead of the checkpoint's."""
    timeout: float | None = None
    """Seconds after which a call raises `ModelTimeoutError`."""
    generation_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Other fields of transformers' GenerationConfig; the class takes them by name as well."""

    _kind: ClassVar[Kind] = "llm"
    _call_options: ClassVar[tuple[str, ...]] = ()
    """Names of a call's options that are no generation options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check every field; weights are loaded on first use.

        Raises:
            InvalidOptionError: If a field is unknown, has a value that is not allowed, or contradicts another.
            UnsupportedError: If the device does not exist.
        """
        try:
            super().__init__(*args, **kwargs)
        except ValidationError as error:
            raise own_error(error) from None  # the sentence itself, without pydantic's frame around it

    @classmethod
    def _names(cls) -> frozenset[str]:
        """Return the names of the constructor's arguments."""
        return frozenset({*cls.model_fields, *(f.alias for f in cls.model_fields.values() if f.alias)})

    @classmethod
    def _place(cls, *, at_call: bool) -> Place:
        """Return the place of options, for the words of an error."""
        calls = frozenset({*OPTION_NAMES, *cls._call_options})
        return Place(kind=cls._kind, owner=cls.__name__, fields=cls._names(), calls=calls, at_call=at_call)

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, values: Any) -> Any:
        return translate(values, OPTION_FIELDS, cls._place(at_call=False)) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("quantization", "draft_quantization"):
            if (given := getattr(self, name)) is not None:
                scheme = scheme_from(given)
                names = [known_name for known_name, known in SCHEMES.items() if known == scheme]
                setattr(self, name, names[0] if names else scheme and scheme.to_dict())
        if (pipe := self.own_pipeline) is not None:
            given = {name: value for name, value in self._given_fields().items() if name in LOADING_FIELDS}
            check_pipeline(pipe, given, has_adapters=bool(self.adapters or self.adapter is not None))
            self.model_id = self.model_id or pipe.model.name_or_path or pipeline_name(pipe)
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
        external = self._external()
        if external is not None:
            if self.engine is not external:
                self.engine = external
            external.check(self._given_fields())
            external.check_options(resolve([self._field_options()], {}))
        if self.batch_invariant and self.engine == "pipeline":
            msg = (
                "engine='pipeline' cannot carry out batch_invariant=True, as generate's results depend on the batch; "
                "use engine='fast' or 'auto'."
            )
            raise InvalidOptionError(msg)
        check_cache_budget(self.kv_cache_memory)
        if check_cache_dtype(self.kv_cache_dtype) != "auto" and self.engine == "pipeline":
            msg = (
                f"engine='pipeline' cannot carry out kv_cache_dtype={self.kv_cache_dtype!r}, as generate's cache has "
                "the dtype of the model; use engine='fast' or 'auto', or kv_cache_dtype='auto'."
            )
            raise InvalidOptionError(msg)
        check_draft(self)
        self._spec()
        resolve([self._field_options()], {})
        return self

    @model_validator(mode="after")
    def _set_langchain_quantllm_version(self) -> Self:
        self._add_version("langchain-quantllm", __version__)
        return self

    def _external(self) -> ExternalEngine | None:
        """Return the engine of others that the field names; None for one of this package.

        Raises:
            InvalidOptionError: If the field has a value that is not allowed.
        """
        external = external_engine(self.engine)
        if external is None and self.engine not in ENGINES:
            allowed = ", ".join(map(repr, (*ENGINES, *KINDS)))
            msg = (
                f"engine={self.engine!r} is not allowed; it must be one of {allowed}, or an engine such as Server(...)."
            )
            raise InvalidOptionError(msg)
        return external

    def _given_fields(self) -> dict[str, Any]:
        """Return the fields about loading and the engine that differ from their defaults.

        A copy hands on every field of its original, the defaults too, so only other values count.
        """
        names = (*LOADING_FIELDS, *ENGINE_FIELDS)
        defaults = {n: type(self).model_fields[n].get_default(call_default_factory=True) for n in names}
        given = {n: getattr(self, n) for n in names if getattr(self, n) != defaults[n]}
        return given if self.own_pipeline is None else {**given, "pipeline": self.own_pipeline}

    def _field_options(self) -> dict[str, Any]:
        """Return the generation options among the fields, normalized."""
        options = normalize({**{name: getattr(self, name) for name in OPTION_FIELDS}, **self.generation_kwargs})
        return options if self.draft_model is None else {"speculation": "draft", **options}

    def _adapter_choice(self) -> AdapterChoice:
        return AdapterChoice.of(self.adapters, self.adapter)

    def _spec(self) -> LoadSpec:
        """Return the specification of what is loaded for the fields."""
        choice = self._adapter_choice()
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
            adapters=choice.sources,
            adapter=choice.default,
            kv_cache_dtype=self.kv_cache_dtype,
            lm_head_dtype=self.lm_head_dtype,
            **fields,
        )

    # Serialization.

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """All fields that change the output, for LangChain's cache and traces."""
        config = self.quantization_config
        params = {
            "model_id": self.model_id,
            "quantization": self.quantization,
            "quantization_config": config if config is None or isinstance(config, dict) else config.to_dict(),
            **{name: getattr(self, name) for name in SPEC_FIELDS if name not in ("local_files_only", "cache_dir")},
            "model_kwargs": self.model_kwargs or None,
            **{name: getattr(self, name) for name in OPTION_FIELDS if name not in ("timeout", "speculation")},
            **self.generation_kwargs,
            "adapters": self.adapters or None,
            "adapter": self.adapter,
            "batch_invariant": self.batch_invariant or None,
            **{
                n: None if getattr(self, n) == "auto" else getattr(self, n) for n in ("kv_cache_dtype", "lm_head_dtype")
            },
        }
        if (external := self._external()) is not None:
            params["engine"] = external.identity()
        if self.own_pipeline is not None:  # no field says which weights and options it has
            params |= {
                "pipeline": pipeline_name(self.own_pipeline),
                "of_pipeline": stored_options(ModelParts.of(self.own_pipeline)),
            }
        return {name: value for name, value in params.items() if value is not None}

    @property
    def lc_secrets(self) -> dict[str, str]:
        """The environment variable that each secret field is loaded from."""
        return {"token": "HF_TOKEN"}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Return True: `dumpd` and `load` work on this class."""
        return True

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """Serialize the fields; an instance over a pipeline of your own cannot be serialized."""
        if self.own_pipeline is not None or getattr(self.draft_model, "own_pipeline", None) is not None:
            return self.to_json_not_implemented()
        serialized = super().to_json()
        kwargs = serialized.get("kwargs")
        if isinstance(kwargs, dict):
            config = kwargs.get("quantization_config")
            if config is not None and not isinstance(config, dict):
                kwargs["quantization_config"] = config.to_dict()
            if isinstance(engine := kwargs.get("engine"), ExternalEngine):
                kwargs["engine"] = engine.to_dict()
        return serialized


OPTION_FIELDS = tuple(name for name in OPTIONS if name in ModelFields.model_fields and name != "adapter")
"""Fields that are generation options."""


def own_error(error: ValidationError) -> QuantLLMError:
    """Return the error of this package behind one of pydantic's; its first one as a sentence if there is none."""
    causes = [e.get("ctx", {}).get("error") for e in error.errors(include_url=False)]
    own = next((cause for cause in causes if isinstance(cause, QuantLLMError)), None)
    return own or _invalid_field(error)


def _invalid_field(error: ValidationError) -> InvalidOptionError:
    """Turn pydantic's first error into one sentence."""
    found = error.errors(include_url=False)[0]
    words = str(found["msg"]).replace("Input should", "it must")
    # An error of all fields together has every argument as its input, secrets too.
    what = written(str(found["loc"][0]), found["input"]) if found["loc"] else "what was given"
    return InvalidOptionError(f"{what} is not allowed; {words[:1].lower()}{words[1:]}.")
