"""The common behaviour of the LangChain classes: loading on first use, and how a call reaches the engine."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

from langchain_core.exceptions import ContextOverflowError, ModelTimeoutError
from langchain_core.language_models.base import LangSmithParams
from pydantic import PrivateAttr
from typing_extensions import Self

from langchain_quantllm.base.draft import add_draft, check_draft_vocabulary, draft_key
from langchain_quantllm.base.fields import ModelFields
from langchain_quantllm.base.model_holder import ModelHolder
from langchain_quantllm.engine.external.spec import ExternalEngineRun
from langchain_quantllm.engine.request import Engine, EngineInfo, OutputForm, Request, TokenMask, plan_requests
from langchain_quantllm.engine.selection import Engines
from langchain_quantllm.engine.stream import ChunkStream
from langchain_quantllm.engine.worker import UNLOADED
from langchain_quantllm.errors import (
    GenerationError,
    GenerationTimeoutError,
    InvalidOptionError,
    PromptTooLongError,
)
from langchain_quantllm.loading.arguments import LOADING_FIELDS
from langchain_quantllm.loading.external import ExternalModel, external_key, get_or_open
from langchain_quantllm.loading.inputs import (
    prompt_inputs,
    require_parts,
    require_pipeline,
    stop_token_ids,
    stored_options,
    token_ids,
)
from langchain_quantllm.loading.processors import NO_MEDIA, Media
from langchain_quantllm.loading.registry import LoadedModel, SharedModel, get_or_load, wrap_pipeline
from langchain_quantllm.loading.sources import stored_quantization
from langchain_quantllm.memory import MemoryReport
from langchain_quantllm.options import BASE_ADAPTER, GenerationOptions, normalize, resolve
from langchain_quantllm.schemes import Scheme, Unquantized, scheme_from, scheme_of_config

STREAMS: ContextVar[list[ChunkStream] | None] = ContextVar("quantllm_streams", default=None)
"""The streams of the batch in progress."""


class PromptOverflowError(PromptTooLongError, ContextOverflowError):
    """The prompt leaves no room for a new token; LangChain's `ContextOverflowError`."""


class RequestTimeoutError(GenerationTimeoutError, ModelTimeoutError):
    """A call did not end within its `timeout`; LangChain's `ModelTimeoutError`."""


@contextlib.contextmanager
def langchain_errors() -> Iterator[None]:
    """Raise an error of this package as LangChain's too, if LangChain has one for the case."""
    try:
        yield
    except PromptTooLongError as error:
        raise PromptOverflowError(str(error)) from error
    except GenerationTimeoutError as error:
        raise RequestTimeoutError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class PreparedCall:
    """One call, ready to run.

    Args:
        options: The resolved options.
        engine: The engine that runs it.
        tokenizer: The model's tokenizer.
        requests: Its requests, one for each completion.
        max_waiting: Refuse it if so many other requests wait.
        prompts: Its prompts; those of an LLM only.
    """

    options: GenerationOptions
    engine: Engine
    tokenizer: Any
    requests: Sequence[Request]
    max_waiting: int | None = None
    prompts: Sequence[str] = ()

    def submit(self, *, in_pieces: bool = True) -> ChunkStream:
        """Submit the requests; see `Engine.submit`."""
        stream = self.engine.submit(
            self.requests, self.options.timeout, in_pieces=in_pieces, max_waiting=self.max_waiting
        )
        if (streams := STREAMS.get()) is not None:
            streams.append(stream)
        return stream


def _engine_of(model: ExternalModel) -> ExternalEngineRun:
    engine = model.engine
    if engine is None:
        raise GenerationError(UNLOADED)
    return engine


