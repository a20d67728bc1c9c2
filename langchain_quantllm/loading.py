"""From a model id and a scheme to a loaded transformers pipeline, shared by all who ask for it.

Owns finding the checkpoint, deciding how it is to be quantized, every check that can be made
before weights are read, loading, and the registry through which instances share one loaded
model. Knows no engine and no LangChain.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
    ModelNotFoundError,
    NotEnoughMemoryError,
    UnsupportedError,
    nearest,
    pip_install,
)
from langchain_quantllm.schemes import FLOAT_DTYPES, GPTQ, Prequantized, Scheme, Unquantized, scheme_of_config

ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""What `attn_implementation` takes; transformers chooses SDPA where it is not given."""

_FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_3", "flash-attn-3"),
    "flash_attention_4": ("flash_attn_4", "flash-attn-4"),
}
_PACKAGES_OF_METHOD = {
    "awq": ("gptqmodel", "optimum"),
    "torchao": ("torchao",),
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("gptqmodel", "optimum"),
}
_PIP_NAMES = {
    "gptqmodel": "langchain-quantllm[gptq]",
    "optimum": "langchain-quantllm[gptq]",
    "compressed_tensors": "compressed-tensors",
}


@dataclass(frozen=True, kw_only=True)
class LoadSpec:
    """What to load and how: all that makes two loaded models different.

    Args:
        model_id: A folder, or the name of a repository on the Hugging Face Hub.
        scheme: The scheme asked for; None takes the checkpoint as it is.
        quantization_config: A transformers quantization config in the scheme's place.
        dtype: `"auto"` (the checkpoint's), or one of `FLOAT_DTYPES`.
        device_map: As transformers takes it; None is the first accelerator, else the CPU.
        max_memory: Most memory per device, such as `{0: "10GiB", "cpu": "30GiB"}`.
        attn_implementation: One of `ATTENTIONS`, or None.
        revision: Branch, tag or commit.
        token: Access token of the Hub.
        cache_dir: Where files of the Hub are kept.
        trust_remote_code: Run Python code that comes with the checkpoint.
        use_safetensors: Refuse weights in pickle files, which can run code.
        local_files_only: True never asks the Hub, False always does; None does where files are missing here.
        progress: Show how far loading is.
        model_kwargs: Further keyword arguments of `from_pretrained`.

    Raises:
        InvalidOptionError: If a value is not allowed or two contradict each other.
    """

    model_id: str
    scheme: Scheme | None = None
    quantization_config: Any = field(default=None, hash=False)
    dtype: str = "auto"
    device_map: Any = field(default=None, hash=False)
    max_memory: Any = field(default=None, hash=False)
    attn_implementation: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    cache_dir: str | None = None
    trust_remote_code: bool = False
    use_safetensors: bool = True
    local_files_only: bool | None = None
    progress: bool = True
    model_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Check what can be checked without looking at the checkpoint or the machine."""
        if not self.model_id:
            msg = "model_id is empty; give a folder or a repository's name such as 'HuggingFaceTB/SmolLM2-135M-Instruct'."
            raise InvalidOptionError(msg)
        if self.scheme is not None and self.quantization_config is not None:
            msg = "quantization and quantization_config say the same thing twice; give one of them."
            raise InvalidOptionError(msg)
        if self.dtype not in ("auto", *FLOAT_DTYPES):
            msg = f"dtype={self.dtype!r} is not known{nearest(self.dtype, ('auto', *FLOAT_DTYPES))}"
            raise InvalidOptionError(msg)
        if self.attn_implementation is not None and self.attn_implementation not in ATTENTIONS:
            msg = f"attn_implementation={self.attn_implementation!r} is not known{nearest(self.attn_implementation, ATTENTIONS)}"
            raise InvalidOptionError(msg)

    def key(self) -> str:
        """Say in one string what decides the loaded weights and where they lie."""
        config = self.quantization_config
        return json.dumps(
            {
                "model_id": _folder(self.model_id) or self.model_id,
                "revision": self.revision,
                "scheme": self.scheme and self.scheme.to_dict(),
                "quantization_config": config if config is None or isinstance(config, dict) else config.to_dict(),
                "dtype": self.dtype,
                "device_map": self.device_map,
                "max_memory": self.max_memory,
                "attn_implementation": self.attn_implementation,
                "cache_dir": self.cache_dir,
                "trust_remote_code": self.trust_remote_code,
                "use_safetensors": self.use_safetensors,
                "model_kwargs": dict(self.model_kwargs),
            },
            sort_keys=True,
            default=str,
        )


class LoadedModel:
    """A pipeline with its weights in memory, shared by every instance with the same spec."""

    def __init__(self, pipeline: Any, scheme: Scheme, *, owned: bool = True) -> None:
        """Hold a pipeline; one that is not `owned` is the user's and stays theirs."""
        self.pipeline: Any = pipeline
        self.scheme = scheme
        self.owned = owned
        self.lock = threading.RLock()
        self.engine: Any = None
        """The engine that runs it, once one was started; set under `lock`."""

    @property
    def closed(self) -> bool:
        """Whether the weights were given back."""
        return self.pipeline is None

    def close(self) -> None:
        """Stop the engine and let go of the weights; whoever shares the model loads it anew."""
        with self.lock:
            engine, self.engine = self.engine, None
            self.pipeline = None
        if engine is not None:
            engine.close()
            del engine
        release_memory()


