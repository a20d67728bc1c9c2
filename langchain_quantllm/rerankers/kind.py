"""Which kind of reranker a checkpoint is: a classifier of pairs, or a language model that is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_quantllm.encoders.spec import EncoderSpec
from langchain_quantllm.loading.hub import Repository
from langchain_quantllm.loading.json_files import json_or_empty
from langchain_quantllm.loading.sources import folder_of

_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Ends of the names of classes that write texts."""


def is_decoder(spec: EncoderSpec) -> bool:
    """Say whether a checkpoint is a language model, by the class that its config names.

    Args:
        spec: The checkpoint, and how the Hub is asked.

    Raises:
        ModelNotFoundError: If there is no such repository, or the Hub cannot be asked.
    """
    names = _config(spec).get("architectures") or ()
    return any(str(name).endswith(_WRITERS) for name in names)


def _config(spec: EncoderSpec) -> dict[str, Any]:
    folder = folder_of(spec.model_id)
    if folder is not None:
        return json_or_empty(Path(folder) / "config.json")
    if Path(spec.model_id).expanduser().exists() or spec.model_id.startswith((".", "/", "~")):
        return {}  # loading says what is wrong with it
    repository = Repository(
        name=spec.model_id,
        revision=spec.revision,
        token=spec.token,
        cache_dir=spec.cache_dir,
        local_files_only=bool(spec.local_files_only),
    )
    cached = repository.cached("config.json") if spec.local_files_only is not False else None
    return json_or_empty(cached or repository.fetch("config.json"))
