"""Finding a checkpoint and deciding how it is loaded, before any weight is read.

Owns what a user may ask of loading, where the files are, what the checkpoint already is, and
every check that needs no weights. Knows no engine and no LangChain, and reads no tensors.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from langchain_quantllm.compat.packages import is_installed, label_of
from langchain_quantllm.compat.transformers_auto import continues_texts, continues_texts_with_images
from langchain_quantllm.compat.transformers_quantizers import config_of, knows_format
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
    ModelNotFoundError,
    QuantLLMError,
    UnsupportedError,
    nearest,
    pip_install,
)
from langchain_quantllm.loading.adapter_names import AdapterChoice
from langchain_quantllm.loading.gptq import GPTQCheckpoint, read_gptq_checkpoint, read_gptq_folder
from langchain_quantllm.loading.hub import check_reachable
from langchain_quantllm.loading.sources import check_sources, folder_of, wrong_files, wrong_folder
from langchain_quantllm.options import BASE_ADAPTER
from langchain_quantllm.schemes import (
    BITSANDBYTES_OPTIONS,
    FLOAT_DTYPES,
    GPTQ,
    Prequantized,
    Scheme,
    Unquantized,
    scheme_of_config,
)

ATTENTIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""What `attn_implementation` takes; transformers chooses SDPA where it is not given."""

_FLASH_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_3", "flash-attn-3"),
    "flash_attention_4": ("flash_attn_4", "flash-attn-4"),
}


PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Where a checkpoint says how its images are prepared."""


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
        adapters: Folder or repository of each adapter of peft, by its name.
        adapter: Name of the one that the model runs with by itself, or `"base"`; it makes no other model.

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
    adapters: Mapping[str, str] = field(default_factory=dict, hash=False)
    adapter: str = field(default=BASE_ADAPTER, compare=False)

    def __post_init__(self) -> None:
        """Check what can be checked without looking at the checkpoint or the machine."""
        if not self.model_id:
            msg = (
                "model_id is empty; give a folder or a repository's name such as 'HuggingFaceTB/SmolLM2-135M-Instruct'."
            )
            raise InvalidOptionError(msg)
        if self.scheme is not None and self.quantization_config is not None:
            msg = "quantization and quantization_config say the same thing twice; give one of them."
            raise InvalidOptionError(msg)
        if self.dtype not in ("auto", *FLOAT_DTYPES):
            msg = f"dtype={self.dtype!r} is not known{nearest(self.dtype, ('auto', *FLOAT_DTYPES))}"
            raise InvalidOptionError(msg)
        if self.attn_implementation is not None and self.attn_implementation not in ATTENTIONS:
            msg = (
                f"attn_implementation={self.attn_implementation!r} is not "
                f"known{nearest(self.attn_implementation, ATTENTIONS)}"
            )
            raise InvalidOptionError(msg)
        _check_config(self.quantization_config)
        if self.max_memory is not None and not isinstance(self.max_memory, Mapping):
            msg = f"max_memory={self.max_memory!r} is no dict; name the devices, {{0: '10GiB', 'cpu': '30GiB'}}."
            raise InvalidOptionError(msg)
        AdapterChoice.of(self.adapters, self.adapter)

    def key(self) -> str:
        """Say in one string what decides the loaded weights and where they lie."""
        config = self.quantization_config
        if config is not None:
            config = config_of(config) if isinstance(config, dict) else config
            config = config.to_dict()
        scheme = self.scheme
        if config is not None and _says_no_more(config):
            scheme, config = scheme_of_config(config), None
        if scheme == Unquantized() and stored_quantization(self.model_id) is None:
            scheme = None
        return json.dumps(
            {
                "model_id": folder_of(self.model_id) or self.model_id,
                "revision": self.revision,
                "scheme": scheme and scheme.to_dict(),
                "quantization_config": config,
                "dtype": self.dtype,
                "device_map": self.device_map,
                "max_memory": self.max_memory and {str(device): size for device, size in self.max_memory.items()},
                "attn_implementation": self.attn_implementation,
                "cache_dir": self.cache_dir,
                "trust_remote_code": self.trust_remote_code,
                "use_safetensors": self.use_safetensors,
                "model_kwargs": dict(self.model_kwargs),
                "adapters": {name: folder_of(source) or source for name, source in self.adapters.items()},
            },
            sort_keys=True,
            default=str,
        )


def _check_config(config: Any) -> None:
    """Check that a quantization config is one, and that none of its names would be passed over in silence."""
    if config is None or (hasattr(config, "to_dict") and not isinstance(config, Scheme)):
        return
    if not isinstance(config, Mapping):
        msg = f"quantization_config={config!r} is no config of transformers; names and schemes go into quantization=."
        raise InvalidOptionError(msg)
    if config.get("quant_method", "bitsandbytes") not in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        return
    for name in config:
        if name not in BITSANDBYTES_OPTIONS:
            msg = f"quantization_config has the unknown key {name!r}{nearest(str(name), BITSANDBYTES_OPTIONS)}"
            raise InvalidOptionError(msg)
    if not (config.get("load_in_4bit") or config.get("load_in_8bit")):
        msg = (
            f"quantization_config={dict(config)!r} asks for no scheme: load_in_4bit or load_in_8bit must be True, or "
            "quant_method must name one; the short way is quantization='nf4' or 'int8'."
        )
        raise InvalidOptionError(msg)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found: its config, and where its files are.

    Args:
        source: What `from_pretrained` reads: a local folder wherever all files are here, so that
            the Hub is not asked.
        config: The transformers config, this object's own.
        quantization: The quantization config in its dict form; None for an unquantized checkpoint.
        gptq: What is to be known of a GPTQ checkpoint; None for others.
        local: Whether `source` is a folder.
        model_kwargs: What the config did not take of the spec's.
    """

    source: str
    config: Any
    quantization: Mapping[str, Any] | None
    gptq: GPTQCheckpoint | None
    local: bool
    model_kwargs: Mapping[str, Any]