def release_memory() -> None:
    """Give freed memory back to the device, so that others, and the driver, see it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    key = spec.key()
    with _registry_lock:
        lock = _loading.setdefault(key, _Lock())
    with lock.lock:
        model = _registry.get(key)
        if model is None or model.closed:
            model = load(spec)
            _registry[key] = model
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
    pipeline = _load_pipeline(spec, checkpoint, quantization_config)
    return LoadedModel(pipeline, scheme)


def import_quietly() -> None:
    """Import transformers and bitsandbytes without anything going to the network.

    On some CPUs bitsandbytes asks the Hub for a kernel while it is imported, if the package
    `kernels` is installed. Source: bitsandbytes/backends/cpu/ops.py.
    """
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    hidden = "kernels" not in sys.modules
    if hidden:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # makes `import kernels` fail
    try:
        with quiet_logger("bitsandbytes.backends.cpu.ops"):
            import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # a broken install: transformers says what is wrong when it is needed
        pass
    finally:
        if hidden:
            del sys.modules["kernels"]


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


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found: its config, and where its files are.

    `source` is what `from_pretrained` reads: a local folder wherever all files are here, so
    that the Hub is not asked.
    """

    source: str
    config: Any
    quantization: Mapping[str, Any] | None
    local: bool


def _folder(model_id: str) -> str | None:
    """Give the absolute folder that a model id means, or None if it names no existing one."""
    path = Path(model_id).expanduser()
    return str(path.resolve()) if path.is_dir() else None


def find_checkpoint(spec: LoadSpec) -> Checkpoint:
    """Find a checkpoint and read its config, from the disk where possible.

    Raises:
        ModelNotFoundError: If there is no such folder or repository.
        CheckpointError: If the config cannot be read, or needs code that is not trusted.
        UnsupportedError: If the model generates no text from text alone.
    """
    folder = _folder(spec.model_id) or (None if spec.local_files_only is False else _cached_snapshot(spec))
    if folder is None:
        _check_hub(spec)
    elif not (Path(folder) / "config.json").is_file():
        gguf = next(Path(folder).glob("*.gguf"), None)
        hint = f"it holds {gguf.name}, which is llama.cpp's format" if gguf else "is it a transformers checkpoint?"
        msg = f"the folder {folder} has no config.json; {hint}"
        raise ModelNotFoundError(msg)
    from transformers import AutoConfig

    source = folder or spec.model_id
    try:
        config = AutoConfig.from_pretrained(source, **_hub_options(spec, folder))
    except ValueError as error:
        raise _config_error(spec, error) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    _check_task(spec, config)
    return Checkpoint(source=source, config=config, quantization=quantization, local=folder is not None)


