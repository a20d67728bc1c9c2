"""Loading a model once for everybody who asks for it.

`load` runs the checks, the measurements and the loading, in this order. `get_or_load` and `wrap_pipeline` share the
result by the handles of `loading.handles`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.bitsandbytes import import_quietly
from langchain_quantllm.compat.gptqmodel import uncompile_gptq_model
from langchain_quantllm.compat.gptqmodel_import import gptqmodel_imported
from langchain_quantllm.compat.library_logging import without_torchao
from langchain_quantllm.compat.optimum_layers import layers_by_rules
from langchain_quantllm.compat.packages import check_packages, label_of
from langchain_quantllm.engine.clean_thread import in_clean_thread
from langchain_quantllm.engine.external.spec import ExternalEngine
from langchain_quantllm.engine.process import check_process, note_loading
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.loading.adapter_weights import load_adapters
from langchain_quantllm.loading.adapters import check_adapters_fit, check_adapters_share, find_adapters
from langchain_quantllm.loading.awq import read_awq_as_gptq
from langchain_quantllm.loading.checkpoint import Checkpoint, find_checkpoint, find_source, warn_of_adapter
from langchain_quantllm.loading.choices import check_attention, check_expert_layout, choose_dtype, reconcile
from langchain_quantllm.loading.config_checks import check_parameters
from langchain_quantllm.loading.devices import (
    default_device_map,
    devices_named,
    devices_of,
    release_memory,
    reset_peaks,
)
from langchain_quantllm.loading.experts import has_packed_experts
from langchain_quantllm.loading.foreign_errors import as_checkpoint_error, reason_of
from langchain_quantllm.loading.gptq import check_gptq, read_layer_sizes
from langchain_quantllm.loading.handles import Handle, get_or_make, pipeline_handle
from langchain_quantllm.loading.output_head import quantize_head
from langchain_quantllm.loading.packed_experts import PackedExperts, find_packed_experts
from langchain_quantllm.loading.parts import ModelParts
from langchain_quantllm.loading.pipeline import load_pipeline
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory import (
    MemoryEstimate,
    MemoryReport,
    TrackedMemory,
    check_8bit,
    check_fits,
    check_head_dtype,
    estimate_config,
    memory_notes,
    take_snapshot,
    track_memory,
    weights_by_kind,
)
from langchain_quantllm.memory.experts import expert_counts, unquantized_reasons
from langchain_quantllm.schemes import AWQ, GPTQ, Int8, Prequantized, Scheme, Unquantized, scheme_of_config


class SharedModel:
    """A model that all instances with the same spec share, wherever its weights are."""

    external: ExternalEngine | None = None
    """The engine of others that holds the weights; None if they are in this process."""

    def __init__(self, scheme: Scheme, adapters: Mapping[str, str] | None = None) -> None:
        """Hold nothing yet.

        Args:
            scheme: Scheme of the weights.
            adapters: Folder or repository of each adapter that requests choose from, by its name.
        """
        self.scheme = scheme
        self.adapters = dict(adapters or {})
        self.lock = threading.RLock()
        self.tokenizer_lock = threading.Lock()
        """Held while a tokenizer is used whose settings change during a call."""
        self.handle: Handle | None = None
        """Its entry in the registry, kept alive by it."""
        self._remembered: dict[Any, Any] = {}

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the object that belongs to the model under a key; make it at the first call.

        Args:
            key: The key.
            make: Makes the object.
        """
        with self.lock:
            if key not in self._remembered:
                self._remembered[key] = make()
            return self._remembered[key]

    @property
    def parts(self) -> ModelParts | None:
        """What the model has beside its weights; None after it was closed."""
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        """Whether the model was closed."""
        return self.parts is None

    @property
    def pipeline(self) -> Any:
        """The transformers pipeline with the weights; None after the model was closed."""
        raise NotImplementedError

    @property
    def summary(self) -> str:
        """The model's memory in one line."""
        raise NotImplementedError

    def memory_report(self, model_id: str) -> MemoryReport:
        """Report the model's memory.

        Args:
            model_id: Name of the model in the report.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Stop the engines and release the weights; instances that share the model load it again at their next call."""
        raise NotImplementedError


