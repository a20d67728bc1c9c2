"""From a model id and a scheme to a loaded transformers pipeline, shared by all who ask for it.

Owns reading the weights, what goes wrong while that happens, and the registry through which
instances share one loaded model. Knows no engine and no LangChain.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import dataclasses
import gc
import importlib.util
import json
import logging
import sys
import threading
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from langchain_quantllm.checkpoint import (
    Checkpoint,
    LoadSpec,
    check_attention,
    explain,
    find_checkpoint,
    first_line,
    hub_options,
    reconcile,
)
from langchain_quantllm.containment import contained
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
    NotEnoughMemoryError,
    QuantLLMError,
    UnsupportedError,
)
from langchain_quantllm.gptq import check_gptq, read_layer_sizes, settle_gptq_model
from langchain_quantllm.memory import (
    MemoryEstimate,
    MemoryReport,
    TrackedMemory,
    check_fits,
    estimate_memory,
    memory_notes,
    take_snapshot,
    track_memory,
    transformers_builds,
    weights_by_kind,
)
from langchain_quantllm.packages import check_packages, label_of
from langchain_quantllm.schemes import GPTQ, Prequantized, Scheme, Unquantized, scheme_of_config

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `device_map` that let accelerate spread a model over the devices."""


class LoadedModel:
    """A pipeline with its weights in memory, shared by every instance with the same spec."""

    def __init__(
        self,
        pipeline: Any,
        scheme: Scheme,
        *,
        owned: bool = True,
        estimate: MemoryEstimate | None = None,
        tracked: TrackedMemory | None = None,
    ) -> None:
        """Hold a pipeline; one that is not `owned` is the user's and stays theirs.

        Args:
            pipeline: The transformers pipeline.
            scheme: How its weights are held.
            owned: Whether this package loaded it.
            estimate: What it was estimated to take; None where that is not known.
            tracked: The memory before, while and after loading; None where nobody measured.
        """
        self.pipeline: Any = pipeline
        self.name = f"pipeline-{uuid.uuid4().hex[:8]}"
        """What to call the model of a pipeline that has no name."""
        self.scheme = scheme
        self.owned = owned
        self.estimate = estimate
        self.tracked = tracked
        self.weights = weights_by_kind(pipeline.model)
        self.devices = _devices_of(pipeline.model)
        self.lock = threading.RLock()
        self.engine: Any = None
        """The engine that runs it, once one was started; set under `lock`."""

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
        tracked, estimate, engine = self.tracked, self.estimate, self.engine
        cached_tokens = engine.peak_cache_tokens if engine is not None else 0
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
            notes=memory_notes(now, self.weights),
        )

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
        """Stop the engine and let go of the weights; whoever shares the model loads it anew."""
        with self.lock:
            engine, self.engine = self.engine, None
            self.pipeline = None
        if engine is not None:
            engine.close()
            del engine
        release_memory()


def release_memory(*, collect: bool = True) -> None:
    """Give freed memory back to the device and the system, so that others see it.

    Args:
        collect: Look for unreachable cycles first, which takes some tenths of a second.
    """
    if collect:
        gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc alone keeps, and can trim, what was freed
        ctypes.CDLL(None).malloc_trim(0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peaks(devices: Sequence[str]) -> None:
    """Let the allocator's peak counters, which belong to the whole process, begin anew."""
    import torch

    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)


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
    spec = dataclasses.replace(spec, device_map=default_device_map(spec))
    key = spec.key()
    with _registry_lock:
        lock = _loading.setdefault(key, _Lock())
    with lock.lock:
        model = _registry.get(key)
        if model is None or model.closed:
            model = load(spec)
            _registry[key] = model
        return model


_adopted: weakref.WeakValueDictionary[int, LoadedModel] = weakref.WeakValueDictionary()


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
            model = LoadedModel(pipeline, Unquantized() if config is None else scheme_of_config(config), owned=False)
            _adopted[id(pipeline)] = model
        return model


