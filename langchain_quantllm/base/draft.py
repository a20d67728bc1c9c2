"""The draft model of an object: what is loaded for it, its checks, and its way to the object's engine.

An owner is a `QuantizedModel`, whose fields it reads.
"""

from __future__ import annotations

from typing import Any

from langchain_quantllm.engine.selection import Engines
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.loading.devices import SPREADS
from langchain_quantllm.loading.drafts import check_vocabulary, tokenizer_of
from langchain_quantllm.loading.inputs import require_parts, require_pipeline
from langchain_quantllm.loading.registry import LoadedModel, get_or_load, pipeline_name
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.schemes import scheme_from


def check_draft(owner: Any) -> None:
    """Check the fields about draft models of an object, before anything is read.

    Raises:
        InvalidOptionError: If a value is not allowed, or contradicts another field.
    """
    draft, scheme = owner.draft_model, owner.draft_quantization
    if draft is None:
        if scheme is not None:
            msg = f"draft_quantization={scheme!r} has no effect without draft_model=; give that, or leave it out."
            raise InvalidOptionError(msg)
        if owner.speculation == "draft":
            msg = "speculation='draft' needs draft_model=, a small model of the same vocabulary; or use 'ngram'."
            raise InvalidOptionError(msg)
        return
    if owner.engine == "pipeline":
        msg = "engine='pipeline' cannot carry out draft_model=; use engine='fast' or 'auto', or leave it out."
        raise InvalidOptionError(msg)
    if isinstance(draft, str) and draft:
        scheme_from(scheme)
        return
    if not hasattr(draft, "draft_model"):  # another object with these fields
        msg = (
            f"draft_model={draft!r} is not allowed; give a folder, a repository's name on the Hub, or a "
            "QuantizedHuggingFaceLLM."
        )
        raise InvalidOptionError(msg)
    if scheme is not None:
        msg = f"draft_quantization={scheme!r} has no effect on a draft_model= that is an object; set its quantization=."
        raise InvalidOptionError(msg)
    if draft._external() is not None or draft.draft_model is not None or draft.adapters or draft.adapter is not None:
        msg = "a draft_model= that is an object must have no draft model, adapters or engine of others itself."
        raise InvalidOptionError(msg)


def draft_spec(owner: Any) -> LoadSpec | None:
    """Return what is loaded for the draft model of an object; None for an object over a pipeline of the user's own.

    Raises:
        InvalidOptionError: If a field about it was set to what is not allowed, after the object was made.
    """
    check_draft(owner)
    draft = owner.draft_model
    if not isinstance(draft, str):
        return None if draft.own_pipeline is not None else draft._spec()
    own = owner._spec()
    is_spread = own.device_map in SPREADS or (isinstance(own.device_map, dict) and set(own.device_map) != {""})
    return LoadSpec(
        model_id=draft,
        scheme=scheme_from(owner.draft_quantization),
        dtype=own.dtype,
        device_map=None if is_spread else own.device_map,
        token=own.token,
        cache_dir=own.cache_dir,
        use_safetensors=own.use_safetensors,
        local_files_only=own.local_files_only,
        progress=own.progress,
    )


def draft_key(owner: Any) -> str:
    """Return a text that is equal for objects with the same draft model, which is not None."""
    spec = draft_spec(owner)
    return f"pipeline {pipeline_name(owner.draft_model.own_pipeline)}" if spec is None else spec.key()


def check_draft_vocabulary(owner: Any) -> None:
    """Check that the draft model of an object has its vocabulary, from the files of their tokenizers alone.

    Raises:
        InvalidOptionError: If it has another one.
        QuantLLMError: If one of the tokenizers cannot be found.
    """
    _check_with(owner, tokenizer_of(owner._spec()))


def _check_with(owner: Any, tokenizer: Any) -> None:
    spec, name = draft_spec(owner), _name(owner)
    own = owner.draft_model.own_pipeline.tokenizer if spec is None else tokenizer_of(spec)
    check_vocabulary(owner.model_id, tokenizer, name, own)


def _name(owner: Any) -> str:
    draft = owner.draft_model
    return draft if isinstance(draft, str) else str(draft.model_id)


def add_draft(owner: Any, model: LoadedModel, engine: Any, key: str) -> None:
    """Let the draft model of an object propose to the sequences of an engine, loaded if it is not in memory.

    Args:
        owner: The object.
        model: Its loaded model.
        engine: The engine over that; other ones than the fast engine get none.
        key: The object's `draft_key`.

    Raises:
        InvalidOptionError: If the draft model has another vocabulary.
        QuantLLMError: If it cannot be loaded.
    """
    if not hasattr(engine, "add_draft"):
        return
    model.remember(("vocabulary", key), lambda: _check_with(owner, require_parts(model).tokenizer))

    def make(most_tokens: int, vocab_size: int) -> Any:
        spec, draft = draft_spec(owner), owner.draft_model
        loaded = get_or_load(spec) if isinstance(draft, str) and spec is not None else draft._loaded()
        source = None if loaded is model else loaded  # it keeps itself
        with loaded.lock:
            if loaded.engines is None:
                loaded.engines = Engines(require_pipeline(loaded), list(loaded.adapters))
            engines = loaded.engines
        return engines.make_draft(_name(owner), most_tokens, vocab_size, fuse=owner.fuse, source=source)

    engine.add_draft(key, make)
