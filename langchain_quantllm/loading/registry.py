"""From a model id and a scheme to a loaded transformers pipeline, shared by all who ask for it.

Owns the order of checks, measurements and loading, and the registry through which instances
share one loaded model. Knows no engine and no LangChain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.bitsandbytes import import_quietly
from langchain_quantllm.compat.gptqmodel import settle_gptq_model
from langchain_quantllm.compat.gptqmodel_import import contained
from langchain_quantllm.compat.library_logging import without_torchao
from langchain_quantllm.compat.packages import check_packages, label_of
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.loading.adapters import check_shapes, find_adapters, load_adapters
from langchain_quantllm.loading.checkpoint import (
    Checkpoint,
    LoadSpec,
    check_attention,
    find_checkpoint,
    find_source,
    reconcile,
)
from langchain_quantllm.loading.devices import (
    default_device_map,
    devices_named,
    devices_of,
    release_memory,
    reset_peaks,
)
from langchain_quantllm.loading.gptq import check_gptq, read_layer_sizes
from langchain_quantllm.loading.pipeline import load_pipeline
from langchain_quantllm.loading.sources import check_sources
from langchain_quantllm.memory import (
    MemoryEstimate,
    MemoryReport,
    TrackedMemory,
    check_fits,
    estimate_memory,
    memory_notes,
    take_snapshot,
    track_memory,
    weights_by_kind,
)
from langchain_quantllm.schemes import GPTQ, Prequantized, Scheme, Unquantized, scheme_of_config


class LoadedModel:
    """A pipeline with its weights in memory, shared by every instance with the same spec."""

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
            scheme: How its weights are held.
            estimate: What it was estimated to take; None where that is not known.
            tracked: The memory before, while and after loading; None where nobody measured.
            adapters: Folder or repository of each adapter that was loaded with it, by its name.
        """
        self.pipeline: Any = pipeline
        self.scheme = scheme
        self.estimate = estimate
        self.tracked = tracked
        self.adapters = dict(adapters or {})
        self.weights = weights_by_kind(pipeline.model)
        self.devices = devices_of(pipeline.model)
        self.lock = threading.RLock()
        self.engines: Any = None
        """The engines that run it, once one was asked for; set under `lock`."""
        self._remembered: dict[Any, Any] = {}

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """Give what was made of the model under a key, making it the first time.

        Args:
            key: What it is.
            make: Makes it.
        """
        with self.lock:
            if key not in self._remembered:
                self._remembered[key] = make()
            return self._remembered[key]

    @property
    def closed(self) -> bool:
        """Whether the weights were given back."""
        return self.pipeline is None

    def memory_report(self, model_id: str) -> MemoryReport:
        """Put together what is known of the model's memory, the present readings included.

        Args:
            model_id: What to call the model.
        """
        if self.estimate is None and not self.closed:  # a pipeline that somebody else loaded
            with contextlib.suppress(UnsupportedError):
                self.estimate = estimate_memory(self.pipeline.model.config)
        tracked, estimate, engines = self.tracked, self.estimate, self.engines
        cached_tokens = engines.peak_cache_tokens if engines is not None else 0
        token_bytes = estimate.kv_cache_bytes_per_token if estimate is not None else None
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
            kv_cache_bytes=cached_tokens * token_bytes if cached_tokens and token_bytes else None,
            kv_pool_bytes=engines.kv_cache_bytes if engines is not None else None,
            kv_resident_bytes=engines.kv_resident_bytes if engines is not None and cached_tokens else None,
            weights_grown_bytes=self._grown_bytes() if cached_tokens else 0,
            notes=memory_notes(now, self.weights),
        )

    def _grown_bytes(self) -> int:
        pipeline = self.pipeline
        return 0 if pipeline is None else weights_by_kind(pipeline.model).total_bytes - self.weights.total_bytes

    @cached_property
    def summary(self) -> str:
        """Devices, bytes of weights and saving, in one line."""
        return MemoryReport(
            model_id="",
            scheme_name=label_of(self.scheme),
            devices=self.devices,
            weights=self.weights,
            bytes_16bit=self.estimate.bytes_16bit if self.estimate is not None else None,
        ).summary()

    def close(self) -> None:
        """Stop the engines and let go of the weights; whoever shares the model loads it anew."""
        with self.lock:
            engines, self.engines = self.engines, None
            self.pipeline = None
            self._remembered.clear()
        if engines is not None:
            engines.close()
            del engines
        release_memory()


_registry: weakref.WeakValueDictionary[str, LoadedModel] = weakref.WeakValueDictionary()
_registry_lock = threading.Lock()
_loading: weakref.WeakValueDictionary[str, _Lock] = weakref.WeakValueDictionary()