class LoadedModel(SharedModel):
    """A pipeline with its weights in memory, shared by all instances with the same spec."""

    def __init__(
        self,
        pipeline: Any,
        scheme: Scheme,
        *,
        estimate: MemoryEstimate | None = None,
        tracked: TrackedMemory | None = None,
        adapters: Mapping[str, str] | None = None,
    ) -> None:
        """Hold a pipeline, this package's own or a user's.

        Args:
            pipeline: The transformers pipeline.
            scheme: Scheme of its weights.
            estimate: The estimate of its memory; None if unknown.
            tracked: The memory before, during and after loading; None if it was not measured.
            adapters: Folder or repository of each adapter that was loaded with it, by its name.
        """
        super().__init__(scheme, adapters)
        self._pipeline: Any = pipeline
        self.estimate = estimate
        self.tracked = tracked
        self.weights = weights_by_kind(pipeline.model)
        self.devices = devices_of(pipeline.model)
        self.engines: Any = None
        """The engines over it, once an engine was asked for; set under `lock`."""

    @property
    def pipeline(self) -> Any:
        """The transformers pipeline; None after the weights were released."""
        return self._pipeline

    @property
    def parts(self) -> ModelParts | None:
        """What the pipeline has beside the weights; None after these were released."""
        pipeline = self._pipeline
        return None if pipeline is None else ModelParts.of(pipeline)

    @property
    def closed(self) -> bool:
        """Whether the weights were released."""
        return self._pipeline is None

    def memory_report(self, model_id: str) -> MemoryReport:
        """Report the model's memory: before, during and after loading, and now.

        Args:
            model_id: Name of the model in the report.
        """
        if self.estimate is None and not self.closed:  # a user's own pipeline
            with contextlib.suppress(UnsupportedError):
                model = self.pipeline.model
                packed = expert_counts(model)[0] > 0
                self.estimate = estimate_config(model.config, packed_experts=packed)
        tracked, estimate, engines = self.tracked, self.estimate, self.engines
        cached_tokens = engines.peak_cache_tokens if engines is not None else 0
        token_bytes = estimate.kv_cache_bytes_per_token if estimate is not None else None
        pipeline, grown_bytes = self.pipeline, 0
        drafts = engines.drafts if engines is not None else ()
        if cached_tokens and pipeline is not None:
            grown_bytes = weights_by_kind(pipeline.model).total_bytes - self.weights.total_bytes
        now = take_snapshot(self.devices)
        peaks = {r.device: r.peak_bytes for r in now.readings if r.device != "cpu" and r.peak_bytes is not None}
        return MemoryReport(
            model_id=model_id,
            scheme_name=label_of(self.scheme),
            devices=self.devices,
            weights=self.weights,
            before=tracked.before if tracked is not None else None,
            after_loading=tracked.after if tracked is not None else now,
            peak_loading=tracked.peak if tracked is not None else None,
            after_generating=now if cached_tokens else None,
            peak_generating=(peaks or None) if cached_tokens else None,
            bytes_16bit=estimate.bytes_16bit if estimate is not None else None,
            kv_cache_bytes=engines.peak_cache_bytes(token_bytes) if cached_tokens and token_bytes else None,
            kv_pool_bytes=engines.kv_cache_bytes if engines is not None else None,
            kv_resident_bytes=engines.kv_resident_bytes if engines is not None and cached_tokens else None,
            weights_grown_bytes=grown_bytes,
            draft_weights_bytes=sum(draft.weights_bytes for draft in drafts) if drafts else None,
            draft_kv_pool_bytes=sum(draft.kv_cache_bytes for draft in drafts) if drafts else None,
            notes=(*self._expert_notes(), *memory_notes(now, self.weights)),
        )

    def _expert_notes(self) -> list[str]:
        """Say in a sentence of a report why a mixture's experts are not quantized, where a scheme was to do it."""
        if self.pipeline is None or self.scheme.weight_bits not in (4, 8):
            return []
        reasons = unquantized_reasons(self.pipeline.model, self.scheme.weight_bits)
        return [
            f"The experts of {count} layer{'s' if count > 1 else ''} are not quantized: {reason}."
            for reason, count in reasons.items()
        ]

    @cached_property
    def summary(self) -> str:
        """Devices, bytes of weights and saving in one line."""
        return MemoryReport(
            model_id="",
            scheme_name=label_of(self.scheme),
            devices=self.devices,
            weights=self.weights,
            bytes_16bit=self.estimate.bytes_16bit if self.estimate is not None else None,
        ).summary()

    def close(self) -> None:
        """Stop the engines and release the weights; instances that share the model load it again at their next call.

        Raises:
            UnsupportedError: If this process was forked off the one that loaded it.
        """
        check_process()
        with self.lock:
            engines, self.engines = self.engines, None
            self._pipeline = None
            self._remembered.clear()
        if engines is not None:
            engines.close()
            del engines
        release_memory()