def _says_no_more(config: Mapping[str, Any]) -> bool:
    """Say whether a transformers config in its dict form is wholly expressed by a scheme."""
    scheme = scheme_of_config(config)
    again = None if scheme.calibrated else scheme.transformers_config("float32")
    return again is not None and json.dumps(again.to_dict(), default=str) == json.dumps(config, default=str)


def stored_quantization(model_id: str) -> dict[str, Any] | None:
    """Read the quantization config out of a local folder's config.json; None where there is none, or no folder."""
    folder = folder_of(model_id)
    if folder is None:
        return None
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        quantization = config.get("quantization_config")
    except (OSError, ValueError, AttributeError):  # find_checkpoint says what is wrong, when it is loaded
        return None
    return quantization if isinstance(quantization, dict) else None


def stored_profile(model_id: str) -> tuple[dict[str, Any], str | None, bool]:
    """Read the config and the chat template of a local folder, or of a repository that the Hub's cache has.

    Returns:
        The config, empty where there is none; the template; and whether the model reads images, as far as the names of
        its config's fields and its files tell.
    """
    folder = folder_of(model_id) or _cached_snapshot(LoadSpec(model_id=model_id))
    if folder is None:
        return {}, None, False
    found: dict[str, Any] = {}
    for name in ("config.json", "tokenizer_config.json"):
        try:
            found[name] = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found[name] = {}
    template = found["tokenizer_config.json"].get("chat_template")
    with contextlib.suppress(OSError):
        template = (Path(folder) / "chat_template.jinja").read_text(encoding="utf-8")
    config = found["config.json"]
    sees = any(word in name for name in config for word in ("vision", "image")) and has_image_processor(Path(folder))
    return config, None if template is None else str(template), sees