class _Lock:
    """A lock that a weak dictionary can hold."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def acquire(spec: LoadSpec) -> LoadedModel:
    """Give the model of a spec: the one in memory if there is one, else a fresh one.

    Safe from many threads; the weights are read once. The model lives as long as somebody
    holds what this returns.

    Raises:
        QuantLLMError: One of its kinds, as `load` raises it.
    """
    source = None
    if "torch" not in sys.modules:  # so nothing is loaded yet, and importing it takes seconds
        check_sources(spec.model_id, spec.adapters)
        source = find_source(spec)
    spec = dataclasses.replace(spec, device_map=default_device_map(spec))
    key = spec.key()
    with _registry_lock:
        lock = _loading.setdefault(key, _Lock())
    with lock.lock:
        model = _registry.get(key)
        if model is None or model.closed:
            model = load(spec, source)
            _registry[key] = model
        return model


_adopted: weakref.WeakValueDictionary[int, LoadedModel] = weakref.WeakValueDictionary()


_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def name_of(pipeline: Any) -> str:
    """Give a pipeline a name of its own, the same at every call."""
    with _registry_lock:
        return _names.setdefault(pipeline, f"pipeline-{uuid.uuid4().hex[:8]}")


def adopt(pipeline: Any) -> LoadedModel:
    """Give the model of a user's own pipeline, the same one to all who bring this pipeline.

    Args:
        pipeline: A loaded transformers pipeline; it is not changed.
    """
    with _registry_lock:
        model = _adopted.get(id(pipeline))  # which lives as long as the model that holds it
        if model is None or model.pipeline is not pipeline:
            config = getattr(pipeline.model.config, "quantization_config", None)
            if config is not None and not isinstance(config, Mapping):
                config = config.to_dict()
            model = LoadedModel(pipeline, Unquantized() if config is None else scheme_of_config(config))
            _adopted[id(pipeline)] = model
        return model


def load(spec: LoadSpec, source: str | None = None) -> LoadedModel:
    """Load a checkpoint into a new pipeline.

    Args:
        spec: What to load and how.
        source: What `find_source` has found, if it was called before.

    Returns:
        The loaded model, which nobody else holds yet.

    Raises:
        ModelNotFoundError: If there is no such model here or on the Hub.
        CheckpointError: If the checkpoint cannot be loaded as asked.
        MissingPackageError: If a package is missing for it.
        UnsupportedError: If this machine cannot run it.
        NotEnoughMemoryError: If it does not fit.
    """
    check_sources(spec.model_id, spec.adapters)
    check_packages(spec.scheme)
    source = find_source(spec) if source is None else source
    import_quietly()
    adapters = find_adapters(spec)
    checkpoint = find_checkpoint(spec, source)
    scheme, quantization_config = reconcile(spec, checkpoint)
    check_packages(scheme)
    check_attention(spec)
    device_map = default_device_map(spec)
    devices = devices_named(device_map, spec.max_memory)
    quiet = contextlib.nullcontext() if isinstance(scheme, Prequantized) else without_torchao()
    # gptqmodel comes before the first measurement, and works only inside its block.
    with contained() if _needs_gptqmodel(scheme) else contextlib.nullcontext(), quiet:
        if isinstance(scheme, GPTQ):
            scheme = _prepare_gptq(checkpoint, scheme, devices)
        check_shapes(adapters, checkpoint, trust_remote_code=spec.trust_remote_code)
        estimate = _estimate(checkpoint, scheme, spec)
        if estimate is not None:
            check_fits(estimate, devices, max_memory=spec.max_memory)
        with track_memory([d for d in devices if d != "cpu"]) as tracked:
            pipeline = load_pipeline(spec, checkpoint, quantization_config, device_map)
            if isinstance(scheme, GPTQ):
                settle_gptq_model(pipeline.model)
            load_adapters(pipeline.model, adapters, spec)
            release_memory(collect=False)  # quantizing leaves several times the weights in freed blocks
    model = LoadedModel(pipeline, scheme, estimate=estimate, tracked=tracked, adapters=spec.adapters)
    reset_peaks(model.devices)
    return model


def _needs_gptqmodel(scheme: Scheme) -> bool:
    return isinstance(scheme, GPTQ) or (isinstance(scheme, Prequantized) and scheme.method == "awq")


def _prepare_gptq(checkpoint: Checkpoint, scheme: GPTQ, devices: Sequence[str]) -> GPTQ:
    """Write onto a GPTQ checkpoint's config what transformers must know, and choose the kernel."""
    gptq = checkpoint.gptq
    if gptq is None:
        return scheme
    sizes = None
    if checkpoint.local:
        folder = Path(checkpoint.source)
        name = gptq.weights_name or ""
        files = [folder / name] if name.endswith(".safetensors") else sorted(folder.glob("*.safetensors"))
        sizes = read_layer_sizes(files, gptq.quantization_config)
    kind = devices[0].partition(":")[0] if devices else "cpu"
    checkpoint.config.quantization_config = check_gptq(gptq.quantization_config, scheme, kind, sizes)
    if gptq.weights_name:
        checkpoint.config.transformers_weights = gptq.weights_name
    return dataclasses.replace(scheme, kernel=checkpoint.config.quantization_config["backend"])


def _estimate(checkpoint: Checkpoint, scheme: Scheme, spec: LoadSpec) -> MemoryEstimate | None:
    try:
        return estimate_memory(checkpoint.config, scheme, dtype=spec.dtype, trust_remote_code=spec.trust_remote_code)
    except UnsupportedError:  # a model or format without a formula: it is loaded and measured instead
        return None
