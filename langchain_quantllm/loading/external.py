"""Models whose weights an engine of others holds: config, tokenizer and generation config are all that is loaded here.

`get_or_open` shares one running engine among all that ask for an equal one, as the registry shares weights.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from langchain_quantllm.engine.clean_thread import in_clean_thread
from langchain_quantllm.engine.external.spec import EngineSource, ExternalEngine, ExternalEngineRun
from langchain_quantllm.engine.process import check_process, note_loading
from langchain_quantllm.engine.request import ModelLimits
from langchain_quantllm.errors import CheckpointError, UnsupportedError
from langchain_quantllm.loading.adapters import find_adapters
from langchain_quantllm.loading.checkpoint import Checkpoint, check_task, explain, find_source, read_config
from langchain_quantllm.loading.foreign_errors import as_checkpoint_error, reason_of
from langchain_quantllm.loading.handles import get_or_make
from langchain_quantllm.loading.hub import hub_options
from langchain_quantllm.loading.parts import ModelParts
from langchain_quantllm.loading.pipeline import load_tokenizer
from langchain_quantllm.loading.processors import load_processor
from langchain_quantllm.loading.registry import SharedModel
from langchain_quantllm.loading.sources import folder_of
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory import MemoryReport
from langchain_quantllm.schemes import Scheme, Unquantized, scheme_of_config


class ExternalModel(SharedModel):
    """A model in an engine of others, shared by all instances with the same spec and the same engine."""

    def __init__(
        self,
        parts: ModelParts,
        scheme: Scheme,
        engine: ExternalEngineRun,
        *,
        external: ExternalEngine,
        adapters: Mapping[str, str],
    ) -> None:
        """Hold an engine that runs.

        Args:
            parts: What is loaded here.
            scheme: Scheme of the weights, as far as it was given or the checkpoint says.
            engine: The engine.
            external: The value that it was opened by.
            adapters: What the user gave for each adapter, by its name.
        """
        super().__init__(scheme, adapters)
        self.external = external
        self._parts: ModelParts | None = parts
        self._engine: ExternalEngineRun | None = engine
        self._finalizer = weakref.finalize(self, _close_unheld, engine)

    @property
    def parts(self) -> ModelParts | None:
        """What is loaded here; None after the model was closed."""
        return self._parts

    @property
    def engine(self) -> ExternalEngineRun | None:
        """The engine; None after the model was closed."""
        return self._engine

    @property
    def pipeline(self) -> Any:
        """No pipeline is in this process.

        Raises:
            UnsupportedError: Always.
        """
        msg = (
            f"there is no transformers pipeline: the weights are {self._place}; engine='auto' loads them into this "
            "process."
        )
        raise UnsupportedError(msg)

    @property
    def _place(self) -> str:
        return "elsewhere" if self.external is None else self.external.place

    @property
    def summary(self) -> str:
        """Where the weights are, in one line."""
        name = "another engine" if self.external is None else f"the engine {self.external.name!r}"
        return f"weights in {name}, not in this process"

    def memory_report(self, model_id: str) -> MemoryReport:
        """Report no memory: it is not this process's.

        Args:
            model_id: Name of the model.

        Raises:
            UnsupportedError: Always.
        """
        msg = (
            f"the weights of {model_id} are {self._place}, so no memory of theirs can be measured here; measure it "
            "there, or compute it by estimate_memory."
        )
        raise UnsupportedError(msg)

    def close(self) -> None:
        """Stop the engine, or the connection to it; instances that share the model open it again at their next call.

        Raises:
            UnsupportedError: If this process was forked off the one that opened it.
        """
        check_process()
        with self.lock:
            engine, self._engine, self._parts = self._engine, None, None
            self._remembered.clear()
        self._finalizer.detach()
        if engine is not None:
            engine.close()


def _close_unheld(engine: ExternalEngineRun) -> None:
    """Stop an engine with the last object that held its model, or with the program.

    The garbage collector may run under any lock, so closing, which waits for threads, has a thread of its own.
    """
    try:
        threading.Thread(target=engine.close, name="quantllm-close", daemon=True).start()
    except RuntimeError:  # the program is ending, and no thread begins any more
        engine.close()


def external_key(spec: LoadSpec, external: ExternalEngine) -> str:
    """Return a text that is equal for models that are to be shared."""
    return json.dumps([spec.key(), external.key()])


def get_or_open(spec: LoadSpec, external: ExternalEngine) -> ExternalModel:
    """Return the model of a spec in an engine of others; open it if it is not open.

    Safe to call from many threads. The engine lives as long as anybody holds the result.

    Raises:
        QuantLLMError: As `ExternalEngine.open` and the loading of config and tokenizer raise it.
    """
    note_loading()
    model: ExternalModel = get_or_make(external_key(spec, external), lambda: open_model(spec, external))
    return model


@in_clean_thread
def open_model(spec: LoadSpec, external: ExternalEngine) -> ExternalModel:
    """Load config and tokenizer of a checkpoint, and open an engine for it.

    Args:
        spec: What to load; weights may be missing.
        external: The engine.

    Raises:
        ModelNotFoundError: If there is no such model here or on the Hub.
        CheckpointError: If its config or tokenizer cannot be read.
        QuantLLMError: As `ExternalEngine.open` raises it.
    """
    note_loading()
    given = dict(spec.adapters)
    spec = dataclasses.replace(spec, use_safetensors=False)  # no weights are read
    if not external.reads_adapters:
        spec = dataclasses.replace(spec, adapters={})
    with as_checkpoint_error(lambda error: f"{spec.model_id} cannot be loaded: {reason_of(error)}"):
        source = find_source(spec)
        folders = {adapter.name: str(adapter.folder) for adapter in find_adapters(spec)}
        checkpoint = _find(spec, source)
        parts = _load_parts(spec, checkpoint)
    stored = checkpoint.quantization
    scheme = spec.scheme or (Unquantized() if stored is None else scheme_of_config(stored))
    engine = external.open(
        EngineSource(
            model_id=spec.model_id,
            checkpoint=source,
            scheme=spec.scheme,
            stored_quantization=stored,
            dtype=spec.dtype,
            revision=spec.revision,
            token=spec.token,
            cache_dir=spec.cache_dir,
            trust_remote_code=spec.trust_remote_code,
            model_kwargs=checkpoint.model_kwargs,
            adapters=folders if external.reads_adapters else given,
            tokenizer=parts.tokenizer,
            processor=parts.processor,
            config=parts.config,
            limits=limits_of(parts),
        )
    )
    return ExternalModel(parts, scheme, engine, external=external, adapters=given)


def _find(spec: LoadSpec, source: str) -> Checkpoint:
    """Find a checkpoint that may lack its weights, and may be in a format that transformers does not load."""
    config, model_kwargs = read_config(spec, source)
    with as_checkpoint_error(lambda error: explain(spec, error, "config")):
        check_task(spec, config)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return Checkpoint(
        source=source,
        config=config,
        quantization=quantization,
        gptq=None,
        local=folder_of(source) is not None,
        model_kwargs=model_kwargs,
    )


def _load_parts(spec: LoadSpec, checkpoint: Checkpoint) -> ModelParts:
    try:
        processor = load_processor(spec, checkpoint)
    except CheckpointError:
        load_tokenizer(spec, checkpoint)  # its error says more if the tokenizer is the reason
        raise
    return ModelParts(
        tokenizer=load_tokenizer(spec, checkpoint) if processor is None else processor.tokenizer,
        processor=processor,
        config=checkpoint.config,
        generation_config=_load_generation_config(spec, checkpoint),
    )


def _load_generation_config(spec: LoadSpec, checkpoint: Checkpoint) -> Any:
    """Load a checkpoint's generation config; make it of the config where there is none, as transformers does."""
    from transformers import GenerationConfig

    hub = hub_options(spec, checkpoint.source if checkpoint.local else None)
    hub.pop("trust_remote_code")
    try:
        return GenerationConfig.from_pretrained(checkpoint.source, **hub)
    except (OSError, TypeError):
        return GenerationConfig.from_model_config(checkpoint.config)


def limits_of(parts: ModelParts) -> ModelLimits:
    """Read the limits of requests off a model's configs and its tokenizer.

    Args:
        parts: What is loaded of the model.

    Raises:
        CheckpointError: If the config does not say how many tokens there are.
    """
    config, tokenizer = parts.config.get_text_config(), parts.tokenizer
    eos = parts.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    eos_ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    pads = (tokenizer.pad_token_id, parts.generation_config.pad_token_id, *eos_ids, 0)
    vocab_size = getattr(config, "vocab_size", None)
    if not isinstance(vocab_size, int):
        msg = f"the config has vocab_size={vocab_size!r}, which must be the number of tokens; get config.json again."
        raise CheckpointError(msg)
    return ModelLimits(
        context_tokens=getattr(config, "max_position_embeddings", None),
        vocab_size=vocab_size,
        eos_token_ids=eos_ids,
        pad_token_id=next(p for p in pads if p is not None),
    )