def has_image_processor(folder: Path) -> bool:
    """Say whether an image processor is in a folder: in a file of its own, or in that of the processor."""
    if (folder / PROCESSOR_FILES[0]).is_file():
        return True
    try:
        return "image_processor" in json.loads((folder / PROCESSOR_FILES[1]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def find_source(spec: LoadSpec) -> str:
    """Find where a checkpoint's files are: a folder, or a repository of which the Hub has been asked.

    Needs neither torch nor transformers, so that what is wrong with a name is told before these are imported.

    Raises:
        ModelNotFoundError: If there is no such folder or repository, or the Hub cannot be reached.
        CheckpointError: If it is in a format that transformers does not load.
        UnsupportedError: If its files are those of a model that writes no text.
    """
    check_sources(spec.model_id)
    if (folder := folder_of(spec.model_id)) is not None:
        return folder
    if spec.local_files_only is not False and (folder := _cached_snapshot(spec)) is not None:
        if (error := wrong_folder(Path(folder), repository=spec.model_id)) is not None:
            raise error
        return folder
    _check_hub(spec)
    return spec.model_id


def find_checkpoint(spec: LoadSpec, source: str | None = None) -> Checkpoint:
    """Find a checkpoint and read its config, from the disk where possible.

    Args:
        spec: What is asked for.
        source: What `find_source` has found, if it was called before.

    Raises:
        ModelNotFoundError: If there is no such folder or repository.
        CheckpointError: If the config cannot be read, or needs code that is not trusted.
        UnsupportedError: If the model generates no text from text, or from text with images.
    """
    source = find_source(spec) if source is None else source
    folder = folder_of(source)
    from transformers import AutoConfig

    try:
        config, model_kwargs = AutoConfig.from_pretrained(
            source, return_unused_kwargs=True, **hub_options(spec, folder), **copy.deepcopy(dict(spec.model_kwargs))
        )
    except (ValueError, OSError) as error:
        raise CheckpointError(explain(spec, error, "config")) from error
    _check_task(spec, config)
    gptq = read_gptq_folder(Path(folder)) if folder is not None else _read_gptq_repository(spec, config)
    quantization = gptq.quantization_config if gptq is not None else getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    _check_method(spec, quantization)
    # What the Hub's options leave over is handed to from_pretrained beside these anyway.
    model_kwargs = {name: value for name, value in model_kwargs.items() if name in spec.model_kwargs}
    return Checkpoint(
        source=source,
        config=config,
        quantization=quantization,
        gptq=gptq,
        local=folder is not None,
        model_kwargs=model_kwargs,
    )


def _read_gptq_repository(spec: LoadSpec, config: Any) -> GPTQCheckpoint | None:
    """Look for a GPTQ checkpoint in a repository on the Hub, whose config says nothing or GPTQ."""
    from huggingface_hub import HfApi, hf_hub_download

    stored = getattr(config, "quantization_config", None)
    stored = stored if stored is None or isinstance(stored, dict) else stored.to_dict()
    if stored is not None and stored.get("quant_method") != "gptq":
        return None

    def fetch(name: str) -> Path:
        path = hf_hub_download(spec.model_id, name, revision=spec.revision, token=spec.token, cache_dir=spec.cache_dir)
        return Path(path)

    return read_gptq_checkpoint(HfApi(token=spec.token).list_repo_files(spec.model_id, revision=spec.revision), fetch)


def _check_method(spec: LoadSpec, quantization: Mapping[str, Any] | None) -> None:
    """Refuse a format that transformers does not know: it would read the packed weights as plain ones."""
    if not quantization:
        return
    method = quantization.get("quant_method", "bitsandbytes")
    method = str(getattr(method, "value", method))
    if not knows_format(method):
        from transformers import __version__

        msg = (
            f"{spec.model_id} is quantized with {method!r}, which transformers {__version__} does not know; a newer "
            f"one may: {pip_install('--upgrade', 'transformers')}"
        )
        raise CheckpointError(msg)


def hub_options(spec: LoadSpec, folder: str | None) -> dict[str, Any]:
    """Give what `from_pretrained` must know about the Hub; of a folder, that it is not to be asked."""
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if folder is not None:
        return {**options, "local_files_only": True}
    given = {"revision": spec.revision, "token": spec.token, "cache_dir": spec.cache_dir}
    return {**options, **{k: v for k, v in given.items() if v is not None}}


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
    names = ["model.safetensors"] if spec.use_safetensors else ["model.safetensors", "pytorch_model.bin"]
    complete = any(_is_complete(folder, name) for name in names)
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return str(folder) if complete and has_tokenizer else None


def _is_complete(folder: Path, weights: str) -> bool:
    """Say whether weights are here, in one file or in all the shards that their index names."""
    index = folder / f"{weights}.index.json"
    if not index.is_file():
        return any(folder.glob(f"*{Path(weights).suffix}"))
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all((folder / shard).exists() for shard in shards)


def _check_hub(spec: LoadSpec) -> None:
    """Fetch the config from the Hub, to learn in clear words why that may not work."""
    import httpx
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import is_offline_mode

    name = spec.model_id
    if spec.local_files_only or is_offline_mode():
        why = "local_files_only=True" if spec.local_files_only else "HF_HUB_OFFLINE"
        msg = f"{name} is not, or not wholly, on this machine, and {why} forbids asking the Hub; give a local folder."
        raise ModelNotFoundError(msg)
    options = {"revision": spec.revision, "token": spec.token}
    try:
        check_reachable(name, **options)
        found = Path(hf_hub_download(name, "config.json", cache_dir=spec.cache_dir, **options))
    except (httpx.HTTPError, hub.EntryNotFoundError, hub.HFValidationError, OSError) as error:
        reasons: tuple[tuple[type[Exception], str], ...] = (  # the first that fits
            (hub.GatedRepoError, "is gated; accept its terms on its page on the Hub and pass token=, or set HF_TOKEN."),
            (hub.RevisionNotFoundError, f"has no revision {spec.revision!r}; check its branches, tags and commits."),
            (
                hub.RepositoryNotFoundError,
                "is neither a folder here nor a model on the Hub; a private one needs token= or HF_TOKEN.",
            ),
            (hub.RemoteEntryNotFoundError, "has no config.json; it is no transformers checkpoint."),
            (hub.HFValidationError, "is neither a folder here nor a repository's name, which looks like 'owner/name'."),
        )
        reason = next(
            (text for kind, text in reasons if isinstance(error, kind)),
            f"is not, or not wholly, on this machine and the Hub could not be asked ({first_line(error)}); check the "
            "connection, or give a local folder.",
        )
        if isinstance(error, hub.RemoteEntryNotFoundError) and (told := _wrong_repository(spec, None)) is not None:
            raise told from error
        msg = f"{name} {reason}"
        raise ModelNotFoundError(msg) from error
    if (told := _wrong_repository(spec, found)) is not None:
        raise told


def _wrong_repository(spec: LoadSpec, config: Path | None) -> QuantLLMError | None:
    """Find out from its files that a repository is no checkpoint of a language model."""
    import httpx
    from huggingface_hub import HfApi, hf_hub_download

    options = {"revision": spec.revision, "token": spec.token}

    def read(name: str) -> Mapping[str, Any]:
        path = config if name == "config.json" and config is not None else None
        content = json.loads(
            Path(path or hf_hub_download(spec.model_id, name, cache_dir=spec.cache_dir, **options)).read_text("utf-8")
        )
        return content if isinstance(content, dict) else {"": content}

    with contextlib.suppress(OSError, ValueError, httpx.HTTPError):  # it is asked for a hint alone
        files = HfApi(token=spec.token).list_repo_files(spec.model_id, revision=spec.revision)
        if config is not None:
            files = [*files, "config.json"]
        return wrong_files(spec.model_id, files, read, is_local=False) if files else None
    return None


def explain(spec: LoadSpec, error: Exception, part: str) -> str:
    """Say in one sentence why a part of a checkpoint, its config or tokenizer, cannot be read."""
    text = str(error)
    if "trust_remote_code" in text:
        return (
            f"{spec.model_id} comes with Python code of its own; read it, and if you trust it pass "
            "trust_remote_code=True."
        )
    if "does not recognize this architecture" in text:
        from transformers import __version__

        return (
            f"transformers {__version__} does not know the architecture of {spec.model_id}; "
            f"a newer one may: {pip_install('--upgrade', 'transformers')}"
        )
    if part == "tokenizer":
        return (
            f"{spec.model_id} has no tokenizer that can be read ({first_line(error)}); copy the model's tokenizer "
            "files into its folder, or install what it needs: pip install sentencepiece tiktoken"
        )
    return f"the {part} of {spec.model_id} cannot be read: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Give the first line of an error's words, without its full stop."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(". ")


def reads_text(config: Any) -> bool:
    """Say whether transformers has a model for a config that is loaded to continue texts."""
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return continues_texts(config.model_type) or remote


def reads_images(config: Any) -> bool:
    """Say whether transformers has a model for a config that continues texts with images in them."""
    remote = "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
    return continues_texts_with_images(config.model_type) or remote


def _check_task(spec: LoadSpec, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False) or not (reads_text(config) or reads_images(config)):
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
                f"{spec.model_id} is not quantized, and GPTQ takes calibration data, so it is not made while loading; "
                "give a GPTQ checkpoint, or use quantization='nf4' or 'int8', which need none."
            )
            raise CheckpointError(msg)
        asked = asked or Unquantized()
        return asked, given if given is not None else asked.transformers_config(dtype_name(spec, checkpoint.config))
    stored = scheme_of_config(checkpoint.quantization)
    if asked is None:
        return stored, None
    if type(asked) is not type(stored) or (isinstance(asked, Prequantized) and asked.method != stored.method):  # type: ignore[attr-defined]
        msg = (
            f"{spec.model_id} is already quantized ({label_of(stored)}), so it cannot be loaded as {label_of(asked)}; "
            "leave quantization out, or give the unquantized checkpoint."
        )
        raise CheckpointError(msg)
    for option, want in asked.to_dict().items():
        has = getattr(stored, option)
        if option not in ("name", "kernel") and want != (list(has) if isinstance(has, tuple) else has):
            msg = (
                f"{spec.model_id} was quantized with {option}={has!r}, not {want!r}; leave {option} out, or give "
                "another checkpoint."
            )
            raise CheckpointError(msg)
    if isinstance(asked, GPTQ) and isinstance(stored, GPTQ):
        return dataclasses.replace(stored, kernel=asked.kernel), None
    return stored, None


def dtype_name(spec: LoadSpec, config: Any) -> str:
    """Name the dtype that the unquantized part of the model is loaded in."""
    if spec.dtype != "auto":
        return spec.dtype
    text_config = config.get_text_config()
    dtype = getattr(config, "dtype", None) or getattr(text_config, "dtype", None) or "float32"
    return str(dtype).removeprefix("torch.")


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
        msg = (
            f"attn_implementation={name!r} runs on CUDA GPUs only, and there is none here; use 'sdpa', which runs "
            "everywhere."
        )
        raise UnsupportedError(msg)
    if not is_installed(module):
        msg = (
            f"attn_implementation={name!r} needs {package}: {pip_install(package)}; or use 'sdpa', which needs nothing."
        )
        raise MissingPackageError(msg)