def _hub_options(spec: LoadSpec, folder: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if folder is not None:
        return {**options, "local_files_only": True}
    given = {"revision": spec.revision, "token": spec.token, "cache_dir": spec.cache_dir}
    return {**options, **{k: v for k, v in given.items() if v is not None}, "local_files_only": bool(spec.local_files_only)}


def _cached_snapshot(spec: LoadSpec) -> str | None:
    """Find a complete copy of a repository in the Hub's cache, weights and all."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(spec.model_id, "config.json", cache_dir=spec.cache_dir, revision=spec.revision)
    except HFValidationError:
        return None
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        complete = all((folder / shard).exists() for shard in shards)
    else:
        complete = any(folder.glob("*.safetensors"))
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return str(folder) if complete and has_tokenizer else None


def _check_hub(spec: LoadSpec) -> None:
    """Fetch the config from the Hub, to learn in clear words why that may not work."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub import errors as hub

    name = spec.model_id
    if spec.model_id.startswith(("/", "./", "../", "~")) or os.path.isabs(name) or name.count("/") > 1:
        msg = f"there is no folder {name}; check the path, or give the name of a repository on the Hub."
        raise ModelNotFoundError(msg)
    try:
        hf_hub_download(
            name,
            "config.json",
            revision=spec.revision,
            token=spec.token,
            cache_dir=spec.cache_dir,
            local_files_only=bool(spec.local_files_only),
        )
        return
    except hub.GatedRepoError as error:
        msg = f"{name} is gated; accept its terms on its page on the Hub and pass token=, or set HF_TOKEN."
        cause: Exception = error
    except hub.RevisionNotFoundError as error:
        msg, cause = f"{name} has no revision {spec.revision!r}; check its branches, tags and commits.", error
    except hub.RepositoryNotFoundError as error:
        msg = f"there is no model {name!r} on the Hub, nor a folder of that name; a private one needs token= or HF_TOKEN."
        cause = error
    except hub.EntryNotFoundError as error:
        if isinstance(error, hub.LocalEntryNotFoundError):
            msg = (
                f"{name} is not on this machine, and the Hub {'may not' if spec.local_files_only else 'could not'} be "
                "asked; check the connection, or give the folder of a local copy."
            )
        else:
            msg = f"the repository {name} has no config.json; it is no transformers checkpoint."
        cause = error
    except hub.HFValidationError as error:
        msg = f"{name!r} is neither a folder here nor a repository's name, which looks like 'owner/name'."
        cause = error
    except (hub.OfflineModeIsEnabled, OSError) as error:
        msg = f"{name} is not on this machine and the Hub could not be asked ({type(error).__name__}); give a local folder."
        cause = error
    raise ModelNotFoundError(msg) from cause


def _config_error(spec: LoadSpec, error: ValueError) -> CheckpointError:
    text = str(error)
    if "trust_remote_code" in text:
        msg = (
            f"{spec.model_id} comes with Python code of its own; read it, and if you trust it pass trust_remote_code=True."
        )
    elif "does not recognize this architecture" in text:
        from transformers import __version__

        msg = (
            f"transformers {__version__} does not know the architecture of {spec.model_id}; "
            f"a newer one may: {pip_install('--upgrade', 'transformers')}"
        )
    else:
        msg = f"the config of {spec.model_id} cannot be read: {text}"
    return CheckpointError(msg)


def _check_task(spec: LoadSpec, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder or not (known or remote):
        msg = (
            f"{spec.model_id} is a {config.model_type!r} model, which does not continue a text by itself; "
            "use a decoder-only language model, such as Llama, Qwen or Mistral."
        )
        raise UnsupportedError(msg)


def reconcile(spec: LoadSpec, checkpoint: Checkpoint) -> tuple[Scheme, Any]:
    """Bring together what was asked for and what the checkpoint already is.

    Returns:
        The scheme that results, and the `quantization_config` for `from_pretrained`, or None.

    Raises:
        CheckpointError: If the checkpoint is quantized otherwise, or not quantized where it should be.
    """
    given = spec.quantization_config
    asked = spec.scheme
    if given is not None:
        asked = scheme_of_config(given if isinstance(given, Mapping) else given.to_dict())
    if checkpoint.quantization is None:
        if asked is not None and asked.calibrated and isinstance(asked, GPTQ):
            msg = (
                f"{spec.model_id} is not quantized, and GPTQ takes calibration data, so it is not made while loading; give "
                "a GPTQ checkpoint, or use quantization='nf4' or 'int8', which need none."
            )
            raise CheckpointError(msg)
        asked = asked or Unquantized()
        return asked, given if given is not None else asked.transformers_config(_dtype_name(spec, checkpoint.config))
    stored = scheme_of_config(checkpoint.quantization)
    if asked is None:
        return stored, None
    if type(asked) is not type(stored) or (isinstance(asked, Prequantized) and asked.method != stored.method):  # type: ignore[attr-defined]
        msg = (
            f"{spec.model_id} is already quantized ({_label(stored)}), so it cannot be loaded as {_label(asked)}; "
            "leave quantization out, or give the unquantized checkpoint."
        )
        raise CheckpointError(msg)
    for option in ("bits", "double_quantization"):
        want, has = getattr(asked, option, None), getattr(stored, option, None)
        if want is not None and has is not None and want != has:
            msg = f"{spec.model_id} was quantized with {option}={has}, not {want}; leave {option} out, or give another checkpoint."
            raise CheckpointError(msg)
    return stored, None


def _label(scheme: Scheme) -> str:
    return scheme.method if isinstance(scheme, Prequantized) else scheme.name


def _dtype_name(spec: LoadSpec, config: Any) -> str:
    """Name the dtype that the unquantized part of the model is loaded in."""
    if spec.dtype != "auto":
        return spec.dtype
    text_config = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text_config, "dtype", None) or "float32"
    return str(dtype).removeprefix("torch.")


def check_packages(scheme: Scheme | None) -> None:
    """Check that what a scheme needs is installed.

    Raises:
        MissingPackageError: If a package is missing, with the command that installs it.
    """
    if scheme is None:
        return
    packages = _PACKAGES_OF_METHOD.get(scheme.method, ()) if isinstance(scheme, Prequantized) else scheme.packages
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        command = pip_install(*dict.fromkeys(_PIP_NAMES.get(p, p) for p in missing))
        old = " auto-gptq is there, but it cannot run with transformers 5." if "gptqmodel" in missing and _has("auto_gptq") else ""
        msg = f"quantization {_label(scheme)!r} needs {' and '.join(missing)}: {command}.{old}"
        raise MissingPackageError(msg)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check_attention(spec: LoadSpec) -> None:
    """Check that the attention asked for can run here.

    Raises:
        MissingPackageError: If its package is not installed.
        UnsupportedError: If it needs a GPU and there is none.
    """
    name = spec.attn_implementation
    if name not in _FLASH_PACKAGES:
        return
    import torch

    module, package = _FLASH_PACKAGES[name]
    if not torch.cuda.is_available():
        msg = f"attn_implementation={name!r} runs on CUDA GPUs only, and there is none here; use 'sdpa', which runs everywhere."
        raise UnsupportedError(msg)
    if not _has(module):
        msg = f"attn_implementation={name!r} needs {package}: {pip_install(package)}; or use 'sdpa', which needs nothing."
        raise MissingPackageError(msg)


def default_device_map(spec: LoadSpec) -> Any:
    """Choose where a model goes if nobody said: the first accelerator, else the CPU."""
    if spec.device_map is not None:
        return spec.device_map
    if spec.max_memory is not None:
        return "auto"
    import torch

    if torch.cuda.is_available():
        return {"": torch.cuda.current_device()}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {"": str(accelerator.type) if accelerator is not None else "cpu"}


def _load_pipeline(spec: LoadSpec, checkpoint: Checkpoint, quantization_config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    hub = _hub_options(spec, checkpoint.source if checkpoint.local else None)
    options = {
        "dtype": spec.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype),
        "device_map": default_device_map(spec),
        "max_memory": spec.max_memory,
        "attn_implementation": spec.attn_implementation,
        "quantization_config": quantization_config,
    }
    options = {k: v for k, v in options.items() if v is not None}
    with _progress(spec.progress), _loading_errors(spec):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.source, **hub)
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.source,
            config=checkpoint.config,
            use_safetensors=spec.use_safetensors or None,
            output_loading_info=True,
            **hub,
            **options,
            **spec.model_kwargs,
        )
    if lost := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        msg = (
            f"the checkpoint {spec.model_id} has no fitting weights for {len(lost)} tensors, such as {lost[0]!r}, and they "
            "would have been random; is it complete, and of this architecture?"
        )
        raise CheckpointError(msg)
    model.eval()
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[None]:
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

    try:
        yield
    except torch.OutOfMemoryError as error:
        release_memory()
        msg = (
            f"the device ran out of memory while loading {spec.model_id}; use a scheme of fewer bits, "
            "device_map='auto' to spread it over several devices, or free what other programs hold."
        )
        raise NotEnoughMemoryError(msg) from error
    except ImportError as error:
        msg = f"{spec.model_id} cannot be loaded without a package: {str(error).strip()}"
        raise MissingPackageError(msg) from error
    except ValueError as error:
        if "dispatched on the CPU" in str(error):
            msg = (
                f"{spec.model_id} does not fit on the GPUs in this scheme, and modules on the CPU were not allowed; use fewer "
                "bits, or Int8(fp32_cpu_offload=True) with device_map='auto' to keep the rest on the CPU in float32."
            )
            raise NotEnoughMemoryError(msg) from error
        raise
    except OSError as error:
        if "safetensors" in str(error):
            msg = (
                f"{spec.model_id} has no weights in safetensors, and pickle files can run code while they load; convert it, "
                "or pass use_safetensors=False if you trust its maker."
            )
            raise CheckpointError(msg) from error
        raise