def load(spec: LoadSpec) -> LoadedModel:
    """Load a checkpoint into a new pipeline.

    Args:
        spec: What to load and how.

    Returns:
        The loaded model, which nobody else holds yet.

    Raises:
        ModelNotFoundError: If there is no such model here or on the Hub.
        CheckpointError: If the checkpoint cannot be loaded as asked.
        MissingPackageError: If a package is missing for it.
        UnsupportedError: If this machine cannot run it.
        NotEnoughMemoryError: If it does not fit.
    """
    check_packages(spec.scheme)
    import_quietly()
    checkpoint = find_checkpoint(spec)
    scheme, quantization_config = reconcile(spec, checkpoint)
    check_packages(scheme)
    check_attention(spec)
    device_map = default_device_map(spec)
    devices = _devices_named(device_map, spec.max_memory)
    # gptqmodel comes before the first measurement, and works only inside its block.
    with contained() if _needs_gptqmodel(scheme) else contextlib.nullcontext(), _without_torchao(scheme):
        if isinstance(scheme, GPTQ):
            scheme = _prepare_gptq(checkpoint, scheme, devices)
        estimate = _estimate(checkpoint, scheme, spec)
        if estimate is not None:
            check_fits(estimate, devices, max_memory=spec.max_memory)
        with track_memory([d for d in devices if d != "cpu"]) as tracked:
            pipeline = _load_pipeline(spec, checkpoint, quantization_config, device_map)
            if isinstance(scheme, GPTQ):
                settle_gptq_model(pipeline.model)
            release_memory(collect=False)  # quantizing leaves several times the weights in freed blocks
    model = LoadedModel(pipeline, scheme, estimate=estimate, tracked=tracked)
    reset_peaks(model.devices)
    return model


@contextlib.contextmanager
def _without_torchao(scheme: Scheme) -> Iterator[None]:
    """Keep quiet what torchao, which transformers imports wherever it is installed, says of its own build."""
    if isinstance(scheme, Prequantized):
        yield
        return
    with quiet_logger("torchao"), quiet_logger("torch.utils._pytree"):
        yield


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


def _devices_of(model: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(p.device) for p in model.parameters() if p.device.type != "meta"))