class QuantizedModel(ModelHolder, ModelFields):
    """A quantized local model, loaded on first use and run by one engine for all callers."""

    _loading_fields: ClassVar[frozenset[str]] = frozenset({"model_id", "own_pipeline", *LOADING_FIELDS})
    _instances: ClassVar[weakref.WeakValueDictionary[int, Any]] = weakref.WeakValueDictionary()

    _model: SharedModel | None = PrivateAttr(default=None)

    # Loading.

    def load(self) -> Self:
        """Load the weights now instead of at the first use, and a draft model's.

        Returns:
            The same instance.

        Raises:
            QuantLLMError: A subclass of it, which says what to do; see `langchain_quantllm.errors`.
        """
        super().load()
        if self.draft_model is not None:
            self._engine(self._options(None, {}))  # which loads it as well
        return self

    def _loaded(self) -> SharedModel:
        """Return the model, loaded if it is not."""
        model: SharedModel = super()._loaded()
        return model

    def _open(self) -> SharedModel:
        if self.own_pipeline is not None:
            return wrap_pipeline(self.own_pipeline)
        spec, external = self._spec(), self._external()
        if self.draft_model is not None:
            check_draft_vocabulary(self)
        return get_or_load(spec) if external is None else get_or_open(spec, external)

    def _key(self) -> str | None:
        """Return a text that is equal for instances that share a model; None over a pipeline of one's own."""
        if self.own_pipeline is not None:
            return None
        external = self._external()
        return self._spec().key() if external is None else external_key(self._spec(), external)

    def _forget(self, changed: Iterable[str]) -> None:
        super()._forget(changed)
        if not {"adapters", "adapter"}.isdisjoint(changed) and self._model is not None:
            with contextlib.suppress(InvalidOptionError):  # the next call raises it
                if not self._adapter_choice().sources.items() <= self._model.adapters.items():
                    self._model = None
        if "engine" in changed and self._model is not None:
            with contextlib.suppress(InvalidOptionError):  # the next call raises it
                if self._external() != self._model.external:
                    self._model = None

    def _state(self) -> dict[Any, Any]:
        if self.own_pipeline is not None:
            msg = (
                "an LLM built from your own pipeline= cannot be pickled, because it does not own the weights; "
                "use model_id=."
            )
            raise TypeError(msg)
        return super()._state()

    # The loaded model.

    @property
    def pipeline(self) -> Any:
        """The transformers pipeline that holds the weights; loads them if they are not loaded.

        Raises:
            UnsupportedError: If an engine of others holds the weights.
        """
        return require_pipeline(self._loaded())

    @property
    def engine_info(self) -> EngineInfo:
        """The engine for calls with the options of this object, and why; loads the model if it is not loaded."""
        return self._engine(self._options(None, {})).info

    def memory_report(self) -> MemoryReport:
        """Report the memory before and after loading, and while generating; loads the model if it is not loaded.

        Returns:
            A report that prints as a table, shows with bars in Jupyter, draws them by `.plot()`, and makes a dict by
            `to_dict()`.

        Raises:
            UnsupportedError: If an engine of others holds the weights.
        """
        return self._loaded().memory_report(self.model_id)

    @property
    def scheme(self) -> Scheme:
        """The scheme that the weights have, or will have, in memory."""
        if self._model is not None:
            return self._model.scheme
        if self.own_pipeline is not None:
            return wrap_pipeline(self.own_pipeline).scheme
        config = self.quantization_config or stored_quantization(self.model_id)
        if config is not None:
            return scheme_of_config(config if isinstance(config, Mapping) else config.to_dict())
        return scheme_from(self.quantization) or Unquantized()

    # How a call reaches the engine: options, engine, requests; then the engine's `submit`.

    def _options(self, stop: Sequence[str] | None, call: Mapping[str, Any]) -> GenerationOptions:
        """Resolve a call's options: the call's value, else the field's, the checkpoint's, the default."""
        given = normalize({**call, "stop": stop} if stop is not None else call, place=self._place(at_call=True))
        asked = given.pop("adapter", None)
        adapter = self._adapter_choice().choose(asked)  # before any weight is read
        model = self._loaded()
        parts = require_parts(model)
        if adapter is None and model.adapters:  # the fields were set anew since it was loaded
            adapter = BASE_ADAPTER
        elif adapter is None and asked is not None and parts.has_own_adapters:
            msg = (
                f"adapter={asked!r} only selects adapters that this object loaded; this model's were attached by hand, "
                "so switch them with peft: llm.pipeline.model.disable_adapters()."
            )
            raise InvalidOptionError(msg)
        options = resolve([given, self._field_options()], stored_options(parts))
        draft = None
        if options.speculation == "draft":
            if self.draft_model is None:
                msg = "speculation='draft' needs draft_model=, which is set when the model is made; or use 'ngram'."
                raise InvalidOptionError(msg)
            draft = draft_key(self)
        return dataclasses.replace(options, adapter=adapter, draft=draft)

    def _engine(self, options: GenerationOptions | None = None, *, media: Media = NO_MEDIA) -> Engine:
        """Return the engine for a call's options; None asks for the engine of ordinary calls."""
        model = self._loaded()
        if isinstance(model, ExternalModel):
            return _engine_of(model)
        with model.lock:
            assert isinstance(model, LoadedModel)
            if model.engines is None:
                model.engines = Engines(require_pipeline(model), list(model.adapters))
            engine: Engine = model.engines.choose(
                self.engine,
                self.kv_cache_memory,
                options,
                media=frozenset(name for name, given in media._asdict().items() if given),
                fuse=self.fuse,
                batch_invariant=self.batch_invariant,
                kv_cache_dtype=self.kv_cache_dtype,
            )
        if options is not None and options.draft is not None:
            add_draft(self, model, engine, options.draft)
        return engine

    def _requests(
        self,
        prompt: str | Sequence[str],
        options: GenerationOptions,
        *,
        engine: Engine | None = None,
        mask: Callable[[], TokenMask] | None = None,
        form: OutputForm | None = None,
        media: Media = NO_MEDIA,
    ) -> list[Request]:
        """Make the requests of one prompt, one for each of the `n` samples.

        Args:
            prompt: The prompt, with a placeholder for each image and sound; or pieces of it of which none shares a
                token with the next.
            options: The resolved options of the call.
            engine: The engine of the call; None resolves it.
            mask: Makes the mask of a sequence's allowed tokens.
            form: The form of the texts, for an engine of others.
            media: The images and sounds, in the placeholders' order.
        """
        ids, inputs = prompt_inputs(self._loaded(), prompt, media, add_special_tokens=options.add_special_tokens)
        engine = engine or self._engine(options, media=media)
        return self._requests_of_ids(ids, options, engine=engine, mask=mask, form=form, inputs=inputs)

    def _requests_of_ids(
        self,
        prompt_ids: Sequence[int],
        options: GenerationOptions,
        *,
        engine: Engine,
        mask: Callable[[], TokenMask] | None = None,
        form: OutputForm | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> list[Request]:
        """Make the requests of one prompt that is token ids already, one for each of the `n` samples.

        Args:
            prompt_ids: The prompt.
            options: The resolved options of the call.
            engine: The engine of the call.
            mask: Makes the mask of a sequence's allowed tokens.
            form: The form of the texts, for an engine of others.
            inputs: Further tensors for the model, by the names of its forward's arguments.
        """
        tokenizer = require_parts(self._loaded()).tokenizer
        return plan_requests(
            prompt_ids,
            options,
            engine.limits,
            truncation_side=tokenizer.truncation_side,
            stop_token_ids=stop_token_ids(tokenizer, options.stop),
            max_rows=self.batch_size,
            owner=id(self),
            shares_prefix=self.prefix_caching,
            mask=mask,
            form=form,
            media=inputs,
        )

    # LangChain's conventions.

    def get_token_ids(self, text: str) -> list[int]:
        """Return the model's own token ids of a text, without special tokens; loads the model if needed."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return token_ids(self._loaded(), text, add_special_tokens=False)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        """Return the standard parameters for tracing."""
        name = str(kwargs.get("model") or self.model_id)
        params = LangSmithParams(ls_provider="quantllm", ls_model_name=name, ls_model_type=self._kind)
        given = normalize(kwargs, lenient=True)
        if (temperature := given.get("temperature", self.temperature)) is not None:
            params["ls_temperature"] = temperature
        if (max_tokens := given.get("max_new_tokens", self.max_new_tokens)) is not None:
            params["ls_max_tokens"] = max_tokens
        if stops := stop or given.get("stop") or self.stop:
            params["ls_stop"] = list(stops)
        if self._model is not None:  # a line in the metadata of every run
            params["memory"] = self._model.summary  # type: ignore[typeddict-unknown-key]
        return params
