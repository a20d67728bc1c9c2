"""What an engine of others is told, and what it must say: the base of the values of `engine=` beside the names.

An engine of others holds the weights, in another process or on another machine. Prompts, tool calls, reasoning, stop
strings and texts stay ours: it takes token ids and gives token ids. Nothing but a config and a tokenizer is loaded
here, by `loading.external`.

To add one:

1. A module beside this one, with a frozen dataclass over `ExternalEngine` that sets `name`, extends `REFUSED`, checks
   its own options in `__post_init__`, and implements `open`. It must import neither torch nor the other package at the
   top: users make it before anything is loaded.
2. What `open` returns is an `ExternalEngineRun`: the `Engine` protocol, and `forms`. Its `submit` calls
   `requests.check_requests` first, makes the completions with `detokenizer.begin_completions`, and then pushes each
   token into its `Completion`, which cuts the text at stop strings and makes the chunks. A completion whose
   `finish_reason` is set has ended: cancel it at the engine. A stream whose `should_stop()` is true wants the same, and
   one that `is_full` wants no more for now. `close` may be called by any thread.
3. Its line in `KINDS`, and in `_LAZY` and `__all__` of the package.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

from langchain_quantllm.engine.request import Engine, ModelLimits
from langchain_quantllm.errors import InvalidOptionError, NamedOptions, nearest
from langchain_quantllm.options import GenerationOptions, needs_generate
from langchain_quantllm.schemes import Scheme

KINDS: Mapping[str, tuple[str, str]] = {
    "server": ("langchain_quantllm.engine.external.server", "Server"),
    "vllm": ("langchain_quantllm.engine.external.vllm", "VLLM"),
}
"""Module and class of each kind of engine, by its name in the dict form."""

FORMS = ("json", "regex", "choice", "grammar", "structural_tag", "gbnf")
"""Kinds of `OutputForm`, by the names that servers have for them; llama.cpp calls its notation of grammars GBNF."""


@dataclass(frozen=True, kw_only=True)
class EngineSource:
    """The model that an engine is to run, with what is loaded of it here.

    Args:
        model_id: The folder or repository that the user gave.
        checkpoint: A folder if its config is on this machine, with or without weights; else the repository's name.
        scheme: The scheme asked for; None takes the checkpoint as it is.
        stored_quantization: The checkpoint's own quantization config in its dict form; None for an unquantized one.
        dtype: `"auto"`, or the dtype of unquantized weights.
        revision: Branch, tag or commit of the repository.
        token: Access token of the Hub.
        cache_dir: Folder of the Hub's files.
        trust_remote_code: Whether code of the checkpoint may run.
        model_kwargs: Further options of loading; those that are fields of the config are in `config` already.
        adapters: Folder of each adapter by its name, if the engine `reads_adapters`; else what the user gave.
        tokenizer: The tokenizer of transformers.
        processor: The processor of a model that takes images or sounds, where it could be loaded.
        config: The transformers config.
        limits: The limits of the model's requests, as its config has them.
    """

    model_id: str
    checkpoint: str
    scheme: Scheme | None
    stored_quantization: Mapping[str, Any] | None
    dtype: str
    revision: str | None
    token: str | bool | None = field(repr=False)
    cache_dir: str | None
    trust_remote_code: bool
    model_kwargs: Mapping[str, Any]
    adapters: Mapping[str, str]
    tokenizer: Any
    processor: Any
    config: Any
    limits: ModelLimits


class ExternalEngineRun(Engine, Protocol):
    """An engine of others that runs."""

    @property
    def forms(self) -> frozenset[str]:
        """The kinds of `OutputForm` that it holds texts to, of `FORMS`."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExternalEngine(NamedOptions):
    """The base of the values of `engine=` that name an engine of others, with its options.

    A value is hashable, and equal values share one engine. Its dict form has the name and the options that differ from
    their defaults; a secret (a field with `repr=False`) is in no dict, no pickle and no text.
    """

    name: ClassVar[str]
    """The name of the kind: in `KINDS`, in dict forms, and in `engine_info`."""
    reads_adapters: ClassVar[bool] = False
    """Whether it loads adapters from folders, so that they are looked for and downloaded before it starts."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "pipeline": "which has its weights in this process; give model_id= alone",
        "quantization_config": "which is transformers' own; name the scheme in quantization=",
        "device": "as it chooses its devices itself",
        "device_map": "as it spreads the weights itself",
        "max_memory": "as it spreads the weights itself",
        "attn_implementation": "as its attention is its own",
        "lm_head_dtype": "as it loads the weights itself",
        "draft_model": "as it speculates by options of its own",
        "kv_cache_memory": "as its KV cache is its own",
        "kv_cache_dtype": "as its KV cache is its own",
        "fuse": "as its kernels are its own",
        "batch_invariant": "as its texts may depend on the batch; use engine='fast'",
    }
    """Fields of a model that it does not carry out, each with the reason or the remedy: the end of a sentence."""

    def check(self, given: Mapping[str, Any]) -> None:
        """Refuse fields of a model that the engine does not carry out.

        Args:
            given: The fields that differ from their defaults, by name.

        Raises:
            InvalidOptionError: If one of them would have no effect.
        """
        for name, value in given.items():
            if name in self.REFUSED:
                shown = f"{name}=" if name == "pipeline" else f"{name}={value!r}"
                msg = f"engine={type(self).__name__}(...) does not take {shown}, {self.REFUSED[name]}."
                raise InvalidOptionError(msg)

    def check_options(self, options: GenerationOptions) -> None:
        """Refuse options of a call that the engine cannot carry out, whatever it finds when it starts.

        Args:
            options: The resolved options of a call, or of an object's fields.

        Raises:
            InvalidOptionError: If there is one.
        """
        if (option := needs_generate(options)) is not None:
            msg = (
                f"{option} is carried out by transformers' generate only, not by engine={type(self).__name__}(...); "
                "leave it out, or use engine='pipeline'."
            )
            raise InvalidOptionError(msg)

    def open(self, source: EngineSource) -> ExternalEngineRun:
        """Start the engine, or connect to it, and check that it fits the model.

        Args:
            source: The model.

        Raises:
            QuantLLMError: A subclass that says what is wrong: a package that is missing, a server that does not answer,
                a model that it does not have.
        """
        raise NotImplementedError

    @property
    def place(self) -> str:
        """Where the weights are, in words."""
        return f"in the engine {self.name!r}"

    def identity(self) -> dict[str, Any]:
        """Return what of the engine changes texts, for the keys of caches: its name, and its version if that is known.

        It needs no running engine, and is the same before and after it starts.
        """
        return {"name": self.name}

    def to_dict(self) -> dict[str, Any]:
        """Return the dict form: the name, and the options that differ from their defaults, without secrets."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        defaults = {f.name: f.default for f in fields(self)}
        return {"name": self.name, **{n: _plain(value) for n, value in shown.items() if value != defaults[n]}}

    def key(self) -> str:
        """Return a text that is equal for engines that are to be shared."""
        secrets = [getattr(self, f.name) for f in fields(self) if not f.repr]
        return json.dumps([self.to_dict(), [hash(secret) for secret in secrets]], sort_keys=True, default=str)

    def __getstate__(self) -> dict[str, Any]:
        """Return the options for a pickle, without secrets."""
        secrets = {f.name: f.default for f in fields(self) if not f.repr}
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, **secrets}

    def __copy__(self) -> ExternalEngine:
        """Return the same value: it never changes."""
        return self

    def __deepcopy__(self, memo: Any) -> ExternalEngine:
        """Return the same value: it never changes."""
        return self


def external_engine(engine: Any) -> ExternalEngine | None:
    """Return the engine of others that a value of `engine=` names.

    Args:
        engine: An `ExternalEngine`, its dict form, the name of a kind, or the name of an engine of this package.

    Returns:
        None for an engine of this package, and for a name that is not known.

    Raises:
        InvalidOptionError: If the dict names no kind, or its options are wrong.
    """
    if isinstance(engine, ExternalEngine):
        return engine
    if isinstance(engine, str):
        return _class_of(engine)() if engine in KINDS else None
    if not isinstance(engine, Mapping):
        return None
    options = dict(engine)
    name = options.pop("name", None)
    if name not in KINDS:
        msg = f"engine={dict(engine)!r} names no engine: name={name!r}{nearest(str(name), KINDS)}"
        raise InvalidOptionError(msg)
    return _class_of(name)(**options)


def _class_of(name: str) -> type[ExternalEngine]:
    module, kind = KINDS[name]
    found: type[ExternalEngine] = getattr(importlib.import_module(module), kind)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