def get_or_load(spec: LoadSpec) -> LoadedModel:
    """Return the model of a spec; load it if it is not in memory.

    Safe to call from many threads; the weights are read once. The model lives as long as anybody holds the result.

    Raises:
        QuantLLMError: As `load` raises it.
    """
    note_loading()
    source = None
    if "torch" not in sys.modules:  # nothing is loaded yet, and importing torch takes seconds
        source = find_source(spec)
    spec = dataclasses.replace(spec, device_map=default_device_map(spec))
    return get_or_make(spec.key(), lambda: load(spec, source))


def pipeline_name(pipeline: Any) -> str:
    """Return a name for a user's pipeline, the same at every call and unique in this process."""
    return pipeline_handle(pipeline).name


def wrap_pipeline(pipeline: Any) -> LoadedModel:
    """Return the model of a user's pipeline, the same to all callers.

    Args:
        pipeline: A loaded transformers pipeline; it is not changed.

    Raises:
        UnsupportedError: If this process was forked off one with models.
    """
    note_loading()

    def wrap() -> LoadedModel:
        config = getattr(pipeline.model.config, "quantization_config", None)
        if config is not None and not isinstance(config, Mapping):
            config = config.to_dict()
        return LoadedModel(pipeline, Unquantized() if config is None else scheme_of_config(config))

    return pipeline_handle(pipeline).get(wrap)


@in_clean_thread
def load(spec: LoadSpec, source: str | None = None) -> LoadedModel:
    """Load a checkpoint into a new pipeline.

    Args:
        spec: What to load and how.
        source: Result of `find_source`, if that was called before.

    Returns:
        The loaded model, not shared with anybody.

    Raises:
        ModelNotFoundError: If there is no such model here or on the Hub.
        CheckpointError: If the checkpoint cannot be loaded as asked.
        MissingPackageError: If a package is missing for it.
        UnsupportedError: If this machine cannot run it.
        NotEnoughMemoryError: If it does not fit.
    """
    note_loading()
    with as_checkpoint_error(lambda error: f"{spec.model_id} cannot be loaded: {reason_of(error)}"):
        return _load(spec, source)