def _devices_named(device_map: Any, max_memory: Any) -> list[str]:
    """List the devices that a device map may put weights on."""
    import torch

    if isinstance(device_map, dict):
        names = [f"cuda:{d}" if isinstance(d, int) else str(d) for d in device_map.values()]
    elif device_map in SPREADS:
        names = [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cpu"]
        if max_memory is not None:
            allowed = [f"cuda:{d}" if isinstance(d, int) else str(d) for d in max_memory]
            names = [name for name in names if name in allowed]
    else:
        names = [str(device_map)]
    return list(dict.fromkeys(name for name in names if name not in ("disk", "meta")))


_import_lock = threading.Lock()


def import_quietly() -> None:
    """Import transformers and bitsandbytes without anything going to the network.

    On some CPUs bitsandbytes asks the Hub for a kernel while it is imported, if the package
    `kernels` is installed. Source: bitsandbytes/backends/cpu/ops.py.
    """
    with _import_lock:
        if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
            return
        before = sys.modules.get("kernels")
        sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` fail
        try:
            with quiet_logger("bitsandbytes.backends.cpu.ops"):
                import bitsandbytes  # noqa: F401
        except (ImportError, OSError, RuntimeError):  # a broken install: transformers says what is wrong, when needed
            pass
        finally:
            del sys.modules["kernels"]
            if before is not None:
                sys.modules["kernels"] = before


@contextlib.contextmanager
def quiet_logger(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Keep a logger's messages below a level quiet inside the block."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def default_device_map(spec: LoadSpec) -> Any:
    """Choose where a model goes if nobody said: the first accelerator, else the CPU.

    Returns:
        A dict, in which a device alone stands for the whole model, or the name of a way to spread it.
    """
    device_map = spec.device_map
    if isinstance(device_map, str | int) and device_map not in SPREADS:
        return {"": device_map}
    if device_map is not None:
        return device_map
    if spec.max_memory is not None:
        return "auto"
    import torch

    if torch.cuda.is_available():
        return {"": torch.cuda.current_device()}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {"": str(accelerator.type) if accelerator is not None else "cpu"}


def _load_pipeline(spec: LoadSpec, checkpoint: Checkpoint, quantization_config: Any, device_map: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    hub = hub_options(spec, checkpoint.source if checkpoint.local else None)
    options = {
        "dtype": _dtype(spec, checkpoint, device_map),
        "device_map": copy.copy(device_map),  # accelerate writes into both
        "max_memory": copy.copy(spec.max_memory),
        "attn_implementation": spec.attn_implementation,
        "quantization_config": quantization_config,
    }
    options = {k: v for k, v in options.items() if v is not None}
    with progress_bars(spec.progress):
        try:
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.source, **hub)
        except (ValueError, OSError, ImportError) as error:
            raise CheckpointError(explain(spec, error, "tokenizer")) from error
        with transformers_builds, _loading_errors(spec):
            model, info = AutoModelForCausalLM.from_pretrained(
                checkpoint.source,
                config=checkpoint.config,
                use_safetensors=spec.use_safetensors or None,
                output_loading_info=True,
                **hub,
                **options,
                **checkpoint.model_kwargs,
            )
    lost = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"]), *_misshapen(model)}
    if lost:
        msg = (
            f"the checkpoint {spec.model_id} has no fitting weights for {len(lost)} tensors, such as {min(lost)!r}, "
            "and they "
            "would have been random; is it complete, and of this architecture?"
        )
        raise CheckpointError(msg)
    model.eval()
    if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        _hush_casts()
    # A pipeline moves a model to the first GPU, unless accelerate has spread it, or a device is named.
    spread = getattr(model, "hf_device_map", None) is not None
    return pipeline("text-generation", model=model, tokenizer=tokenizer, device=None if spread else model.device)


def _dtype(spec: LoadSpec, checkpoint: Checkpoint, device_map: Any) -> Any:
    """Give the dtype to load in.

    GPTQ checkpoints say float16, in which CPU kernels run ten times slower than in bfloat16.
    """
    import torch

    if spec.dtype != "auto":
        return getattr(torch, spec.dtype)
    if checkpoint.gptq is not None and _devices_named(device_map, spec.max_memory)[:1] == ["cpu"]:
        return torch.bfloat16
    return "auto"


def _misshapen(model: Any) -> Iterator[str]:
    """Name bitsandbytes layers whose weights have another shape than the config says: transformers does not check."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is None and type(weight).__name__ != "Int8Params":
            continue
        shape = tuple(weight.shape if state is None else state.shape)  # type: ignore[union-attr]
        if shape != (module.out_features, module.in_features):
            yield f"{name}.weight"


def _hush_casts() -> None:
    """Keep bitsandbytes from saying at every int8 product that it casts bfloat16 to float16.

    Source: MatMul8bitLt in bitsandbytes/autograd/_functions.py.
    """
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if _not_about_casts not in logger.filters:
        logger.addFilter(_not_about_casts)


def _not_about_casts(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


@contextlib.contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Keep transformers' and the Hub's progress bars quiet inside the block unless shown."""
    if shown:
        yield
        return
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    model_bars, hub_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        if model_bars:
            transformers_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


@contextlib.contextmanager
def _loading_errors(spec: LoadSpec) -> Iterator[None]:
    """Say in one sentence what went wrong where transformers' words do not help."""
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError as error:
        release_memory()
        msg = (
            f"the device ran out of memory while loading {spec.model_id}; use a scheme of fewer bits, "
            "device_map='auto' to spread it over several devices, or free what other programs hold."
        )
        raise NotEnoughMemoryError(msg) from error
    except SafetensorError as error:
        msg = f"a weight file of {spec.model_id} is damaged ({first_line(error)}); get it again."
        raise CheckpointError(msg) from error
    except ImportError as error:
        msg = f"{spec.model_id} cannot be loaded without a package: {str(error).strip()}"
        raise MissingPackageError(msg) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        name = str(error).rpartition("argument ")[2].strip("'")
        msg = (
            f"model_kwargs has {name!r}, which neither transformers' from_pretrained nor this model takes; leave it "
            "out."
        )
        raise InvalidOptionError(msg) from error
    except (RuntimeError, ValueError, OSError) as error:
        told = _sentence(spec, error)
        if told is None:
            raise
        raise told from error


def _sentence(spec: LoadSpec, error: Exception) -> QuantLLMError | None:
    """Say what an error of transformers or safetensors means here; None where its own words do."""
    text = str(error)
    name = spec.model_id
    if "trust_remote_code" in text:
        return CheckpointError(explain(spec, error, "model"))
    if "dispatched on the CPU" in text:
        return NotEnoughMemoryError(
            f"{name} does not fit on the GPUs in this scheme, and modules on the CPU were not allowed; use fewer "
            "bits, or "
            "Int8(fp32_cpu_offload=True) with device_map='auto' to keep the rest on the CPU in float32."
        )
    if "ignore_mismatched_sizes" in text:
        return CheckpointError(
            f"the weights of {name} have other shapes than its config says, and would have been random; is it "
            "complete, "
            "and of this architecture?"
        )
    if isinstance(error, OSError) and (missing := _missing_shard(name)):
        return CheckpointError(f"{name} lacks {missing}, which its index names; get the checkpoint again.")
    if isinstance(error, OSError) and "safetensors" in text and not any(Path(name).glob("*.safetensors")):
        return CheckpointError(
            f"{name} has no weights in safetensors, and pickle files can run code while they load; convert it, or pass "
            "use_safetensors=False if you trust its maker."
        )
    return None


def _missing_shard(folder: str) -> str | None:
    index = Path(folder) / "model.safetensors.index.json"
    if not index.is_file():
        return None
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return next((shard for shard in shards if not (index.parent / shard).is_file()), None)