def _load(spec: LoadSpec, source: str | None) -> LoadedModel:
    source = find_source(spec) if source is None else source
    check_packages(spec.scheme if spec.lm_head_dtype == "auto" else Int8())
    import_quietly()
    adapters = find_adapters(spec)
    check_adapters_share(adapters)
    checkpoint = find_checkpoint(spec, source)
    if checkpoint.has_adapter:
        warn_of_adapter(spec)
    spec = dataclasses.replace(spec, dtype=choose_dtype(spec, checkpoint))
    scheme, quantization_config = reconcile(spec, checkpoint)
    check_packages(scheme)
    check_attention(spec)
    check_expert_layout(spec, checkpoint)
    experts = find_packed_experts(spec, checkpoint)
    device_map = default_device_map(spec)
    devices = devices_named(device_map, spec.max_memory)
    quiet = contextlib.nullcontext() if isinstance(scheme, Prequantized) else without_torchao()
    needs_gptqmodel = isinstance(scheme, GPTQ | AWQ) or (isinstance(scheme, Prequantized) and scheme.method == "awq")
    # gptqmodel is imported before the first measurement, and works only inside its block.
    with gptqmodel_imported() if needs_gptqmodel else contextlib.nullcontext(), quiet:
        if isinstance(scheme, GPTQ):
            scheme = _prepare_gptq(checkpoint, scheme, devices, experts)
        check_adapters_fit(adapters, checkpoint, trust_remote_code=spec.trust_remote_code)
        estimate = None
        with contextlib.suppress(UnsupportedError):  # a model or format without a formula is measured only
            estimate = estimate_config(
                checkpoint.config,
                scheme,
                dtype=spec.dtype,
                trust_remote_code=spec.trust_remote_code,
                packed_experts=has_packed_experts(checkpoint.quantization, checkpoint.stored),
                lm_head_dtype=spec.lm_head_dtype,
            )
        if estimate is not None:
            if checkpoint.stored is not None:
                check_parameters(estimate, checkpoint.stored, quantized=checkpoint.quantization is not None)
            check_8bit(spec.kv_cache_dtype, estimate.no_8bit_cache_reason)
            check_head_dtype(spec.lm_head_dtype, estimate.no_int8_head_reason)
            check_fits(estimate, devices, max_memory=spec.max_memory)
        with track_memory([d for d in devices if d != "cpu"]) as tracked:
            if isinstance(scheme, AWQ):
                read_awq_as_gptq(checkpoint, scheme, devices[0].partition(":")[0] if devices else "cpu")
            with layers_by_rules(getattr(checkpoint.config, "quantization_config", None)):
                pipeline = load_pipeline(spec, checkpoint, quantization_config, device_map, experts)
            if isinstance(scheme, GPTQ | AWQ):
                uncompile_gptq_model(pipeline.model)
            if spec.lm_head_dtype == "int8":
                quantize_head(pipeline.model, is_checked=estimate is not None)
            load_adapters(pipeline.model, adapters, spec)
            # Quantizing leaves freed memory several times the size of the weights cached.
            release_memory(collect=False)
    model = LoadedModel(pipeline, scheme, estimate=estimate, tracked=tracked, adapters=spec.adapters)
    reset_peaks(model.devices)
    return model


def _prepare_gptq(checkpoint: Checkpoint, scheme: GPTQ, devices: Sequence[str], experts: PackedExperts | None) -> GPTQ:
    """Write the quantization and the weights' file name into a GPTQ checkpoint's config, and choose the kernel."""
    gptq = checkpoint.gptq
    if gptq is None:
        return scheme
    sizes = None
    if checkpoint.local:
        folder = Path(checkpoint.source)
        name = gptq.weights_name or ""
        files = [folder / name] if name.endswith(".safetensors") else sorted(folder.glob("*.safetensors"))
        sizes = read_layer_sizes(files, gptq.quantization_config)
        own = frozenset() if experts is None else experts.layers  # whose kernels are not gptqmodel's
        sizes = {name: size for name, size in sizes.items() if name not in own}
    kind = devices[0].partition(":")[0] if devices else "cpu"
    checkpoint.config.quantization_config = check_gptq(gptq.quantization_config, scheme, kind, sizes)
    if gptq.weights_name:
        checkpoint.config.transformers_weights = gptq.weights_name
    return dataclasses.replace(scheme, kernel=checkpoint.config.quantization_config["backend"])
